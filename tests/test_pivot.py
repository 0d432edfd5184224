"""Pivots: planted structure is found exactly, and no order is worse than the one a matrix has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_masks import Mask, blocks, cells, diagonal, labels_of, shuffled, with_noise

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import kept_blocks, pack, unpack
from tvm_pivot.pivot import Pivot, find_pivot
from tvm_pivot.pivot_groups import Groups, kept_slots, merged
from tvm_pivot.pivot_planted import diagonal_parts, optimistic_fills, similar_rows

SEEDS = st.integers(0, 2**16)
BLOCKS = st.sampled_from([(2, 1), (4, 1), (8, 1), (2, 2), (4, 4), (8, 8), (1, 4)])


def kept(mask: Mask, rows: int, cols: int) -> int:
    """Blocks of neighbours that hold a non-zero, counted one by one."""
    n, k = mask.shape
    return sum(
        bool(mask[i : i + rows, j : j + cols].any())
        for i in range(0, n, rows)
        for j in range(0, k, cols)
    )


def assert_consistent(mask: Mask, pivot: Pivot) -> None:
    """What a pivot says of itself is what its orders give, and they can be undone."""
    ordered = pivot.apply(mask)
    np.testing.assert_array_equal(pivot.undo(ordered), mask)
    assert pivot.heights.sum() == mask.shape[0]
    assert pivot.widths.sum() == mask.shape[1]
    rows = np.repeat(np.arange(pivot.heights.size), pivot.heights)
    columns = np.repeat(np.arange(pivot.widths.size), pivot.widths)
    found = {(rows[i], columns[j]) for i, j in zip(*np.nonzero(ordered), strict=True)}
    assert pivot.kept == len(found)
    slots = len(found) * pivot.block.rows * pivot.block.cols
    assert pivot.fill == (pytest.approx(mask.sum() / slots) if slots else 1.0)
    assert max(*pivot.heights, 1) <= pivot.block.rows
    assert max(*pivot.widths, 1) <= pivot.block.cols


def same_parts(found: np.ndarray, planted: np.ndarray) -> bool:
    """Whether two labellings divide things alike."""
    pairs = set(zip(found.tolist(), planted.tolist(), strict=True))
    return len(pairs) == len(set(found.tolist())) == len(set(planted.tolist()))


@given(
    n=st.integers(1, 40), k=st.integers(1, 40), density=st.floats(0, 1), block=BLOCKS, seed=SEEDS
)
@settings(max_examples=60)
def test_never_worse_than_the_order_it_has(
    n: int, k: int, density: float, block: tuple[int, int], seed: int
) -> None:
    mask = np.random.default_rng(seed).random((n, k)) < density
    pivot = find_pivot(mask, BlockShape(*block), seconds=60, seed=seed, cost=lambda x: sum(x))
    assert_consistent(mask, pivot)
    assert pivot.kept <= kept(mask, *block)
    if pivot.kind == "as it is":
        assert pivot.rows.is_identity
        assert pivot.columns.is_identity


@given(
    n=st.integers(16, 120), k=st.integers(16, 120), block=BLOCKS, d=st.floats(0.05, 0.5), seed=SEEDS
)
@settings(max_examples=40)
def test_shuffled_blocks_are_found(
    n: int, k: int, block: tuple[int, int], d: float, seed: int
) -> None:
    planted = blocks((n, k), block, d, seed)
    pivot = find_pivot(shuffled(planted, seed), BlockShape(*block), seconds=60)
    assert_consistent(shuffled(planted, seed), pivot)
    assert pivot.kept <= kept(planted, *block)
    if n % block[0] == 0 and k % block[1] == 0:
        assert pivot.fill == 1.0


@given(parts=st.integers(2, 64), height=st.integers(4, 9), width=st.integers(3, 9), seed=SEEDS)
@settings(max_examples=30)
def test_blocks_on_a_diagonal_are_found(parts: int, height: int, width: int, seed: int) -> None:
    planted = diagonal(parts * height, parts * width, parts)
    mask = shuffled(planted, seed)
    found = diagonal_parts(mask)
    assert found is not None
    rng = np.random.default_rng([seed, 1])
    for labels, count in zip(found, mask.shape, strict=True):
        assert same_parts(labels, labels_of(count, parts)[rng.permutation(count)])
    pivot = find_pivot(mask, BlockShape(4), seconds=0)
    assert pivot.kept <= width * parts * -(-height // 4)
    assert pivot.kind == "block-diagonal" or pivot.kept == kept(mask, 4, 1)


@pytest.mark.parametrize("parts", [2, 8])
def test_noise_does_not_hide_a_diagonal(parts: int) -> None:
    planted = with_noise(diagonal(200, 300, parts), 3, 5, 0.1, seed=parts)
    pivot = find_pivot(shuffled(planted, 0), BlockShape(4), seconds=0)
    assert pivot.kind == "block-diagonal"
    assert pivot.kept <= 1.02 * kept(planted, 4, 1)


@pytest.mark.parametrize("block", [(8, 1), (4, 4), (8, 8)])
def test_noise_does_not_hide_blocks(block: tuple[int, int]) -> None:
    planted = with_noise(blocks((256, 320), block, 0.2, seed=5), 3, 5, 0.1, seed=6)
    pivot = find_pivot(shuffled(planted, 0), BlockShape(*block), seconds=60)
    assert pivot.kind == ("equal support" if block[1] == 1 else "permuted blocks")
    assert pivot.kept <= 1.02 * kept(planted, *block)


@pytest.mark.parametrize("block", [(8, 1), (4, 4)])
def test_cells_of_kept_rows_and_columns_are_found(block: tuple[int, int]) -> None:
    planted = cells(512, 4, 0.4, seed=3)
    mask = shuffled(planted, 0)
    order = np.random.default_rng([0, 1]).permutation(512)
    families = similar_rows(mask)
    assert families is not None
    some = families >= 0
    assert same_parts(families[some], labels_of(512, 4)[order][some])
    assert some.mean() > 0.8
    pivot = find_pivot(mask, BlockShape(*block), seconds=60)
    assert pivot.kind == "block-column-row"
    assert pivot.kept < 0.6 * kept(planted, *block)


def test_a_periodic_kernel_is_found() -> None:
    planted = np.arange(96)[:, None] % 6 == np.arange(120) % 6
    pivot = find_pivot(planted, BlockShape(8), seconds=0)
    assert (pivot.fill, pivot.kept) == (1.0, 12 * 20)
    assert pivot.kind == "block-diagonal"


def test_dead_rows_and_columns_are_put_last() -> None:
    mask = np.zeros((16, 12), np.bool_)
    mask[np.ix_([1, 4, 6, 7, 9, 10, 12, 15], [0, 3, 4, 8])] = True
    pivot = find_pivot(mask, BlockShape(4, 4), seconds=0)
    assert (pivot.fill, pivot.kept) == (1.0, 2)
    assert pivot.kind == "dead rows and columns"
    assert pivot.apply(mask)[:8, :4].all()


def test_large_masks_are_recovered() -> None:
    planted = blocks((2048, 2048), (8, 8), 0.1, seed=2)
    pivot = find_pivot(shuffled(planted, 2), BlockShape(8, 8))
    assert pivot.fill == 1.0


@pytest.mark.parametrize("block", [BlockShape(4), BlockShape(4, 4)])
def test_the_search_is_deterministic_and_gains(block: BlockShape) -> None:
    mask = np.random.default_rng(1).random((128, 96)) < 0.1
    first, again, other = (find_pivot(mask, block, seconds=600, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.rows.order, again.rows.order)
    np.testing.assert_array_equal(first.columns.order, again.columns.order)
    assert not np.array_equal(first.rows.order, other.rows.order)
    assert first.kind == "searched"
    assert first.kept < 0.92 * kept(mask, block.rows, block.cols)


def test_the_cost_decides() -> None:
    """The same mask, with a target that likes nothing better than what it is given."""
    mask = shuffled(blocks((64, 64), (8, 1), 0.2, seed=4), 4)
    pivot = find_pivot(mask, BlockShape(8), cost=lambda lengths: 1.0)
    assert pivot.kind == "as it is"
    assert pivot.rows.is_identity
    assert kept_slots(np.array([4, 4])) < kept_slots(np.array([6, 2]))
    assert kept_slots(np.array([], np.int64)) == 0.0


@given(n=st.integers(1, 50), k=st.integers(1, 30), rows=st.sampled_from([2, 4, 8]), seed=SEEDS)
@settings(max_examples=30)
def test_slots_pack_every_row(n: int, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((n, k)) < 0.3, rng.standard_normal((n, k)), 0).astype(np.float32)
    pivot = find_pivot(weight, BlockShape(rows), seconds=60)
    slots = pivot.slots()
    assert np.count_nonzero(kept_blocks(weight != 0, slots, rows)) == pivot.kept
    np.testing.assert_array_equal(unpack(pack(weight, BlockShape(rows), slots=slots)), weight)


def test_groups_that_fit_together_are_joined() -> None:
    groups = Groups.of([[0, 1, 2], [], [3], [4, 5], [6, 7, 8, 9]], 4, 10).tidied()
    assert sorted(groups.heights.tolist()) == [2, 4, 4]
    assert sorted(groups.order.tolist()) == list(range(10))
    counts = merged(np.eye(10, dtype=np.bool_), groups)
    np.testing.assert_array_equal(counts.sum(axis=0), np.ones(10))


def test_the_estimate_tells_structure_from_chance() -> None:
    planted = shuffled(blocks((256, 256), (8, 1), 0.1, seed=7), 7)
    assert optimistic_fills(planted, (4, 8)) == pytest.approx({4: 1.0, 8: 1.0}, abs=0.05)
    chance = np.random.default_rng(7).random((256, 1024)) < 0.1
    fills = optimistic_fills(chance, (2, 8, 512))
    assert 0.5 < fills[2] < 0.65
    assert 0.17 < fills[8] < 0.3
    assert optimistic_fills(np.zeros((4, 4), np.bool_), (2,)) == {2: 1.0}
    # Rows that are dead in all columns that are looked at.
    wide = np.zeros((64, 4096), np.bool_)
    wide[np.arange(64), np.arange(64)] = True
    assert optimistic_fills(wide, (2,))[2] == pytest.approx(0.5)


def test_what_has_no_pivot() -> None:
    with pytest.raises(ValueError, match="no pivot of shape"):
        find_pivot(np.zeros(4), BlockShape(2))
    with pytest.raises(ValueError, match="256x1 blocks"):
        find_pivot(np.zeros((4, 4)), BlockShape(256))
    for shape in ((0, 4), (4, 0)):
        assert find_pivot(np.zeros(shape), BlockShape(2)).kind == "as it is"
