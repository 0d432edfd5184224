"""Block-column-row masks: a grid of cells, each of which lost whole rows and whole columns.

Rows of one strip of cells have, within each strip of columns, the same columns or none; and columns
of one strip have the same rows or none within each strip of rows. So strips of the one side are
found by hashing where those of the other are known: what is equal there, hardly by chance, belongs
together. That goes back and forth, from rows that share most of their columns, until nothing
changes, and counts only if in the end every cell is exactly what it should be.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import gammaln

from .layout import BlockShape, IntArray
from .pivot_groups import BoolArray, Groups, merged
from .pivot_search import Budget, search_groups

# Rows are taken for a part of one strip if they share so much of their columns: the first share
# that leads to a grid counts. Rows of two strips share more where cells lost little, and rows of
# one strip less where there are many cells.
SHARES = (0.5, 0.7, 0.85, 0.35, 0.25)
# A pattern tells strips apart if it is one of 2 ** bits with as many rows. First the sure ones are
# followed, then more, as long as it fits.
BITS = (20.0, 10.0, 5.0)
# Turns of rows and columns with each of them.
TURNS = 6
# A grid must hold this share of the rows and columns that have non-zeros.
IN_STRIPS = 0.5
# Rows or columns of a strip, on the average: any mask is a grid of narrow ones.
WIDE = 4
# Steps of the search within a strip.
STEPS = 200
Longs = npt.NDArray[np.int64]


def find_strips(
    mask: BoolArray, shares: npt.NDArray[np.float32], seed: int = 0
) -> tuple[IntArray, IntArray] | None:
    """The strips of rows and columns of a block-column-row mask; None where it is not one.

    The grid may be in any order, its strips of any heights and widths: each cell that two strips
    make is exactly all of its kept rows by all of its kept columns. Rows and columns that nothing
    but chance could put into a strip are in none: those without non-zeros, and a few at most whose
    cells are of few rows or columns. One strip of the grid may be found in two parts that share
    neither rows nor columns.

    Args:
        mask: bool [N, K].
        shares: [N, N], columns that two rows share, of those that one of them has.
        seed: of the hashes.

    Returns:
        int32 [N] and [K]: the strip of each, -1 for those in none.
    """
    rng = np.random.default_rng(seed)
    live = [np.count_nonzero(mask.any(axis=axis)) for axis in (1, 0)]
    down = csr_array(mask.astype(np.int64))
    across = csr_array(down.T)
    best: tuple[IntArray, IntArray] | None = None
    for share in SHARES:
        found = _grid(down, across, linked(shares >= share), rng)
        if found is not None and all(
            _inside(labels) >= IN_STRIPS * count for labels, count in zip(found, live, strict=True)
        ):
            if found[0].max() > 0:
                return found
            best = best or found  # one strip of rows: only if there is no other way to see it
    return best


def _inside(labels: IntArray) -> int:
    return int(np.count_nonzero(labels >= 0))


def _grid(
    down: csr_array, across: csr_array, rows: IntArray, rng: np.random.Generator
) -> tuple[IntArray, IntArray] | None:
    """The strips that parts of some of them lead to, if they are a grid."""
    best: tuple[IntArray, IntArray] | None = None
    for bits in BITS:
        strips = _settled(down, across, rows, bits, rng)
        if strips is not None and _is_grid(across, *strips, rng):
            best, rows = strips, strips[0]
        elif best is not None:
            break
    return None if best is None else _completed(down, across, *best, rng)


def _settled(
    down: csr_array, across: csr_array, rows: IntArray, bits: float, rng: np.random.Generator
) -> tuple[IntArray, IntArray] | None:
    """Strips after as many turns as find more."""
    best: tuple[IntArray, IntArray] | None = None
    for _ in range(TURNS):
        columns = _alike(across, rows, bits, rng)
        if not _is_wide(columns):
            break
        rows = _alike(down, columns, bits, rng)
        if rows.max(initial=-1) < 0:
            # Nothing tells rows apart: they may all be in one strip.
            rows = np.where(np.diff(down.indptr) > 0, 0, -1).astype(np.int32)
        if not _is_wide(rows):
            break
        if best is not None and _inside(rows) + _inside(columns) <= sum(map(_inside, best)):
            break
        best = rows, columns
    return best


def _is_wide(labels: IntArray) -> bool:
    return _inside(labels) >= WIDE * max(1, int(labels.max(initial=-1)) + 1)


def _completed(
    down: csr_array,
    across: csr_array,
    rows: IntArray,
    columns: IntArray,
    rng: np.random.Generator,
) -> tuple[IntArray, IntArray]:
    """The grid with what is in no strip in one more, where that is a grid again.

    So it is where cells lost no rows that have other cells, or no such columns.
    """
    more_columns = _with_rest(columns, across)
    more_rows = _alike(down, more_columns, BITS[0], rng)
    if _inside(more_rows) >= _inside(rows) and _is_grid(across, more_rows, more_columns, rng):
        rows, columns = more_rows, more_columns
    more_rows = _with_rest(rows, down)
    more_columns = _alike(across, more_rows, BITS[0], rng)
    if _inside(more_columns) >= _inside(columns) and _is_grid(across, more_rows, more_columns, rng):
        rows, columns = more_rows, more_columns
    return rows, columns


def _with_rest(labels: IntArray, cells: csr_array) -> IntArray:
    """The labels, and one more for those without that have non-zeros."""
    rest = (labels < 0) & (np.diff(cells.indptr) > 0)
    return np.where(rest, labels.max() + 1, labels).astype(np.int32)


def _hashes(
    cells: csr_array, labels: IntArray, rng: np.random.Generator
) -> tuple[Longs, Longs, Longs]:
    """A hash of each row's columns within each strip, how many they are, and the strips' widths.

    Args:
        cells: 0 or 1, [N, K].
        labels: [K], the strips of columns.

    Returns:
        int64 [N, strips], 0 where there are none; [N, strips]; [strips].
    """
    inside = np.flatnonzero(labels >= 0)
    shape = (labels.size, int(labels.max()) + 1)
    # Sums of fewer than 2 ** 20 numbers: two patterns have the same one out of 2 ** 43 times.
    numbers = rng.integers(1, 1 << 43, inside.size)
    sums, counts = (
        (cells @ csr_array((values, (inside, labels[inside])), shape=shape)).toarray()
        for values in (numbers, np.ones_like(numbers))
    )
    return sums, counts, np.bincount(labels[inside])


def _alike(cells: csr_array, labels: IntArray, bits: float, rng: np.random.Generator) -> IntArray:
    """The strips of rows, given those of columns; -1 where patterns do not say."""
    labels = _told_apart(labels, bits)
    if labels.max(initial=-1) < 0:
        return np.full(cells.shape[0], -1, np.int32)
    sums, counts, width = _hashes(cells, labels, rng)
    ways = gammaln(width + 1) - gammaln(counts + 1) - gammaln(width - counts + 1)
    row, strip = np.nonzero((ways >= bits * np.log(2)) & (counts > 0))
    _, pattern = np.unique(np.stack([strip, sums[row, strip]]), axis=1, return_inverse=True)
    n = cells.shape[0]
    size = n + int(pattern.max(initial=-1)) + 1
    graph = coo_array((np.ones(row.size, np.int8), (row, n + pattern.ravel())), shape=(size, size))
    _, label = connected_components(graph, directed=False)
    some = np.zeros(n, np.bool_)
    some[row] = True
    return numbered(label[:n], some)


def _told_apart(labels: IntArray, bits: float) -> IntArray:
    """The strips that are wide enough for patterns of so many bits."""
    return numbered(labels, (labels >= 0) & (np.bincount(labels + 1)[labels + 1] >= bits))


def _is_grid(
    across: csr_array, rows: IntArray, columns: IntArray, rng: np.random.Generator
) -> bool:
    """Whether the columns of each strip have the same rows, or none, in each strip of rows."""
    sums, _, _ = _hashes(across, rows, rng)
    column, strip = np.nonzero((sums > 0) & (columns >= 0)[:, None])
    cell = np.stack([columns[column], strip])
    pattern = np.stack([*cell, sums[column, strip]])
    return len(np.unique(pattern, axis=1).T) == len(np.unique(cell, axis=1).T)


def linked(alike: BoolArray) -> IntArray:
    """Parts of rows that are alike [N, N], directly or through others; -1 for those that are alone.

    Parts are numbered by their first rows.
    """
    row, other = np.nonzero(alike)
    graph = coo_array((np.ones(row.size, np.int8), (row, other)), shape=alike.shape)
    _, label = connected_components(graph, directed=False)
    return numbered(label, np.bincount(label)[label] > 1)


def numbered(labels: npt.NDArray[np.integer], some: BoolArray) -> IntArray:
    """The labels of some rows numbered anew, by the first of each, and -1 for all others."""
    found = np.full(labels.size, -1, np.int32)
    _, first, inverse = np.unique(labels[some], return_index=True, return_inverse=True)
    found[some] = np.argsort(np.argsort(first))[inverse]
    return found


def strip_groups(
    mask: BoolArray, strips: tuple[IntArray, IntArray], block: BlockShape, seed: int = 0
) -> tuple[Groups, Groups]:
    """Groups of the rows and columns of a block-column-row mask, strip by strip.

    Cells beside each other may keep different rows of their strip, and all of them get the same
    order: rows that the same cells keep are put together, and what is left of those beside rows
    with more. That is optimal within a strip, where each column with m non-zeros then lies in m / R
    blocks, rounded up, if

    - rows that the same cells keep are multiples of the block's, or
    - each cell keeps all rows that the next one keeps.

    In other strips no order serves every cell. There the best groups are searched for a while, and
    nothing is known of them but that they are no worse.

    Args:
        mask: bool [N, K].
        strips: as `find_strips` has them.
        block: R x C.
        seed: of the search.
    """
    rng = np.random.default_rng(seed)
    rows = _strip_groups(mask, strips[0], block.rows, rng)
    if block.cols == 1:
        return rows, Groups.chunks(np.arange(mask.shape[1]), 1)
    across = np.ascontiguousarray(merged(mask, rows).T > 0)
    return rows, _strip_groups(across, strips[1], block.cols, rng)


def _strip_groups(mask: BoolArray, labels: IntArray, size: int, rng: np.random.Generator) -> Groups:
    lists: list[list[int]] = []
    for strip in with_none(labels):
        rows = np.flatnonzero(labels == strip)
        part = mask[rows]
        groups = by_support(part, size)
        if strip >= 0 and _blocks(part, groups) > _fewest(part, size):
            part = np.ascontiguousarray(part[:, part.any(axis=0)])
            columns = Groups.chunks(np.arange(part.shape[1]), 1)
            found, _ = search_groups(part, groups, columns, Budget(STEPS), rng)
            groups = min(groups, found, key=lambda g: _blocks(part, g))
        lists += [rows[g[g < rows.size]].tolist() for g in groups.members]
    return Groups.of(lists, size, labels.size)


def _blocks(mask: BoolArray, groups: Groups) -> int:
    return int(np.count_nonzero(merged(mask, groups)))


def _fewest(mask: BoolArray, size: int) -> int:
    """Blocks that no order of the rows can do without."""
    return int((-(-np.count_nonzero(mask, axis=0) // size)).sum())


def with_none(labels: IntArray) -> Iterator[int]:
    """All labels, and -1 last."""
    yield from range(int(labels.max(initial=-1)) + 1)
    yield -1


def by_support(mask: BoolArray, size: int) -> Groups:
    """Groups of rows with equal columns, then of what is left of them, more columns first."""
    supports = np.packbits(mask, axis=1)
    order = np.lexsort(~supports.T[::-1])
    changes = (np.diff(supports[order], axis=0) != 0).any(axis=1)
    lists, left = list[list[int]](), list[int]()
    for alike in np.split(order, np.flatnonzero(changes) + 1):
        full = alike.size // size * size
        lists.append(alike[:full].tolist())
        left += alike[full:].tolist()
    return Groups.of([*lists, left], size, mask.shape[0])
