"""Groups of rows: never worse than neighbours, planted ones found, and the best blocks kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_pivot.layout import BlockShape
from tvm_pivot.prune.allocation import TimeCurve, by_density, by_latency
from tvm_pivot.prune.blocks import Blocks, LayerShape
from tvm_pivot.prune.grouping import Part, group_order, group_rows, natural_groups, retained


def saliency(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)


def kept_by_hand(matrix: np.ndarray, grouping: np.ndarray, kept: int) -> float:
    """The share of the sum in the best `kept` blocks, in float64 and with loops."""
    exact = matrix.astype(np.float64)
    blocks = [
        exact[grouping == block, column].sum()
        for block in np.unique(grouping)
        for column in range(matrix.shape[1])
    ]
    return float(sum(sorted(blocks)[-kept:]) / exact.sum())


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 30),
    size=st.sampled_from([1, 2, 4, 8, 16]),
    density=st.floats(0.05, 1.0),
    seed=st.integers(0, 99),
)
def test_groups_are_never_worse_than_neighbours_or_the_start(
    rows: int, columns: int, size: int, density: float, seed: int
) -> None:
    matrix = saliency(rows, columns, seed)
    natural = natural_groups(rows, size)
    kept = max(1, round(density * (int(natural.max()) + 1) * columns))
    start = natural[np.random.default_rng(seed).permutation(rows)]
    part = Part(matrix, kept)
    found = group_rows([part], size, start=start, seed=seed)
    assert np.array_equal(np.bincount(found), np.bincount(natural))
    value = kept_by_hand(matrix, found, kept)
    assert value == pytest.approx(retained([part], found), abs=1e-5)
    assert value >= kept_by_hand(matrix, natural, kept) - 1e-6
    assert value >= kept_by_hand(matrix, start, kept) - 1e-6
    assert np.array_equal(found, group_rows([part], size, start=start, seed=seed))


@given(blocks=st.integers(2, 6), size=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99))
def test_shuffled_groups_are_found_again(blocks: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    support = rng.random((blocks, 60)) < 0.2
    support[:, 0] = True
    matrix = np.repeat(support, size, axis=0) * (1 + saliency(blocks * size, 60, seed))
    matrix = matrix[rng.permutation(len(matrix))].astype(np.float32)
    found = group_rows([Part(matrix, int(support.sum()))], size, seed=seed)
    assert kept_by_hand(matrix, found, int(support.sum())) == pytest.approx(1.0)


def test_several_parts_share_one_grouping_and_both_count() -> None:
    one, other = saliency(32, 20, 0), saliency(32, 50, 1)
    parts = [Part(one, 12), Part(other, 30)]
    found = group_rows(parts, 8)
    natural = natural_groups(32, 8)
    assert retained(parts, found) > retained(parts, natural)
    alone = group_rows(parts[:1], 8)
    assert retained(parts, found) >= retained(parts, alone)


def test_the_order_brings_the_rows_of_a_block_together() -> None:
    order = group_order(np.array([1, 0, 1, 0, 2], np.int32))
    assert order.order.tolist() == [1, 3, 0, 2, 4]


def test_nothing_to_choose_from_keeps_its_order() -> None:
    assert group_rows([Part(np.zeros((4, 3), np.float32), 1)], 8).tolist() == [0] * 4
    zeros = group_rows([Part(np.zeros((10, 3), np.float32), 2)], 4)
    assert zeros.tolist() == natural_groups(10, 4).tolist()


# ---- blocks of a layer -------------------------------------------------------------------------


@given(
    rows=st.integers(1, 20),
    channels=st.integers(1, 9),
    taps=st.sampled_from([1, 4]),
    block=st.sampled_from([(1, 1), (8, 1), (3, 3)]),
    density=st.floats(0.02, 1.0),
    seed=st.integers(0, 99),
)
def test_each_weight_is_told_what_its_block_lacks(
    rows: int, channels: int, taps: int, block: tuple[int, int], density: float, seed: int
) -> None:
    shape = LayerShape(rows, channels, taps)
    matrix = saliency(rows, shape.columns, seed)
    blocks = Blocks(shape, matrix, shape.natural(BlockShape(*block)))
    weights = round(density * shape.weights)
    exact = matrix.astype(np.float64).reshape(rows, channels, taps)
    owner = np.arange(rows) // block[0], np.arange(channels) // block[1]
    sums = np.zeros(exact.shape)
    for row, channel, tap in np.ndindex(exact.shape):
        inside = np.ix_(owner[0] == owner[0][row], owner[1] == owner[1][channel], [tap])
        sums[row, channel, tap] = exact[inside].sum()
    least = sums.reshape(rows, -1)[blocks.mask(weights)].min()
    want = np.maximum(1 - sums / least, 0).reshape(rows, -1)
    np.testing.assert_allclose(blocks.lack(weights), want, atol=1e-5)


@given(
    rows=st.integers(1, 20),
    channels=st.integers(1, 12),
    taps=st.sampled_from([1, 4, 9]),
    groups=st.sampled_from([1, 2]),
    block=st.sampled_from([(1, 1), (4, 1), (8, 1), (4, 4), (2, 2)]),
    density=st.floats(0.02, 1.0),
    seed=st.integers(0, 99),
)
def test_a_mask_holds_whole_blocks_as_many_as_asked(
    rows: int,
    channels: int,
    taps: int,
    groups: int,
    block: tuple[int, int],
    density: float,
    seed: int,
) -> None:
    shape = LayerShape(rows * groups, channels, taps, groups)
    matrix = saliency(shape.rows, shape.columns, seed)
    blocks = Blocks(shape, matrix, shape.natural(BlockShape(*block)))
    if block[1] == 1:
        blocks = blocks.regrouped(round(density * shape.weights), seed)
    mask = blocks.mask(round(density * shape.weights))
    assert abs(mask.sum() - density * shape.weights) <= max(block[0] * block[1], 1)
    owner = blocks.grouping.rows
    columns = blocks.grouping.channels
    planes = mask.reshape(shape.rows, channels, taps)
    for one in np.unique(owner):
        inside = np.flatnonzero(owner == one)
        assert len({int(row) // rows for row in inside}) == 1, "a block spans two groups"
        for channel_block in [None] if columns is None else np.unique(columns):
            chosen = slice(None) if channel_block is None else columns == channel_block
            part = planes[inside][:, chosen]
            if channel_block is None:
                assert (part == part[:1]).all()
            else:
                assert (part == part[:1, :1]).all()
    weakest = blocks.scores.ravel()[blocks.order[: blocks.count(int(mask.sum()))]].min()
    assert blocks.retained(int(mask.sum())) == pytest.approx(
        matrix[mask].sum() / matrix.sum(), abs=1e-5
    )
    assert weakest >= 0


# ---- densities ---------------------------------------------------------------------------------


def layer(rows: int, columns: int, seed: int, block: int = 4, scale: float = 1.0) -> Blocks:
    shape = LayerShape(rows, columns)
    matrix = saliency(rows, columns, seed) * np.float32(scale)
    return Blocks(shape, matrix, shape.natural(BlockShape(block)))


@given(density=st.floats(0.03, 1.0), seed=st.integers(0, 50))
def test_densities_add_up_to_the_one_asked(density: float, seed: int) -> None:
    layers = [layer(16, 24, seed), layer(30, 16, seed + 1), layer(64, 64, seed + 2)]
    kept = by_density(layers, density, last=2)
    total = sum(own.shape.weights for own in layers)
    assert abs(sum(kept) - density * total) <= 4 + len(layers)
    assert all(
        k >= 0.3 * density * own.shape.weights - 4 for k, own in zip(kept, layers, strict=True)
    )
    assert all(
        k <= 3 * density * own.shape.weights + 4 for k, own in zip(kept, layers, strict=True)
    )


def test_the_scale_of_a_layer_does_not_count_but_its_spread_does() -> None:
    plain = by_density([layer(32, 32, 0), layer(32, 32, 1)], 0.2, None)
    scaled = by_density([layer(32, 32, 0), layer(32, 32, 1, scale=1000.0)], 0.2, None)
    assert plain == scaled
    even = Blocks(
        LayerShape(32, 32), np.ones((32, 32), np.float32), LayerShape(32, 32).natural(BlockShape(4))
    )
    few = np.full((32, 32), 1e-3, np.float32)
    few[:4, :4] = 1.0
    peaked = Blocks(LayerShape(32, 32), few, LayerShape(32, 32).natural(BlockShape(4)))
    kept = by_density([even, peaked], 0.2, None)
    assert kept[0] > kept[1]


def straight(dense: float) -> TimeCurve:
    """Time in proportion to density, above a tenth that stays."""
    densities = np.array([0.01, 0.5, 1.0])
    return TimeCurve(densities, dense * (0.1 + 0.9 * densities))


@given(latency=st.floats(0.2, 1.0), seed=st.integers(0, 50))
def test_a_latency_is_kept_and_used(latency: float, seed: int) -> None:
    layers = [layer(16, 64, seed), layer(64, 64, seed + 1)]
    curves = [straight(1000.0), straight(4000.0)]
    fixed = 100.0
    budget = latency * 5100.0
    kept = by_latency(layers, curves, budget, fixed)
    spent = fixed + sum(
        float(c.at(k / own.shape.weights)) for c, k, own in zip(curves, kept, layers, strict=True)
    )
    assert spent <= budget * (1 + 1e-9)
    assert spent >= 0.93 * budget


def test_what_costs_more_for_the_same_is_pruned_more() -> None:
    layers = [layer(64, 64, 0), layer(64, 64, 0)]
    kept = by_latency(layers, [straight(1000.0), straight(9000.0)], 3000.0, 0.0)
    assert kept[0] > kept[1]


def test_an_impossible_latency_is_refused_with_what_is_possible() -> None:
    from tvm_pivot import PruneError

    with pytest.raises(PruneError, match=r"0\.1\d\d of the time remains"):
        by_latency([layer(64, 64, 0)], [straight(1000.0)], 10.0, 0.0)


def test_a_curve_is_read_both_ways() -> None:
    curve = straight(1000.0)
    assert curve.dense == 1000.0
    assert float(curve.at(0.5)) == pytest.approx(550.0)
    assert curve.density_for(550.0) == pytest.approx(0.5, abs=0.01)
    assert curve.density_for(0.0) == 0.01
