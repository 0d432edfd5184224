"""The benchmark of pivots compares valid orders, and ours is at least as good as the rivals'."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.pivot_baselines import BASELINES, fill, two_sided
from benchmarks.pivot_masks import NATURAL, OURS, measure_fills, time_layer
from tvm_pivot.layout import BlockShape
from tvm_pivot.targets import resolve

MASK = np.random.default_rng(0).random((48, 70)) < 0.15


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("block", [BlockShape(4), BlockShape(2, 4)])
def test_every_baseline_orders_all_rows_and_columns(name: str, block: BlockShape) -> None:
    grouping = two_sided(BASELINES[name], MASK, block)
    assert sorted(grouping.rows.order.tolist()) == list(range(48))
    assert sorted(grouping.columns.order.tolist()) == list(range(70))
    assert 0.0 < fill(MASK, grouping, block) <= 1.0


@pytest.mark.parametrize("block", [BlockShape(2), BlockShape(8), BlockShape(4, 4)])
def test_ours_is_the_best(block: BlockShape) -> None:
    found = measure_fills("file", "layer", MASK, block, quick=False)
    assert set(found.fills) == {NATURAL, *BASELINES, OURS}
    assert found.fills[OURS] >= max(found.fills.values())


def test_a_layer_is_timed_without_and_with_its_pivot() -> None:
    mask = np.repeat(np.random.default_rng(1).random((8, 64)) < 0.1, 8, axis=0)
    mask = mask[np.random.default_rng(2).permutation(64)] ^ (np.arange(64) == 3)
    found = time_layer("planted", mask, replace(resolve("x86"), cores=1))
    assert found["us_min"].keys() == {"without", "with"}
    assert found["predicted_gain"] >= 1.0
