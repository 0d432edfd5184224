"""Structure that was planted in a mask and shuffled: found exactly, by counting and hashing.

Rows that are alike lie in one block row, columns that are alike in one block column, and parts of
the matrix that share neither rows nor columns are blocks on a diagonal. Rows and columns of noise
hide none of it: rows count as alike that share most of their columns, and the columns of each such
family are those that most of its rows have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .layout import BlockShape, IntArray
from .pivot_cells import by_support, find_strips, linked, strip_groups, with_none
from .pivot_groups import BoolArray, Grouping, Groups

# Rows are compared on so many columns, drawn at random: enough to tell families apart.
COMPARED_COLUMNS = 1024
# A mask of which one part takes more of the live rows is no diagonal of blocks.
LARGEST_PART = 0.9
# More rows than this are not compared with each other.
MOST_COMPARED = 8192
# Families must hold this share of the live rows: else there is no structure, but chance.
IN_FAMILIES = 0.5
# Families that are looked at for cells of a grid, and kinds of columns that cells make.
SAMPLED_FAMILIES, MANY_KINDS = 16, 1.5
# A kind of columns holds at least this share of its family's non-zeros: others are noise.
SHARE_OF_KIND = 0.03
# Seeds of the estimate of what grouping could bring.
SEEDS = 24


def find_planted(mask: BoolArray, block: BlockShape, seed: int = 0) -> Iterator[Grouping]:
    """Groupings of the structures found in a mask bool [N, K], the simplest first."""
    rows, columns = (np.asarray(mask.any(axis=axis)) for axis in (1, 0))
    if not (rows.all() and columns.all()):
        yield Grouping(_live_first(rows, block.rows), _live_first(columns, block.cols), DEAD)
    parts = diagonal_parts(mask)
    if parts is not None:
        yield Grouping(_by_label(parts[0], block.rows), _by_label(parts[1], block.cols), DIAGONAL)
    alike = equal_support(mask, block.rows)
    if block.cols > 1:
        yield Grouping(alike, equal_support(np.ascontiguousarray(mask.T), block.cols), PERMUTED)
    else:
        yield Grouping(alike, Groups.chunks(np.arange(mask.shape[1]), 1), EQUAL)
    shares = row_shares(mask, seed)
    if shares is None:
        return
    strips = find_strips(mask, shares, seed)
    if strips is not None:
        yield Grouping(*strip_groups(mask, strips, block, seed), COLUMN_ROW)
    labels = _similar(mask, shares)
    if labels is not None:
        yield from _families(mask, block, labels, seed)


DEAD = "dead rows and columns"
DIAGONAL = "block-diagonal"
PERMUTED = "permuted blocks"
EQUAL = "equal support"
COLUMN_ROW = "block-column-row"


def _live_first(live: BoolArray, size: int) -> Groups:
    lists = [np.flatnonzero(live).tolist(), np.flatnonzero(~live).tolist()]
    return Groups.of(lists, size, live.size)


def _by_label(labels: IntArray, size: int) -> Groups:
    """One list of neighbours for each label 0, 1, ...; those labelled -1 last."""
    lists = [np.flatnonzero(labels == label).tolist() for label in with_none(labels)]
    return Groups.of(lists, size, labels.size)


def diagonal_parts(mask: BoolArray) -> tuple[IntArray, IntArray] | None:
    """The part of each row and column where a mask [N, K] falls into parts, else None.

    Parts are numbered by their first rows; dead rows and columns are in none: -1. They are the
    connected components of the graph whose edges are the non-zeros.
    """
    live = np.flatnonzero(mask.any(axis=1))
    if live.size < 2 or _one_part(mask, live):
        return None
    n, k = mask.shape
    row, column = np.nonzero(mask)
    graph = coo_array((np.ones(row.size, np.int8), (row, column + n)), shape=(n + k, n + k))
    _, label = connected_components(graph, directed=False)
    _, first, inverse = np.unique(label[live], return_index=True, return_inverse=True)
    if first.size < 2 or np.bincount(inverse).max() > LARGEST_PART * live.size:
        return None
    number = np.full(n + k, -1, np.int32)
    number[label[live]] = np.argsort(np.argsort(first))[inverse]
    parts: IntArray = number[label]
    return parts[:n], parts[n:]


def _one_part(mask: BoolArray, live: npt.NDArray[np.intp]) -> bool:
    """Whether a few steps from the first live row already reach every other: most masks."""
    reached = mask[live[0]]
    for _ in range(3):
        rows = mask[:, reached].any(axis=1)
        if np.count_nonzero(rows) == live.size:
            return True
        reached = mask[rows].any(axis=0)
    return False


def equal_support(mask: BoolArray, size: int) -> Groups:
    """Groups of rows with the same non-zero columns.

    What is left of such rows makes a group of its own if it fills half of one. All other rows
    follow in their own order: so aligned blocks stay as they are, and blocks whose rows were
    shuffled, or lost some, are found again.
    """
    return _packed_classes(_classes(mask), size, mask.shape[0])


def _classes(mask: BoolArray) -> list[list[int]]:
    """Rows with the same non-zero columns, in the order of their first ones."""
    alike: dict[bytes, list[int]] = {}
    for row, support in enumerate(np.packbits(mask, axis=1)):
        alike.setdefault(support.tobytes(), []).append(row)
    return list(alike.values())


def _packed_classes(classes: list[list[int]], size: int, count: int) -> Groups:
    if len(classes) == count:  # none alike, as in most masks
        return Groups.chunks(np.arange(count), size)
    groups: list[list[int]] = []
    others: list[int] = []
    for rows in classes:
        full = len(rows) // size * size
        rest = rows[full:]
        groups.append(rows[:full])
        if 2 * len(rest) >= size > 1:
            groups.append(rest)
        else:
            others += rest
    return Groups.of([*groups, sorted(others)], size, count)


def _families(
    mask: BoolArray, block: BlockShape, labels: IntArray, seed: int
) -> Iterator[Grouping]:
    """Groupings of rows that share most of their columns, and of columns that do their rows."""
    if _has_cells(mask, labels):
        across = np.ascontiguousarray(mask.T)
        of_columns = similar_rows(across, seed)
        if of_columns is None:
            of_columns = np.zeros(mask.shape[1], np.int32)
        rows = _by_family(mask, labels, block.rows)
        yield Grouping(rows, _by_family(across, of_columns, block.cols), COLUMN_ROW)
        return
    common = family_supports(mask, labels)
    columns = _classes(np.ascontiguousarray(common.T))
    sure = np.zeros(mask.shape[1], np.bool_)
    for members in columns:
        # Columns that no family has together may be noise.
        sure[members] = (len(members) > 1 or block.cols == 1) and common[:, members[0]].any()
    # Noise aside, the rows of a block are equal again.
    classes = _classes(mask & sure)
    classes.sort(key=lambda rows: (labels[rows[0]] < 0, labels[rows[0]]))
    rows = _packed_classes(classes, block.rows, mask.shape[0])
    grouped = _packed_classes(columns, block.cols, mask.shape[1])
    several = common.shape[0] > 1 and common.sum(axis=0).max() == 1
    kind = DIAGONAL if several else PERMUTED if block.cols > 1 else EQUAL
    yield Grouping(rows, grouped, kind)
    yield Grouping(_by_label(labels, block.rows), grouped, kind)


def _has_cells(mask: BoolArray, labels: IntArray) -> bool:
    """Whether families of rows have few kinds of columns each, but more than one.

    So it is where each cell of a coarse grid keeps some of its rows and some of its columns.
    """
    families = min(int(labels.max()) + 1, SAMPLED_FAMILIES)
    kinds = []
    for family in range(families):
        part = mask[labels == family]
        part = part[:, part.any(axis=0)]
        patterns = np.packbits(part, axis=0)
        _, kind, times = np.unique(patterns, axis=1, return_inverse=True, return_counts=True)
        if 2 * times[times > 1].sum() < part.shape[1]:
            return False
        weight = np.bincount(kind.ravel(), part.sum(axis=0))
        kinds.append(np.count_nonzero(weight > SHARE_OF_KIND * part.sum()))
    return float(np.mean(kinds)) >= MANY_KINDS


def _by_family(mask: BoolArray, labels: IntArray, size: int) -> Groups:
    """The rows family by family: those with equal columns, then what is left of such rows."""
    lists: list[list[int]] = []
    for family in with_none(labels):
        rows = np.flatnonzero(labels == family)
        groups = by_support(mask[rows], size)
        lists += [rows[g[g < rows.size]].tolist() for g in groups.members]
    return Groups.of(lists, size, labels.size)


def similar_rows(mask: BoolArray, seed: int = 0) -> IntArray | None:
    """The family of each row of a mask [N, K], -1 for rows in none; None where few are in any.

    Rows of one family share more columns than chance has them share, directly or through others.
    Families are numbered by their first rows.
    """
    shares = row_shares(mask, seed)
    return None if shares is None else _similar(mask, shares)


def row_shares(mask: BoolArray, seed: int) -> npt.NDArray[np.float32] | None:
    """Of the columns that one of two rows has, those that both have: [N, N], 0 with itself.

    About, where there are many columns; None where there are too few rows, or too many.
    """
    n, k = mask.shape
    if n < 2 or n > MOST_COMPARED:
        return None
    drawn = np.sort(np.random.default_rng(seed).permutation(k)[:COMPARED_COLUMNS])
    part = mask[:, drawn].astype(np.float32)
    count = part.sum(axis=1)
    either = part @ part.T
    shares = either.copy()
    np.subtract(count[:, None] + count, either, out=either)
    np.divide(shares, np.maximum(either, 1), out=shares)
    np.fill_diagonal(shares, 0)
    return shares


def _similar(mask: BoolArray, shares: npt.NDArray[np.float32]) -> IntArray | None:
    density = float(mask.mean())
    chance = density / (2 - density)
    labels = linked(shares >= (1 + 2 * chance) / 3)
    live = int(np.count_nonzero(mask.any(axis=1)))
    inside = labels[labels >= 0]
    if inside.size < max(2.0, IN_FAMILIES * live) or np.bincount(inside).max() == live:
        return None
    return labels


def family_supports(mask: BoolArray, labels: IntArray) -> BoolArray:
    """The columns that most rows of each family have: bool [families, K]."""
    inside = np.flatnonzero(labels >= 0)
    families = int(labels.max(initial=-1)) + 1
    member = np.zeros((families, inside.size), np.float32)
    member[labels[inside], np.arange(inside.size)] = 1
    votes = member @ mask[inside].astype(np.float32)
    common: BoolArray = 2 * votes > member.sum(axis=1)[:, None]
    return common


def optimistic_fills(mask: BoolArray, sizes: Sequence[int], seed: int = 0) -> dict[int, float]:
    """About the best fill of R x 1 blocks that an order of the rows could reach, for each R.

    Some rows, dense ones and others, each gather the rows that suit them best, as if no other row
    wanted those: all rows together get less, on any mask without structure.
    """
    rng = np.random.default_rng(seed)
    live = np.flatnonzero(mask.any(axis=1))
    drawn = np.sort(rng.permutation(mask.shape[1])[: COMPARED_COLUMNS // 2])
    part = mask[np.ix_(live, drawn)].astype(np.float32)
    if not part.any():
        return dict.fromkeys(sizes, 1.0)
    count = part.sum(axis=1)
    seeds = np.argsort(-count, kind="stable")[:: -(-live.size // SEEDS)]
    number = np.arange(seeds.size)
    union, total = part[seeds], count[seeds]
    free = np.ones((seeds.size, live.size), np.bool_)
    free[number, seeds] = False
    fills = {}
    for size in range(1, min(max(sizes), live.size) + 1):
        if size > 1:
            held = union.sum(axis=1)[:, None] + count - union @ part.T
            score = (total[:, None] + count) / np.maximum(held, 1)
            best = np.argmax(np.where(free, score, -1), axis=1)
            free[number, best] = False
            total = total + count[best]
            union = np.maximum(union, part[best])
        fills[size] = float(total.sum() / max(size * union.sum(), 1))
    return {size: fills.get(size, fills[max(fills)]) for size in sizes}
