"""Block-column-row masks: their strips are found exactly, and rows get the best order there is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_masks import Mask, blocks, grid, labels_of, shuffled, strips

from tvm_pivot.layout import BlockShape
from tvm_pivot.pivot import find_pivot
from tvm_pivot.pivot_cells import find_strips, strip_groups
from tvm_pivot.pivot_groups import Groups, row_lengths
from tvm_pivot.pivot_planted import row_shares

Labels = npt.NDArray[np.int64]


def found_strips(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
    shares = row_shares(mask, 0)
    assert shares is not None
    return find_strips(mask, shares)


def planted(rows: Labels, columns: Labels, share: float, seed: int) -> tuple[Mask, Labels, Labels]:
    """A shuffled mask, and the strips of its rows and columns."""
    rng = np.random.default_rng([seed, 1])
    orders = [rng.permutation(labels.size) for labels in (rows, columns)]
    mask = shuffled(grid(rows, columns, share, seed), seed)
    return mask, rows[orders[0]], columns[orders[1]]


def assert_found(mask: Mask, rows: Labels, columns: Labels, missing: float = 0.0) -> None:
    """The strips are those that were planted, for all but a share of what has non-zeros."""
    found = found_strips(mask)
    assert found is not None
    for labels, true, axis in zip(found, (rows, columns), (1, 0), strict=True):
        live = mask.any(axis=axis)
        assert not (labels[~live] >= 0).any()
        some = labels >= 0
        assert some.sum() >= (1 - missing) * live.sum()
        pairs = set(zip(labels[some].tolist(), true[some].tolist(), strict=True))
        assert len(pairs) == labels.max() + 1 == np.unique(true[live]).size


def fewest(mask: Mask, size: int) -> int:
    """Blocks that no order can do without, column by column."""
    return sum(-(-int(count) // size) for count in mask.sum(axis=0))


def blocks_of(mask: Mask, groups: Groups) -> int:
    """R x 1 blocks with a non-zero, counted group by group."""
    lists = [g[g < groups.count] for g in groups.members]
    assert sorted(np.concatenate(lists).tolist()) == list(range(mask.shape[0]))
    return sum(int(mask[rows].any(axis=0).sum()) for rows in lists)


@given(
    n=st.integers(300, 420),
    k=st.integers(300, 420),
    parts=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    share=st.floats(0.4, 0.6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_strips_that_do_not_divide_the_matrix_are_found(
    n: int, k: int, parts: tuple[int, int], share: float, seed: int
) -> None:
    mask, rows, columns = planted(labels_of(n, parts[0]), labels_of(k, parts[1]), share, seed)
    assert_found(mask, rows, columns, missing=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_strips_of_different_heights_and_widths_are_found(seed: int) -> None:
    rows, columns = strips(511, 6, seed), strips(700, 5, seed + 100)
    mask, rows, columns = planted(rows, columns, 0.5, seed)
    assert_found(mask, rows, columns, missing=0.06)


@pytest.mark.parametrize("parts", [(16, 16), (64, 64), (32, 8)])
def test_a_large_grid_is_found(parts: tuple[int, int]) -> None:
    rows, columns = labels_of(4096, parts[0]), labels_of(4000, parts[1])
    mask, rows, columns = planted(rows, columns, 0.4, seed=1)
    assert_found(mask, rows, columns, missing=0.001)


def test_one_strip_of_rows_is_found() -> None:
    mask, rows, columns = planted(labels_of(300, 1), labels_of(400, 8), 0.5, seed=2)
    assert_found(mask, rows, columns)


def test_what_is_no_grid_is_not_taken_for_one() -> None:
    chance = np.random.default_rng(0).random((256, 256)) < 0.2
    for mask in (
        chance,
        np.zeros_like(chance),
        np.ones_like(chance),
        shuffled(blocks((256, 256), (8, 1), 0.2, seed=1), 1),
    ):
        assert found_strips(mask) is None


def test_a_row_that_fits_nowhere_is_in_no_strip_of_others() -> None:
    mask, _, _ = planted(labels_of(256, 4), labels_of(256, 4), 0.5, seed=3)
    bad = int(np.flatnonzero(mask.any(axis=1))[0])
    mask[bad] ^= np.random.default_rng(0).random(256) < 0.2
    found = found_strips(mask)
    assert found is not None
    own = found[0] == found[0][bad]
    assert found[0][bad] < 0 or own.sum() == 1


def whole_cells(seed: int, size: int) -> Mask:
    """Cells in which rows that the same cells keep are multiples of a block's height."""
    rng = np.random.default_rng(seed)
    rows, columns = labels_of(40 * size, 4), labels_of(400, 5)
    kept_rows = (rng.random((40, 5)) < 0.5).repeat(size, axis=0)
    mask: Mask = kept_rows[:, columns] & (rng.random((4, 400)) < 0.5)[rows]
    return mask


def nested_cells(seed: int) -> Mask:
    """Cells that keep fewer and fewer of the same rows, from left to right."""
    rng = np.random.default_rng(seed)
    rows, columns = labels_of(333, 4), labels_of(400, 5)
    kept = [rng.random((333,)) < 0.9]
    for _ in range(4):
        kept.append(kept[-1] & (rng.random(333) < 0.7))
    mask: Mask = np.stack(kept, axis=1)[:, columns] & (rng.random((4, 400)) < 0.5)[rows]
    return mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [4, 8])
def test_an_order_that_serves_all_cells_is_found(size: int, seed: int) -> None:
    mask = shuffled(whole_cells(seed, size), seed)
    pivot = find_pivot(mask, BlockShape(size), seconds=0)
    assert (pivot.fill, pivot.kept) == (1.0, fewest(mask, size))
    mask = shuffled(nested_cells(seed), seed)
    found = found_strips(mask)
    assert found is not None
    bound = sum(fewest(mask[found[0] == strip], size) for strip in range(found[0].max() + 1))
    assert blocks_of(mask, strip_groups(mask, found, BlockShape(size))[0]) == bound
    pivot = find_pivot(mask, BlockShape(size), seconds=0)
    assert pivot.kept <= bound
    assert pivot.kind == "block-column-row"


@pytest.mark.parametrize("block", [BlockShape(8), BlockShape(4, 4), BlockShape(1, 4)])
def test_cells_that_want_different_orders_get_a_good_one(block: BlockShape) -> None:
    rows, columns = labels_of(500, 4), labels_of(450, 5)
    ordered = grid(rows, columns, 0.4, seed=5)
    pivot = find_pivot(shuffled(ordered, 5), block, seconds=0)
    as_planted = [Groups.chunks(np.arange(n), s) for n, s in ((500, block.rows), (450, block.cols))]
    before = int(row_lengths(ordered, *as_planted).sum())
    assert pivot.kind == "block-column-row"
    assert fewest(ordered, block.rows) / block.cols < pivot.kept < 0.65 * before
    again = find_pivot(shuffled(ordered, 5), block, seconds=0)
    np.testing.assert_array_equal(pivot.rows.order, again.rows.order)
