"""Reductions: softmax, layer and group norm, mean, sum, max, argmax, pooling, and what is fused on.

The last block (the anchor) walks rows; everything else is computed inside one row, where it stays
in the level-1 cache. If memory runs along the reduced axis, the sum is kept in lanes and
folded at the end of the row; if it runs along the rows' last axis, that axis is the vector. Rows of
two to four elements are written out, and LLVM makes vectors of many rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from ..targets import PivotTarget
from .analysis import LEFT_TO_LLVM, Block, CannotSchedule, leaf_blocks, variables
from .elementwise import COSTLY, collapse, schedule_spatial
from .moves import (
    extent_of,
    finish,
    fuse,
    overlap_tail,
    parallelise,
    split_vector,
    task_count,
    worth_threads,
)
from .stages import stage_loops

ACCUMULATORS = 4  # vectors in flight: an addition takes about as many cycles
MAX_STRIDE = 4
UNROLLED_WINDOW = 16  # taps of a pooling window that are written out


@dataclass(frozen=True)
class _Stage:
    """A block computed inside a row.

    Attributes:
        block: the block as analysed at first, of which this may be a part.
        rv: the part.
        sums: partial sums it leaves for each row.
        first: whether it reads the data, and not partial sums.
    """

    block: Block
    rv: Any
    sums: int = 0
    first: bool = False


def apply(func: tirx.PrimFunc, target: PivotTarget) -> s_tir.Schedule | None:
    """Schedule a chain of blocks with at least one reduction and one result."""
    sch = s_tir.Schedule(func)
    blocks = leaf_blocks(sch)
    if blocks is None or not any("R" in block.kinds for block in blocks):
        return None
    if not all(set(block.kinds) <= {"S", "R"} for block in blocks):
        return None
    if len(sch.get_output_blocks("root")) != 1:
        return None
    blocks = _simplified(sch, blocks)
    if blocks is None or not blocks[-1].spatial:
        return None
    rows = _row_axes(blocks)
    reductions = [block for block in blocks if not block.spatial]
    if all(_is_contiguous(block, target) for block in reductions):
        _schedule_contiguous(sch, blocks, rows, target)
    elif _has_short_rows(blocks, rows):
        _schedule_short_rows(sch, blocks, rows, target)
    else:
        _schedule_vertical(sch, blocks, rows, target)
    return finish(sch)


def _simplified(sch: s_tir.Schedule, blocks: list[Block]) -> list[Block] | None:
    """Inline what is cheap, and make the last block one without a reduction."""
    reduced: set[str] = set()
    for block in blocks[:-1]:
        if not block.spatial:
            reduced.add(block.name)
        elif not _keep(sch, block, reduced):
            sch.compute_inline(block.rv)
    remaining = leaf_blocks(sch)
    if remaining is not None and not remaining[-1].spatial:
        if len(remaining[-1].stores) != 1:
            return None
        sch.cache_write(remaining[-1].rv, 0, "global")
        remaining = leaf_blocks(sch)
    return remaining


def _keep(sch: s_tir.Schedule, block: Block, reduced: set[str]) -> bool:
    """Whether a spatial block is better computed once than at each use."""
    fresh = Block(sch, block.rv)
    consumers = [Block(sch, rv) for rv in sch.get_consumers(block.rv)]
    producers = {str(sch.get(rv).name_hint) for rv in sch.get_producers(block.rv)}
    repeated = sum(consumer.size for consumer in consumers) > 4 * fresh.size
    windows = [consumer for consumer in consumers if not consumer.spatial]
    if fresh.vars and fresh.vars[-1] in fresh.branch_vars and not all(map(_strided, windows)):
        return True  # padding: its conditions would keep the windows from being vectors
    if repeated and producers & reduced:
        return True
    uses = sum(
        load.buffer.same_as(fresh.stores[0].buffer)
        for consumer in consumers
        for load in consumer.loads
    )
    chained = any(consumer.cost >= COSTLY for consumer in consumers)
    return fresh.cost >= COSTLY and (repeated or chained or uses > 1)


def _row_axes(blocks: list[Block]) -> list[int]:
    """Axes of the anchor on which the reduced values depend."""
    anchor = blocks[-1]
    producers = {store.buffer: block for block in blocks[:-1] for store in block.stores}

    def rows_of(block: Block) -> set[int]:
        rows: set[int] = set()
        for load in block.loads:
            producer = producers.get(load.buffer)
            if producer is None:
                continue
            if not producer.spatial or 2 * producer.size <= anchor.size:
                used = {var for index in load.indices for var in variables(index)}
                rows |= {axis for axis, var in enumerate(block.vars) if var in used}
                continue
            # A value for every element: its rows are ours, where the axes correspond.
            strides = {producer.stores[0].strides[axis] for axis in rows_of(producer)}
            rows |= {axis for axis, s in enumerate(load.strides) if s and s in strides}
        return rows

    return sorted(rows_of(anchor))


def _is_contiguous(block: Block, target: PivotTarget) -> bool:
    """Whether the reduced axes are the contiguous ones and fill at least half a vector."""
    main = max(block.loads, key=lambda load: sum(s != 0 for s in load.strides))
    last = len(block.vars) - 1
    if block.kinds[last] != "R" or main.strides[last] != 1:
        return False
    return 2 * block.extents[last] * _collapsible_tail(block)[1] >= block.lanes(target.lanes)


def _collapsible_tail(block: Block) -> tuple[list[list[int]], int]:
    """Axis groups with the trailing reduced axes merged, and how much longer the last one gets."""
    groups = [[axis] for axis in range(len(block.vars))]
    longer = 1
    while len(groups) > 1 and block.collapses(groups[-2][-1], groups[-1][0]):
        last = groups.pop()
        groups[-1] = [*groups[-1], *last]
        longer *= block.extents[groups[-1][0]]
    return groups, longer


def _schedule_contiguous(
    sch: s_tir.Schedule, blocks: list[Block], rows: list[int], target: PivotTarget
) -> None:
    """One row at a time; sums in lanes, folded at the row's end."""
    anchor = blocks[-1]
    work = sum(block.size * block.cost for block in blocks)
    for block in blocks:
        if not block.loops:  # rfactor fails beside a block without any
            sch.add_unit_loop(block.rv)
    stages: list[_Stage] = []
    for block in blocks[:-1]:
        stages.extend([_Stage(block, block.rv)] if block.spatial else _fold(sch, block, target))
    columns = [axis for axis in range(len(anchor.vars)) if axis not in rows]
    groups = [[axis] for axis in rows]
    for axis in columns:
        if axis - 1 in columns and anchor.collapses(axis - 1, axis):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    loops = collapse(sch, anchor, groups)
    row = fuse(sch, loops[: len(rows)]) if rows else sch.split(loops[0], [1, None])[0]
    parallelise(sch, [row], work, target)  # before reductions are decomposed, or TVM refuses
    for stage in reversed(stages):
        sch.compute_at(stage.rv, row)
    for stage in stages:
        if stage.block.spatial:
            _vectorise_stage(sch, stage.block, stage.rv, row, target)
        else:
            _schedule_lanes(sch, stage, row, target)
    if columns:
        loop = sch.get_loops(anchor.rv)[-1]
        split_vector(sch, anchor, loop, target, _cuts(sch, anchor, loop))


def _fold(sch: s_tir.Schedule, block: Block, target: PivotTarget) -> list[_Stage]:
    """Split a reduction into partial sums: over vectors, then over ever fewer lanes.

    The stages leave 64, 16, 4 and 1 sums, for vectors of 16.
    """
    lanes = block.lanes(target.lanes)
    loops = collapse(sch, block, _collapsible_tail(block)[0])
    extent = extent_of(sch, loops[-1])
    count = lanes * ACCUMULATORS if extent >= lanes * ACCUMULATORS else min(lanes, extent)
    stages: list[_Stage] = []
    while count > 1:
        _, inner = sch.split(sch.get_loops(block.rv)[-1], [None, count])
        stages.append(_Stage(block, sch.rfactor(inner, -1), count, not stages))
        count = count // 4 if count % 4 == 0 else 1
    return [*stages, _Stage(block, block.rv, 1)]


def _schedule_lanes(sch: s_tir.Schedule, stage: _Stage, row: Any, target: PivotTarget) -> None:
    """One stage of partial sums: its lanes in one vector loop, inside the reduced loops."""
    block, rv, count = stage.block, stage.rv, stage.sums
    spatial, reduced = stage_loops(sch, rv, row)
    if spatial and reduced:
        sch.reorder(*reduced, *spatial)
    if spatial:
        sch.vectorize(spatial[-1])
    if not reduced:
        return
    if stage.first:
        lanes = block.lanes(target.lanes)
        length = block.extents[-1] * _collapsible_tail(block)[1]
        whole = {length // count * count, length // lanes * lanes}
        overlap_tail(sch, reduced[-1], count, length, [c for c in whole if 0 < c < length])
    else:
        for loop in reduced:
            sch.unroll(loop)
    sch.decompose_reduction(rv, reduced[0])


def _vectorise_stage(
    sch: s_tir.Schedule, block: Block, rv: Any, outer: Any, target: PivotTarget
) -> None:
    """Vectorise a spatial block that is computed inside `outer`."""
    spatial, _ = stage_loops(sch, rv, outer)
    if spatial:
        split_vector(sch, block, spatial[-1], target, _cuts(sch, block, spatial[-1]))


def _cuts(sch: s_tir.Schedule, block: Block, loop: Any) -> list[int]:
    """Where conditions change along the loop of the block's last axis."""
    points = block.branch_points(len(block.vars) - 1) if block.vars else []
    return [point for point in points if point < extent_of(sch, loop)]


def _has_short_rows(blocks: list[Block], rows: list[int]) -> bool:
    """Whether memory runs along rows of a few elements, which are also what is reduced."""
    anchor = blocks[-1]
    columns = [axis for axis in range(len(anchor.vars)) if axis not in rows]
    if not rows or columns != list(range(len(rows), len(anchor.vars))):
        return False
    lengths = [math.prod(anchor.extents[axis] for axis in columns)]
    for block in blocks[:-1]:
        if block.branch_vars or len(block.vars) < len(rows):
            return False
        if block.extents[: len(rows)] != anchor.extents[: len(rows)]:
            return False
        if "R" in block.kinds[: len(rows)]:
            return False
        lengths.append(math.prod(block.extents[len(rows) :]))
    loads = [load for block in blocks for load in block.loads]
    walked = [load.strides[len(rows) - 1] for load in loads]
    return 1 < max(lengths) <= MAX_STRIDE and all(s is not None and s > 0 for s in walked)


def _schedule_short_rows(
    sch: s_tir.Schedule, blocks: list[Block], rows: list[int], target: PivotTarget
) -> None:
    """Rows one by one, written out: LLVM makes vectors of many rows, with shuffles.

    TVM would make one load for each lane of a vector of rows.
    """
    anchor = blocks[-1]
    work = sum(block.size * block.cost for block in blocks)
    loops = anchor.loops
    row = fuse(sch, loops[: len(rows)])
    for block in reversed(blocks[:-1]):
        sch.compute_at(block.rv, row)
    for block in blocks:
        spatial, reduced = stage_loops(sch, block.rv, row)
        for loop in (*reduced, *spatial):
            sch.unroll(loop)
    if worth_threads(work, target):
        tasks = task_count(extent_of(sch, row))
        task, row = sch.split(row, [tasks, None])
        sch.parallel(task)
    sch.annotate(row, LEFT_TO_LLVM, True)
    for block in blocks[:-1]:
        if not block.spatial:
            sch.decompose_reduction(block.rv, stage_loops(sch, block.rv, row)[1][0])


def _schedule_vertical(
    sch: s_tir.Schedule, blocks: list[Block], rows: list[int], target: PivotTarget
) -> None:
    """The rows' last axis is the vector; the reduced axes run outside it."""
    if not rows:
        raise CannotSchedule("nothing but reduced axes, and not contiguous ones")
    anchor = blocks[-1]
    work = sum(block.size * block.cost for block in blocks)
    padding = [block for block in blocks[:-1] if block.spatial and block.branch_vars]
    windows = bool(padding) or any(_strided(block) for block in blocks if not block.spatial)
    outer = _split_rows(sch, anchor, rows, windows, target)
    tile = outer.pop()
    shared = _axes_before_padding(padding, anchor, rows, target)
    around = fuse(sch, outer[:shared]) if shared else None
    between = fuse(sch, outer[shared:]) if outer[shared:] else None
    first = next(loop for loop in (around, between, tile) if loop is not None)
    parallelise(sch, [first], work, target)  # before reductions are decomposed, or TVM refuses
    for block in reversed(blocks[:-1]):
        if block not in padding:
            sch.compute_at(block.rv, tile)
            _schedule_column(sch, block, tile)
        elif around is None:
            schedule_spatial(sch, Block(sch, block.rv), target)
        else:
            sch.compute_at(block.rv, around)
            _vectorise_stage(sch, block, block.rv, around, target)


def _split_rows(
    sch: s_tir.Schedule, anchor: Block, rows: list[int], windows: bool, target: PivotTarget
) -> list[Any]:
    """Order the anchor's loops: rows, tiles of the last row axis, other axes, one tile's vector.

    Returns:
        The loops over rows, then the one over tiles.
    """
    loops, extent = anchor.loops, anchor.extents[rows[-1]]
    columns = [loop for axis, loop in enumerate(loops) if axis not in rows]
    width = anchor.lanes(target.lanes)
    # Several vectors at once hide latency; gathers and windows have work enough in one.
    if not windows and all(load.strides[rows[-1]] in (0, 1) for load in anchor.loads):
        width *= min(ACCUMULATORS, max(1, extent // width))
    width = min(width, extent)
    tile, vector = sch.split(loops[rows[-1]], [None, width])
    outer = [loops[axis] for axis in rows[:-1]]
    sch.reorder(*outer, tile, *columns, vector)
    sch.vectorize(vector)
    overlap_tail(sch, tile, width, extent)
    return [*outer, tile]


def _axes_before_padding(
    padding: list[Block], anchor: Block, rows: list[int], target: PivotTarget
) -> int:
    """How many of the anchor's leading rows to walk outside the padding of one plane.

    0 pads everything beforehand: where the axes do not correspond, or threads need more rows.
    """
    if not padding:
        return 0
    shared = len(rows) - 1
    for block in padding:
        padded = [axis for axis, var in enumerate(block.vars) if var in block.branch_vars]
        if len(block.vars) != len(anchor.vars) or rows != list(range(len(anchor.vars))):
            return 0
        shared = min(shared, *padded)
        if block.extents[:shared] != anchor.extents[:shared]:
            return 0
    planes = 1
    for axis in range(shared):
        planes *= anchor.extents[axis]
    return shared if planes >= target.cores else 0


def _schedule_column(sch: s_tir.Schedule, block: Block, outer: Any) -> None:
    """A stage inside one vector of rows: reduced loops outside, the vector inside."""
    spatial, reduced = stage_loops(sch, block.rv, outer)
    if spatial and reduced:
        sch.reorder(*reduced, *spatial)
    plain = bool(reduced) and _strided(block)
    if spatial and not plain:
        sch.vectorize(spatial[-1])
    taps = 1
    for loop in reversed(reduced):
        taps *= extent_of(sch, loop)
        if taps <= UNROLLED_WINDOW:
            sch.unroll(loop)
    if reduced:
        init = sch.decompose_reduction(block.rv, reduced[0])
        if spatial and plain:
            sch.vectorize(sch.get_loops(init)[-1])


def _strided(block: Block) -> bool:
    """Whether the block reads every second element or so along its last spatial axis.

    Of a vector with a stride TVM makes one load for each lane; of a plain loop LLVM makes
    whole vectors and shuffles.
    """
    last = max(axis for axis, kind in enumerate(block.kinds) if kind == "S")
    return any(1 < (load.strides[last] or 0) <= MAX_STRIDE for load in block.loads)
