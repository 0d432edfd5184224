"""Pivoting: orders of rows and columns that gather the non-zeros of a weight matrix into blocks.

A kernel writes its output rows through a table, so a row order that serves one layer only (a
local pivot) costs nothing at run time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .layout import BlockShape, IntArray, Permutation, Scalar
from .pivot_groups import AS_IT_IS, BoolArray, Cost, Grouping, Groups, kept_slots, row_lengths
from .pivot_planted import equal_support, find_planted
from .pivot_search import Budget, grown_both, search_groups

# Steps of the general search, and of one that only improves what was found already.
STEPS, POLISH_STEPS = 400, 100
# A step moves one row of each block: blocks taller than this need more, up to so many times.
SHORT, MOST_TIMES = 4, 4
# Masks of so few row blocks times columns are searched so often: luck plays a part.
RESTARTED, RESTARTS = 1 << 15, 4
LONGEST_SIDE = 255  # what the counts of the search can hold
SECONDS = 5.0
SEARCHED = "searched"
# Blocks that are filled like this need no search from scratch.
ALMOST_FULL = 0.9
# A pivot is called after the structure that brought this share of its gain.
MOST = 0.8


@dataclass(frozen=True, eq=False)
class Pivot:
    """Orders of a matrix's rows and columns, and the blocks that its non-zeros then lie in.

    Attributes:
        rows, columns: the orders.
        block: R x C.
        heights: int32 [row blocks], how many rows each row block holds, up to R, in their order.
        widths: int32 [column blocks], the same of columns, up to C.
        kept: blocks that hold a non-zero.
        fill: non-zeros per slot of them, R * C slots each.
        kind: what was found: ``"block-diagonal"``, ``"block-column-row"``,
            ``"permuted blocks"``, ``"equal support"``, ``"dead rows and columns"``,
            ``"searched"``, or ``"as it is"``.
    """

    rows: Permutation
    columns: Permutation
    block: BlockShape
    heights: IntArray
    widths: IntArray
    kept: int
    fill: float
    kind: str

    def apply(self, matrix: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """A matrix [N, K] in these orders."""
        return self.columns.apply(self.rows.apply(matrix), axis=1)

    def undo(self, matrix: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """The matrix that `apply` was given, bit for bit."""
        return self.columns.inverse().apply(self.rows.inverse().apply(matrix), axis=1)

    def slots(self) -> IntArray:
        """The row in each slot of the row blocks, as `pack` takes it: int32 [row blocks * R].

        Blocks of fewer rows repeat their last one.
        """
        first = np.cumsum(self.heights) - self.heights
        place = np.minimum(np.arange(self.block.rows), self.heights[:, None] - 1)
        slots: IntArray = self.rows.order[first[:, None] + place].ravel()
        return slots


def find_pivot(
    matrix: npt.NDArray[np.generic],
    block: BlockShape,
    *,
    seconds: float = SECONDS,
    seed: int = 0,
    cost: Cost = kept_slots,
) -> Pivot:
    """The best orders found for a weight matrix: never worse than the one it has.

    Planted structure is looked for first, whatever the time; then follows a general search. The
    same arguments give the same pivot as long as steps end the search and not `seconds`.

    Args:
        matrix: [N, K], weights or a mask; what is not zero is kept.
        block: R x C.
        seconds: when the general search stops at the latest. 0: no general search.
        seed: of the search.
        cost: from the kept blocks of every row block, int64 [row blocks], to a predicted time.

    Raises:
        ValueError: `matrix` is not a matrix, or a side of the block is longer than 255.
    """
    if matrix.ndim != 2 or max(block.rows, block.cols) > LONGEST_SIDE:
        raise ValueError(f"no pivot of shape {matrix.shape} into {block} blocks")
    until = time.perf_counter() + seconds
    mask = np.ascontiguousarray(matrix != 0)
    best = Grouping.natural(mask.shape, block)
    if 0 in mask.shape:
        return _pivot(mask, best, block)
    natural = lowest = cost(row_lengths(mask, best.rows, best.columns))
    for found in find_planted(mask, block, seed):
        best, lowest = _better(mask, found, best, lowest, cost)
        if _fill(mask, best, block) == 1.0:
            break
    planted, gained = best, natural - lowest
    if seconds > 0 and _fill(mask, best, block) < 1.0:
        for found in _searched(mask, best, block, until, seed):
            best, lowest = _better(mask, found, best, lowest, cost)
    if gained > 0 and gained >= MOST * (natural - lowest):
        best = replace(best, kind=planted.kind)
    return _pivot(mask, best, block)


def _searched(
    mask: BoolArray, best: Grouping, block: BlockShape, until: float, seed: int
) -> Iterator[Grouping]:
    """What is found from the best grouping so far, and from scratch."""
    rng = np.random.default_rng(seed)
    if best.kind != AS_IT_IS:
        budget = Budget(POLISH_STEPS, until)
        found = search_groups(mask, best.rows, best.columns, budget, rng, soft=False)
        yield Grouping(*found, SEARCHED)
    if _fill(mask, best, block) < ALMOST_FULL:
        soft = block.rows * block.cols > 2  # pairs are found as well without
        for start, steps in _starts(mask, block, rng):
            found = search_groups(mask, *start, Budget(steps, until), rng, soft)
            yield Grouping(*found, SEARCHED)


def _starts(
    mask: BoolArray, block: BlockShape, rng: np.random.Generator
) -> Iterator[tuple[tuple[Groups, Groups], int]]:
    """Where the general search begins, and the steps that it takes from there."""
    grown = grown_both(mask, block.rows, block.cols)
    again = mask.size <= RESTARTED * block.rows
    if block.cols > 1:  # rows and columns share the steps
        yield from ((grown, 2 * STEPS) for _ in range(RESTARTS if again else 1))
        return
    steps = STEPS * min(MOST_TIMES, max(1, block.rows // SHORT))
    if not again:
        yield grown, steps
        return
    # Half of the restarts are better spent on more steps, and a random start on masks on which
    # greedy growth goes wrong.
    yield grown, RESTARTS // 2 * steps
    yield (
        (Groups.chunks(rng.permutation(mask.shape[0]), block.rows), grown[1]),
        RESTARTS // 2 * steps,
    )


def _better(
    mask: BoolArray, found: Grouping, best: Grouping, lowest: float, cost: Cost
) -> tuple[Grouping, float]:
    """The cheaper of two groupings, and its cost."""
    found = Grouping(found.rows.tidied(), found.columns.tidied(), found.kind)
    price = cost(row_lengths(mask, found.rows, found.columns))
    return (found, price) if price < lowest else (best, lowest)


def _fill(mask: BoolArray, found: Grouping, block: BlockShape) -> float:
    slots = int(row_lengths(mask, found.rows, found.columns).sum()) * block.rows * block.cols
    return int(np.count_nonzero(mask)) / slots if slots else 1.0


def _pivot(mask: BoolArray, found: Grouping, block: BlockShape) -> Pivot:
    rows, columns = found.rows, found.columns
    return Pivot(
        rows=Permutation(rows.order),
        columns=Permutation(columns.order),
        block=block,
        heights=rows.heights,
        widths=columns.heights,
        kept=int(row_lengths(mask, rows, columns).sum()),
        fill=_fill(mask, found, block),
        kind=found.kind,
    )


def gather_rows(mask: BoolArray, block_rows: int) -> IntArray:
    """Slots of row blocks that hold rows with the same non-zero columns together.

    See `equal_support`. Rows of a block that is not full are followed by its last one again.

    Args:
        mask: [N, K], where the weights are non-zero.
        block_rows: R.

    Returns:
        int32 [blocks * R]: the row in each slot; every row at least once.
    """
    if block_rows == 1:
        return np.arange(mask.shape[0], dtype=np.int32)
    return equal_support(mask, block_rows).slots()


def natural_rows(count: int, block_rows: int) -> IntArray:
    """Slots of row blocks in the matrix's own order, the last row repeated to fill the last."""
    slots = np.arange(-(-count // block_rows) * block_rows, dtype=np.int32)
    return np.minimum(slots, max(count - 1, 0)).astype(np.int32)
