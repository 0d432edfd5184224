"""Find an order of a layer's rows that gathers its non-zeros into blocks, where it pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..layout import BlockShape
from ..pivot import find_pivot
from ..pivot_planted import optimistic_fills
from .layers import Plan

# An order must promise this much: what even the optimistic estimate gains less is not looked for.
GAIN = 0.95
# The estimate is too low for some small matrices, in which a search takes little time.
SLACK, SMALL = 1.1, 1 << 16
# Layers of more channel groups have small matrices, and keep the orders they have.
MOST_GROUPS = 8
# Rows of blocks that are filled like this are in order already.
FULL = 0.98


@dataclass
class SearchTime:
    """Seconds that are left for the general search in a network's layers."""

    left: float


def pivoted_plans(
    masks: Sequence[npt.NDArray[np.bool_]],
    plans: Sequence[Plan],
    cycles: Callable[[Plan], float],
    limit: float,
    seconds: SearchTime,
) -> Iterator[Plan]:
    """Plans with row orders found for them, the most promising first.

    Args:
        masks: the non-zeros of each channel group, bool [N / groups, K / groups].
        plans: of R x 1 blocks, with the rows' own orders or those of equal support.
        cycles: predicts a plan's cycles.
        limit: cycles that an order must stay below to be looked for.
        seconds: for the general search.
    """
    nonzeros = [int(np.count_nonzero(mask)) for mask in masks]
    if len(masks) > MOST_GROUPS or _in_order(min(plans, key=lambda p: p.cycles), sum(nonzeros)):
        return
    plans = [p for p in plans if 1 < p.block_rows < masks[0].shape[0]]
    if not plans:
        return
    fills = [optimistic_fills(mask, [p.block_rows for p in plans]) for mask in masks]
    slack = SLACK if masks[0].size < SMALL else 1.0
    promising = []
    for plan in plans:
        r = plan.block_rows
        least = sum(n / (r * min(1.0, slack * f[r])) for n, f in zip(nonzeros, fills, strict=True))
        # Cycles fall by less than entries do: only what passes that is predicted.
        if least >= FULL * plan.entries or plan.cycles * least >= GAIN * limit * plan.entries:
            continue
        promised = cycles(replace(plan, entries=int(least)))
        if promised < GAIN * limit:
            promising.append((promised, plan))
    for promised, plan in sorted(promising, key=lambda pair: pair[0]):
        if promised >= GAIN * limit:
            break
        began = time.perf_counter()
        found = _pivoted(masks, plan, cycles, seconds.left)
        seconds.left = max(0.0, seconds.left - (time.perf_counter() - began))
        limit = min(limit, found.cycles)
        yield found


def _in_order(plan: Plan, nonzeros: int) -> bool:
    """Whether a plan's blocks are full already."""
    return plan.block_rows > 1 and nonzeros >= FULL * plan.entries * plan.block_rows


def _pivoted(
    masks: Sequence[npt.NDArray[np.bool_]],
    plan: Plan,
    cycles: Callable[[Plan], float],
    seconds: float,
) -> Plan:
    """`plan` with the orders that are found for its blocks."""
    block, groups = BlockShape(plan.block_rows), len(masks)

    def cost(lengths: npt.NDArray[np.int64]) -> float:
        slots = np.zeros(lengths.size * block.rows, np.int32)
        entries = int(lengths.sum()) * groups
        return cycles(replace(plan, entries=entries, slots=(slots,) * groups))

    pivots = [find_pivot(mask, block, seconds=seconds / groups, cost=cost) for mask in masks]
    kinds = [pivot.kind for pivot in pivots]
    found = replace(
        plan,
        slots=tuple(pivot.slots() for pivot in pivots),
        entries=sum(pivot.kept for pivot in pivots),
        pivot=max(kinds, key=kinds.count),
    )
    return replace(found, cycles=cycles(found))
