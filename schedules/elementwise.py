"""Injective functions: element-wise chains, broadcasts, transposes, concat, pad, gather, resize."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from tvm import s_tir, tirx

from ..targets import PivotTarget
from .analysis import Block, leaf_blocks, walk
from .moves import finish, overlap_tail, parallelise, split_vector
from .squares import SQUARE, transposes

# An expression of more nodes is not inlined any further: it would be repeated at every use.
MAX_INLINED = 600
RESHAPE = "T_reshape"  # what TVM's operator library calls it
COSTLY = 8  # additions; repeating less is cheaper than storing


def apply(func: tirx.PrimFunc, target: PivotTarget) -> s_tir.Schedule | None:
    """Inline what can be, then vectorise and parallelise each remaining block on its own."""
    sch = s_tir.Schedule(func)
    blocks = leaf_blocks(sch)
    if blocks is None or not all(block.spatial for block in blocks):
        return None
    for block in inline_spatial(sch, blocks):
        schedule_spatial(sch, block, target)
    return finish(sch)


def inline_spatial(sch: s_tir.Schedule, blocks: list[Block]) -> list[Block]:
    """Inline every block that may be; the remaining ones, in normal form."""
    blocks = _without_last_views(sch, blocks)
    outputs = {str(sch.get(rv).name_hint) for rv in sch.get_output_blocks("root")}
    for block in blocks:
        if block.name not in outputs and _inlinable(sch, block):
            sch.compute_inline(block.rv)
    remaining = leaf_blocks(sch)
    assert remaining is not None, "inlining keeps the normal form"
    return remaining


def _without_last_views(sch: s_tir.Schedule, blocks: list[Block]) -> list[Block]:
    """Let what a reshape of the result reads write in its place: its axes say how data lies."""
    for rv in sch.get_output_blocks("root"):
        if str(sch.get(rv).name_hint).startswith(RESHAPE):
            with suppress(s_tir.ScheduleError):  # it repeats or leaves out elements, or is alone
                sch.reverse_compute_inline(rv)
    remaining = leaf_blocks(sch)
    assert remaining is not None, "inlining keeps the normal form"
    return remaining


def _inlinable(sch: s_tir.Schedule, block: Block) -> bool:
    """Not where it repeats costly work, or where the expression grows too long."""
    fresh = Block(sch, block.rv)
    consumers = [Block(sch, rv) for rv in sch.get_consumers(block.rv)]
    if not consumers or len(fresh.stores) != 1:
        return False
    repeated = sum(consumer.size for consumer in consumers) > 4 * fresh.size
    uses = sum(
        load.buffer.same_as(fresh.stores[0].buffer)
        for consumer in consumers
        for load in consumer.loads
    )
    # One long chain of dependent polynomials for each vector would leave the machine waiting.
    chained = any(consumer.cost >= COSTLY for consumer in consumers)
    if (repeated or chained or uses > 1) and fresh.cost >= COSTLY:
        return False
    return bool(uses * len(walk(fresh.stmt.body, tirx.Expr)) <= MAX_INLINED)


def schedule_spatial(sch: s_tir.Schedule, block: Block, target: PivotTarget) -> None:
    """Schedule one block of spatial axes that is alone in its loops."""
    if not block.loops:
        return
    groups = collapsible_axes(block)
    lanes = block.lanes(target.lanes)
    fused = collapse(sch, block, groups)
    work = block.size * block.cost
    column = transposed_group(block, groups)
    if column is not None:
        _schedule_transposed(sch, block, fused, column, lanes, work, target)
        return
    cuts = block.branch_points(groups[-1][-1])
    outer = split_vector(sch, block, fused[-1], target, cuts)
    parallelise(sch, fused[:-1] or ([outer] if outer is not None else []), work, target)


def collapsible_axes(block: Block) -> list[list[int]]:
    """The axes in groups of neighbours that every access walks like one long axis."""
    groups: list[list[int]] = []
    for axis in range(len(block.vars)):
        if groups and block.collapses(axis - 1, axis):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def collapse(sch: s_tir.Schedule, block: Block, groups: list[list[int]]) -> list[Any]:
    """Give the block one axis, hence one loop, for each group; returns the loops.

    Fusing loops instead would leave the block's axes as quotients of the fused loop, which
    tiles cannot overlap in.
    """
    if any(len(group) > 1 for group in groups):

        def merged(*axes: Any) -> list[Any]:
            flat = []
            for group in groups:
                index = axes[group[0]]
                for axis in group[1:]:
                    index = index * block.extents[axis] + axes[axis]
                flat.append(index)
            return flat

        sch.transform_block_layout(block.rv, tirx.IndexMap.from_func(merged, len(block.vars)))
    return list(sch.get_loops(block.rv))


def transposed_group(block: Block, groups: list[list[int]]) -> int | None:
    """The group along which some load is contiguous, if the last group makes that load jump."""
    last = groups[-1][-1]
    for load in block.loads:
        if load.strides[last] in (0, 1, None):
            continue
        for number, group in enumerate(groups[:-1]):
            if load.strides[group[-1]] == 1 and block.extents[group[-1]] > 1:
                return number
    return None


def _schedule_transposed(
    sch: s_tir.Schedule,
    block: Block,
    fused: list[Any],
    column: int,
    lanes: int,
    work: int,
    target: PivotTarget,
) -> None:
    """Square tiles of lanes x lanes, so that both sides use whole cache lines.

    They follow each other along the longer axis: fewer turns, and more to be prefetched.
    """
    ranges = [int(sch.get(fused[i]).extent) for i in (column, -1)]
    tiles = [min(lanes, extent) for extent in ranges]
    row_out, row_in = sch.split(fused[column], [None, tiles[0]])
    out, vector = sch.split(fused[-1], [None, tiles[1]])
    others = [loop for number, loop in enumerate(fused[:-1]) if number != column]
    outer = [row_out, out] if ranges[0] <= ranges[1] else [out, row_out]
    sch.reorder(*others, *outer, row_in, vector)
    sch.vectorize(vector)
    sch.unroll(row_in)
    if tiles[0] == tiles[1] and transposes(tiles[0]) and not block.branch_vars:
        sch.annotate(row_in, SQUARE, 1)
    overlap_tail(sch, row_out, tiles[0], ranges[0])
    overlap_tail(sch, out, tiles[1], ranges[1])
    parallelise(sch, others or outer[:1], work, target)
