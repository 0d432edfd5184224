"""The benchmark of the farm's scheduler counts what it runs."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import farm_scaling
from benchmarks.farm_scaling import Point, limit, measure


def test_a_point_counts_every_trial() -> None:
    point = measure(4, 8, 0.01, 0.0, 0.0)
    assert (point.devices, point.batch) == (4, 8)
    assert 0 < point.efficiency <= 1
    assert 0 < point.trials_per_minute <= 60 * 4 / 0.005


def test_the_limit_is_the_last_point_before_the_first_bad_one() -> None:
    good = Point(1, 64, 0.0, 100.0, 0.9)
    points = [replace(good, devices=n, efficiency=e) for n, e in ((4, 0.7), (8, 0.9), (2, 0.8))]
    assert limit([good, *points]) == 2
    assert limit(points[:1]) == 0


def test_it_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    few = ["--devices", "1", "2", "--batch", "4", "--trial-ms", "1", "--build-ms", "0"]
    words = ["farm_scaling", *few, "--at-least", "0", "--json"]
    monkeypatch.setattr(sys, "argv", [*words, str(path)])
    farm_scaling.main()
    (series,) = json.loads(path.read_text())["series"]
    assert [point["devices"] for point in series["points"]] == [1, 2]
    assert series["batch"] == 4
