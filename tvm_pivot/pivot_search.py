"""The general search for blocks: many rows change places at once, by linear assignment.

Each step takes one row out of every row block and puts all of them back the best way, which a
linear assignment finds exactly; so no step makes things worse. Columns take turns with rows where
blocks are wider than one. A kept block costs 1, however few non-zeros it holds, so most moves
change nothing at first: the search begins with the potential ``1 - a ** nonzeros``, which rewards
emptying blocks little by little, and lets `a` fall to 0, where it counts kept blocks.

The idea of moving by assignment is that of reorderings before block pruning (TETRIS, channel
permutations for N:M sparsity), which swap pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from .pivot_groups import BoolArray, Groups, merged

# How the potential's base falls from step to step, as shares of the steps; then it is 0.
BASES = (0.4, 0.2)
SOFT_SHARE = 0.6
# Growing groups takes as many multiplications as rows x rows x columns: no more than these.
MOST_GROWN = 1 << 33
# How often rows and columns take turns, with each base.
TURNS = 8
# Steps without gain after which the last part ends, for each row that a block holds.
PATIENCE = 24
# Row blocks that one assignment looks at: its time grows with the third power.
MOST_BLOCKS = 256


@dataclass
class Budget:
    """What a search may spend.

    Attributes:
        steps: assignments.
        until: `time.perf_counter()` at which it stops all the same.
    """

    steps: int
    until: float = float("inf")

    @property
    def spent(self) -> bool:
        return time.perf_counter() >= self.until


def grown_groups(mask: BoolArray, size: int) -> Groups:
    """Groups that grow by the row most similar (Jaccard) to what they hold, dense rows first."""
    count = np.count_nonzero(mask, axis=1).astype(np.float32)
    dense = np.argsort(-count, kind="stable")
    if mask.shape[0] * mask.size > MOST_GROWN:
        return Groups.chunks(dense, size)
    weights = mask.astype(np.float32)
    free = np.ones(count.size, np.bool_)
    order: list[int] = []
    for first in dense:
        if not free[first]:
            continue
        best, held = int(first), np.zeros_like(weights[0])
        for _ in range(min(size, count.size - len(order))):
            free[best] = False
            order.append(best)
            np.maximum(held, weights[best], out=held)
            shared = weights @ held
            similar = shared / np.maximum(count + held.sum() - shared, 1)
            best = int(np.argmax(np.where(free, similar, -1)))
    return Groups.chunks(order, size)


def grown_both(mask: BoolArray, rows: int, cols: int) -> tuple[Groups, Groups]:
    """Grown groups of rows and, where blocks are wider than one column, of columns by turns."""
    if cols == 1:
        return grown_groups(mask, rows), Groups.chunks(np.arange(mask.shape[1]), 1)
    across = np.ascontiguousarray(mask.T)
    of_rows = grown_groups(mask, rows)
    columns = grown_groups(np.ascontiguousarray(merged(mask, of_rows).T > 0), cols)
    return grown_groups(np.ascontiguousarray(merged(across, columns).T > 0), rows), columns


def search_groups(
    mask: BoolArray,
    rows: Groups,
    columns: Groups,
    budget: Budget,
    rng: np.random.Generator,
    soft: bool = True,
) -> tuple[Groups, Groups]:
    """Row and column groups with as few kept blocks as the budget finds.

    Args:
        mask: bool [N, K].
        rows, columns: where the search starts.
        budget: steps and time.
        rng: chooses which rows move.
        soft: begin with the soft potential; else only steps that keep fewer blocks are made.
    """
    if columns.size == 1:
        for base, steps in _schedule(budget.steps, soft):
            rows = _assign(mask.view(np.uint8), rows, base, steps, budget, rng)
        return rows, columns
    across = np.ascontiguousarray(mask.T)
    for base, steps in _schedule(budget.steps, soft):
        for _ in range(TURNS):
            each = max(1, steps // (2 * TURNS))
            counts = np.ascontiguousarray(merged(across, columns).T)
            rows = _assign(counts, rows, base, each, budget, rng)
            counts = np.ascontiguousarray(merged(mask, rows).T)
            columns = _assign(counts, columns, base, each, budget, rng)
    return rows, columns


def _schedule(steps: int, soft: bool) -> Iterator[tuple[float, int]]:
    if soft:
        for base in BASES:
            yield base, int(steps * SOFT_SHARE / len(BASES))
    yield 0.0, int(steps * (1 - SOFT_SHARE)) if soft else steps


def _assign(
    counts: npt.NDArray[np.uint8],
    groups: Groups,
    base: float,
    steps: int,
    budget: Budget,
    rng: np.random.Generator,
) -> Groups:
    """`steps` assignments of rows whose non-zeros per column block are `counts` [N, blocks]."""
    size, members = groups.size, groups.members.copy()
    number = members.shape[0]
    if number < 2:
        return groups
    padded = np.concatenate([counts, np.zeros((1, counts.shape[1]), counts.dtype)])
    power = np.power(base, np.arange(int(counts.max(initial=0)) * size + 1)).astype(np.float32)
    alone = 1 - power[padded]
    held = np.zeros((number, counts.shape[1]), np.uint16)
    for column in members.T:
        held += padded[column]
    idle, patience = 0, PATIENCE * size * -(-number // MOST_BLOCKS)
    for _ in range(steps):
        if budget.spent or idle == patience:
            break
        some = rng.permutation(number)[:MOST_BLOCKS]
        place = rng.integers(size, size=some.size)
        out = members[some, place]
        rest = held[some] - padded[out]
        price = alone[out] @ power[rest].T
        row, block = linear_sum_assignment(price)
        gain = float(np.trace(price)) - float(price[row, block].sum())
        idle = idle + 1 if gain <= 0 and base == 0 else 0
        moved = np.flatnonzero(row != block)
        if moved.size:
            members[some[block[moved]], place[block[moved]]] = out[row[moved]]
            held[some[block[moved]]] = rest[block[moved]] + padded[out[row[moved]]]
    return Groups(members, groups.count)
