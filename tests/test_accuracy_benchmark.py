"""The accuracy benchmark: which runs it makes, how it sums them up, and that it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from benchmarks import accuracy
from benchmarks.accuracy import DENSE, NEIGHBOURS, PIVOT, UNSTRUCTURED, Recipe


def result(variant: str, seed: int, score: float) -> dict[str, Any]:
    return {
        "network": "resnet20",
        "variant": variant,
        "sparsity": 0.9,
        "seed": seed,
        "accuracy": score,
        "speed_up": 4.0,
    }


def test_every_variant_is_run_as_often_as_the_others() -> None:
    runs = list(accuracy.runs())
    assert len({run.key for run in runs}) == len(runs) == 34
    at_90 = Counter(r.variant.name for r in runs if r.network == "resnet20" and r.sparsity == 0.9)
    assert set(at_90.values()) == {3}
    assert len(at_90) == 5
    assert {r.network for r in runs if r.variant is DENSE} == {"resnet20", "resnet56"}


def test_the_gap_is_between_neighbours_and_single_weights() -> None:
    scores = {UNSTRUCTURED: (80.0, 82.0), NEIGHBOURS: (70.0, 72.0), PIVOT: (76.0, 77.0)}
    results = [
        result(variant.name, seed, score)
        for variant, both in scores.items()
        for seed, score in enumerate(both)
    ]
    lines = accuracy.summary(results)
    assert lines[-1] == "the pivot closes 55 % of the gap"
    assert any("8x1 pivot" in line and "76.50 +- 0.71 %, 4.00x" in line for line in lines)
    assert len(accuracy.summary(results[:2])) == 1


def test_results_are_kept_for_the_same_recipe_only(tmp_path: Path) -> None:
    path, recipe = tmp_path / "results" / "accuracy.json", Recipe()
    assert accuracy.read(path, recipe) == {}
    found = {"a": result(PIVOT.name, 0, 76.0)}
    accuracy.write(path, recipe, found)
    assert accuracy.read(path, recipe) == found
    assert accuracy.read(path, replace(recipe, epochs=1)) == {}


ONE_WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks.accuracy import end_with_parent
spawn = multiprocessing.get_context("spawn")
pool = ProcessPoolExecutor(1, spawn, end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 3600).result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed with POSIX signals")
def test_training_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ONE_WORKER], cwd=accuracy.REPOSITORY, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    try:
        # The worker holds the other end of the pipe for as long as it lives.
        assert parent.communicate(timeout=120)[0] == b""
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise
    assert parent.returncode == -signal.SIGKILL
