"""The benchmark of pivots compares valid orders, and no rival is clearly better than ours."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_masks import blocks, shuffled

from benchmarks.pivot_baselines import BASELINES, fill, natural, two_sided
from benchmarks.pivot_hypergraph import hypergraph
from benchmarks.pivot_masks import (
    METHODS,
    NATURAL,
    OURS,
    Fills,
    measure_fills,
    search_network,
    time_layer,
)
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
    found = measure_fills("file", "layer", MASK, block, METHODS)
    assert set(found.fills) == {NATURAL, *BASELINES, OURS}
    # Searches that draw numbers are a few blocks of this small mask apart.
    assert found.fills[OURS] >= 0.995 * max(found.fills.values())


def test_some_methods_are_measured_again() -> None:
    block = BlockShape(4)
    before = Fills("file", "layer", (48, 70), 1, "4x1", {NATURAL: 0.5, OURS: 2.0}, "kind", 7.0)
    found = measure_fills("file", "layer", MASK, block, ["hypergraph"], before)
    assert list(found.fills) == [NATURAL, "hypergraph", OURS]
    assert (found.fills[NATURAL], found.fills[OURS], found.seconds) == (0.5, 2.0, 7.0)
    assert found.nonzeros == np.count_nonzero(MASK)
    assert measure_fills("file", "layer", MASK, block, [OURS], before).fills[OURS] < 1.0


def test_a_network_is_searched() -> None:
    found = search_network("net", [MASK, MASK.T])
    assert (found["network"], found["layers"]) == ("net", 2)
    assert found["longest"] <= found["cpu_seconds"]


@given(
    n=st.integers(1, 60),
    k=st.integers(1, 50),
    size=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    density=st.floats(0, 0.6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_parts_of_the_hypergraph_hold_every_row_once(
    n: int, k: int, size: int, density: float, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((n, k)) < density
    groups = hypergraph(mask, size, seed)
    assert sorted(groups.order.tolist()) == list(range(n))
    assert groups.members.shape == (-(-n // size), size)
    np.testing.assert_array_equal(groups.members, hypergraph(mask, size, seed).members)


@pytest.mark.parametrize("size", [2, 4, 6, 8])
@pytest.mark.parametrize("density", [0.05, 0.2])
def test_the_hypergraph_finds_planted_blocks(size: int, density: float) -> None:
    planted = blocks((24 * size, 120), (size, 1), density, seed=size)
    mask = shuffled(planted, size)
    grouping = two_sided(hypergraph, mask, BlockShape(size))
    assert fill(mask, grouping, BlockShape(size)) == 1.0


def test_the_hypergraph_gains_where_nothing_is_planted() -> None:
    mask = np.random.default_rng(3).random((48, 32)) < 0.2
    natural_order = fill(mask, two_sided(natural, mask, BlockShape(4)), BlockShape(4))
    found = fill(mask, two_sided(hypergraph, mask, BlockShape(4)), BlockShape(4))
    assert found > 1.05 * natural_order


def test_a_layer_is_timed_without_and_with_its_pivot() -> None:
    mask = np.repeat(np.random.default_rng(1).random((8, 64)) < 0.1, 8, axis=0)
    mask = mask[np.random.default_rng(2).permutation(64)] ^ (np.arange(64) == 3)
    found = time_layer("planted", mask, replace(resolve("x86"), cores=1))
    assert found["us_min"].keys() == {"without", "with"}
    assert found["predicted_gain"] >= 1.0
