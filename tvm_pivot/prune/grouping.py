"""Which rows share their blocks: groups of rows whose best blocks keep the most saliency.

NumPy only. A *grouping* is an int32 array [N] that holds the row block of each row. A *part* is a
saliency matrix over the same rows whose blocks compete with each other: one layer's own, or one of
several layers that must agree on the order of their channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..layout import FloatArray, IntArray, Permutation

# Partners that are tried exactly for each row, fewer where that means more numbers than this.
CANDIDATES = range(6, 33)
NUMBERS = 1 << 16
SWEEPS = 4  # over all rows
# The share of what two row blocks are worth that a swap must gain: more than rounding, and in
# groups that training has adapted to, more than the noise of training.
LEAST_GAIN, INERTIA = 1e-5, 0.05


@dataclass(frozen=True, eq=False)
class Part:
    """Saliency that a grouping is chosen for.

    Attributes:
        saliency: float32 [N, K], not negative.
        kept: how many of its blocks (row block x column) may stay.
    """

    saliency: FloatArray
    kept: int


def natural_groups(rows: int, size: int) -> IntArray:
    """Neighbours together, `size` rows to a block, the last one shorter: int32 [rows]."""
    grouping: IntArray = (np.arange(rows) // size).astype(np.int32)
    return grouping


def group_order(grouping: IntArray) -> Permutation:
    """The order of rows in which the row blocks of a grouping are neighbours."""
    return Permutation(np.argsort(grouping, kind="stable").astype(np.int32))


def block_sums(matrix: FloatArray, grouping: IntArray) -> FloatArray:
    """Sums over the rows of each row block: float32 [blocks, K] for `matrix` [N, K]."""
    order = np.argsort(grouping, kind="stable")
    first = np.searchsorted(grouping[order], np.arange(int(grouping.max()) + 1))
    sums: FloatArray = np.add.reduceat(matrix[order], first, axis=0)
    return sums


def largest(scores: FloatArray, count: int) -> npt.NDArray[np.bool_]:
    """Marks exactly `count` entries, none smaller than an unmarked one; ties go to earlier ones."""
    flat = scores.ravel()
    marked = np.zeros(flat.size, bool)
    marked[np.argsort(-flat, kind="stable")[:count]] = True
    return marked.reshape(scores.shape)


def retained(parts: Sequence[Part], grouping: IntArray) -> float:
    """The share of its saliency that the best blocks of each part keep, summed over the parts."""
    total = 0.0
    for part in parts:
        sums = block_sums(part.saliency, grouping).ravel()
        best = np.partition(sums, sums.size - part.kept)[sums.size - part.kept :]
        whole = float(part.saliency.sum(dtype=np.float64))
        total += float(best.sum(dtype=np.float64)) / whole if whole > 0 else 0.0
    return total


def group_rows(
    parts: Sequence[Part],
    size: int,
    *,
    start: IntArray | None = None,
    adapted: bool = False,
    seed: int = 0,
) -> IntArray:
    """Groups of `size` rows that keep the most saliency; never worse than `start`, or neighbours.

    Grows groups around the strongest rows, then swaps rows between groups as long as that gains,
    the thresholds of the kept blocks adapted after each sweep. The same arguments give the same
    groups.

    Args:
        parts: what counts, all with the same number of rows N; 1 <= kept <= blocks in each.
        size: rows per block; the last block is shorter where N is not divisible.
        start: a grouping to improve on too, int32 [N], with blocks of the same sizes.
        adapted: only swap rows of `start`, and only where that gains much.
        seed: the order in which rows are visited.

    Returns:
        int32 [N]: the row block of each row.
    """
    rows = parts[0].saliency.shape[0]
    natural = natural_groups(rows, size)
    if size == 1 or rows <= size:
        return natural
    matrix, share = _joined(parts)
    if matrix.shape[1] == 0:
        return natural
    rng = np.random.default_rng(seed)
    first = natural if start is None else start
    if adapted:
        return _swapped(parts, matrix, first.copy(), rng, INERTIA)
    starts = [first, _grown(matrix, share, size)]
    found = [_swapped(parts, matrix, grouping.copy(), rng, LEAST_GAIN) for grouping in starts]
    # The first of equals: groups that stay as they are keep what training has adapted to.
    return max([starts[0], *found, natural], key=lambda grouping: retained(parts, grouping))


def _joined(parts: Sequence[Part]) -> tuple[FloatArray, FloatArray]:
    """The parts side by side, each of sum 1, and the share of blocks kept per column."""
    scaled, shares = [], []
    for part in parts:
        rows, columns = part.saliency.shape
        total = float(part.saliency.sum(dtype=np.float64))
        scaled.append(part.saliency / np.float32(total) if total > 0 else part.saliency)
        shares.append(np.full(columns, part.kept / max(rows * columns, 1), np.float32))
    return np.concatenate(scaled, axis=1).astype(np.float32), np.concatenate(shares)


def _grown(matrix: FloatArray, share: FloatArray, size: int) -> IntArray:
    """Groups that grow around the strongest row left, by the rows strong where it is."""
    rows, columns = matrix.shape
    grouping = np.zeros(rows, np.int32)
    wanted = min(columns, max(1, round(float(share.sum()) * size)))
    norms = matrix.sum(axis=1)
    # A strong row would fit everywhere: what it has at an average column does not count.
    expected = norms * np.float32(wanted / columns)
    free = np.ones(rows, bool)
    for row_block in range(-(-rows // size)):
        seed = int(np.argmax(np.where(free, norms, -1.0)))
        profile = matrix[seed].copy()
        free[seed] = False
        grouping[seed] = row_block
        for _ in range(min(size - 1, int(free.sum()))):
            marks = np.zeros(columns, np.float32)
            marks[np.argpartition(profile, columns - wanted)[columns - wanted :]] = 1
            gain = np.where(free, matrix @ marks - expected, -np.inf)
            row = int(np.argmax(gain))
            free[row] = False
            grouping[row] = row_block
            profile += matrix[row]
    return grouping


def _thresholds(parts: Sequence[Part], grouping: IntArray, sums: FloatArray) -> FloatArray:
    """What a block of each column must be worth to be kept: float32 [K]."""
    limits, first = [], 0
    for part in parts:
        columns = part.saliency.shape[1]
        flat = sums[:, first : first + columns].ravel()
        limit = np.partition(flat, flat.size - part.kept)[flat.size - part.kept]
        limits.append(np.full(columns, limit, np.float32))
        first += columns
    return np.concatenate(limits)


def _swapped(
    parts: Sequence[Part],
    matrix: FloatArray,
    grouping: IntArray,
    rng: np.random.Generator,
    least: float,
) -> IntArray:
    """Rows swapped between groups while what lies above the thresholds grows."""
    best, most = grouping.copy(), retained(parts, grouping)
    for _ in range(SWEEPS):
        sums = block_sums(matrix, grouping)
        limit = _thresholds(parts, grouping, sums)
        excess = sums - limit
        worth = np.maximum(excess, 0).sum(axis=1)
        gain = matrix @ (excess >= 0).astype(np.float32).T
        moves = 0
        for row in rng.permutation(len(grouping)):
            moves += _swap(matrix, grouping, excess, worth, gain, int(row), least)
        value = retained(parts, grouping)
        if value > most:
            best, most = grouping.copy(), value
        elif moves:
            break  # the thresholds moved against it
        if not moves:
            break
    return best


def _swap(
    matrix: FloatArray,
    grouping: IntArray,
    excess: FloatArray,
    worth: FloatArray,
    gain: FloatArray,
    row: int,
    least: float,
) -> bool:
    """Swap `row` with the partner that gains most, if any does; updates everything but `gain`.

    Args:
        matrix: [N, K].
        grouping: [N].
        excess: [blocks, K], block sums above the thresholds.
        worth: [blocks], the sum of what is positive there.
        gain: [N, blocks], what a row brings to the kept blocks of each row block, roughly.
        row: the row that looks for a partner.
        least: what a swap must gain, as a share of what the two row blocks are worth.
    """
    here = grouping[row]
    others = np.flatnonzero(grouping != here)
    most = min(max(NUMBERS // matrix.shape[1], CANDIDATES.start), CANDIDATES.stop - 1)
    if others.size > most:
        there = grouping[others]
        rough = gain[row, there] - gain[others, there] + gain[others, here]
        others = others[np.argpartition(-rough, most)[:most]]
    if not others.size:
        return False
    there = grouping[others]
    change = matrix[others] - matrix[row]
    mine = np.maximum(excess[here] + change, 0).sum(axis=1)
    theirs = np.maximum(excess[there] - change, 0).sum(axis=1)
    gained = mine + theirs - worth[here] - worth[there]
    pick = int(np.argmax(gained))
    if gained[pick] <= least * (worth[here] + worth[there[pick]]):
        return False
    excess[here] += change[pick]
    excess[there[pick]] -= change[pick]
    worth[here], worth[there[pick]] = mine[pick], theirs[pick]
    grouping[row], grouping[others[pick]] = there[pick], here
    return True
