"""The pictures of docs/pivoting.md can be drawn, and show what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.pivot_pictures import (
    BLOCK,
    KEPT_SLOT,
    NON_ZERO,
    STANDING,
    draw_mask,
    draw_speed_ups,
    speed_ups,
)


def test_slots_of_kept_blocks_are_light_and_non_zeros_dark() -> None:
    mask = np.zeros((2 * BLOCK.rows, 3), bool)
    mask[1, 0] = True
    figure, axes = plt.subplots()
    draw_mask(axes, mask, "")
    shown = np.asarray(axes.get_images()[0].get_array())
    plt.close(figure)
    assert tuple(shown[1, 0]) == NON_ZERO
    assert all(tuple(shown[r, 0]) == KEPT_SLOT for r in range(BLOCK.rows) if r != 1)
    assert (shown[:, 1:] == 1).all() and (shown[BLOCK.rows :] == 1).all()


def test_speed_ups_are_over_our_own_dense_build(tmp_path: Path) -> None:
    results = json.loads(STANDING.read_text(encoding="utf-8"))
    times = {
        r["model"]: r["median_ms"]
        for r in results["results"]
        if (r["runtime"], r["threads"]) == ("pivot", 1)
    }
    points = speed_ups(results, "8x1")["resnet50"]
    assert times["resnet50 dense"] / times["resnet50 8x1@0.1"] in [ratio for _, ratio in points]
    assert all(0 < share < 1 for share, _ in points)
    draw_speed_ups(tmp_path / "speed-up.svg")
    assert "<svg" in (tmp_path / "speed-up.svg").read_text(encoding="utf-8")
