"""Sums of products of two run-time operands: attention's matmuls, and fallbacks of conv and dense.

One register tile: R rows times P vectors of accumulators, the reduced axes around it, the
epilogue applied to the tile before it is stored. Operands that run the wrong way are copied
into the right layout first. Layers with constant weights have better kernels of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from ..targets import PivotTarget
from .analysis import Access, Block, CannotSchedule, leaf_blocks, walk
from .elementwise import schedule_spatial
from .moves import extent_of, finish, fuse, overlap_tail, parallelise, worth_threads
from .stages import stage_loops

MAX_VECTORS = 6  # in a row of the tile
MAX_ROWS = 12
LATENCY = 8  # independent multiply-adds that keep the units busy
UNSHARED_ROWS = 4  # where no operand is shared between rows
UNROLLED_TAPS = 16


@dataclass(frozen=True)
class Tile:
    """Rows and vectors of accumulators, and the elements of one vector."""

    rows: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes


def apply(func: tirx.PrimFunc, target: PivotTarget) -> s_tir.Schedule | None:
    """Schedule a function with exactly one contraction, spatial blocks around it, one result."""
    sch = s_tir.Schedule(func)
    blocks = leaf_blocks(sch)
    if blocks is None:
        return None
    sums = [block for block in blocks if not block.spatial]
    if len(sums) != 1 or not is_contraction(sums[0]) or len(sch.get_output_blocks("root")) != 1:
        return None
    if _is_dot_product(sums[0]):
        return None
    name = sums[0].name
    _inline_epilogue(sch, blocks, name)
    anchor = _tile_anchor(sch, name)
    _pack_operands(sch, name)
    blocks = leaf_blocks(sch)
    if blocks is None:
        raise CannotSchedule("packing lost the normal form")
    by_name = {block.name: block for block in blocks}
    _schedule_tile(sch, by_name[name], by_name[anchor], target)
    for block in blocks:
        if block.name not in (name, anchor):
            schedule_spatial(sch, block, target)
    return finish(sch)


def is_contraction(block: Block) -> bool:
    """Whether the block adds up products of two loads."""
    stores = walk(block.stmt.body, tirx.BufferStore)
    if set(block.kinds) != {"S", "R"} or len(stores) != 1 or len(block.loads) != 2:
        return False
    value = stores[0].value
    return isinstance(value, tirx.Add) and any(
        isinstance(_uncast(side), tirx.Mul) for side in (value.a, value.b)
    )


def _uncast(expr: Any) -> Any:
    return _uncast(expr.value) if isinstance(expr, tirx.Cast) else expr


def _is_dot_product(block: Block) -> bool:
    """A row times a matrix whose reduced axis is the contiguous one: better summed in lanes."""
    vector, row = _tile_axes(block)
    return row is None and not any(load.strides[vector] == 1 for load in block.loads)


def _tile_axes(block: Block) -> tuple[int, int | None]:
    """The axis of the vectors, and the axis of the rows: one that shares the vector operand."""
    spatial = [axis for axis, kind in enumerate(block.kinds) if kind == "S"]
    vector = max(spatial, key=lambda axis: (block.stores[0].strides[axis] == 1, axis))
    wide = [load for load in block.loads if load.strides[vector] != 0]
    others = [axis for axis in spatial if axis != vector]
    shared = [axis for axis in others if all(load.strides[axis] == 0 for load in wide)]
    if shared:
        return vector, max(shared, key=lambda axis: block.extents[axis])
    return vector, others[-1] if others else None


def _inline_epilogue(sch: s_tir.Schedule, blocks: list[Block], name: str) -> None:
    """Inline the blocks after the contraction into the last one."""
    after = False
    for block in blocks[:-1]:
        if after:
            sch.compute_inline(block.rv)
        after = after or block.name == name


def _tile_anchor(sch: s_tir.Schedule, name: str) -> str:
    """The block that is to walk the tiles: the epilogue if its axes are the contraction's,
    else a copy of the result."""
    blocks = leaf_blocks(sch)
    if blocks is None:
        raise CannotSchedule("inlining lost the normal form")
    block = next(block for block in blocks if block.name == name)
    last = blocks[-1]
    if last.name != name:
        result = block.stores[0].buffer
        uses = [load for load in last.loads if load.buffer.same_as(result)]
        axes = zip(block.stores[0].strides, block.kinds, strict=True)
        same = tuple(stride for stride, kind in axes if kind == "S")
        if all(use.strides == same for use in (*uses, last.stores[0])):
            return last.name
    return str(sch.get(sch.cache_write(block.rv, 0, "global")).name_hint)


def _pack_operands(sch: s_tir.Schedule, name: str) -> None:
    """Copy an operand that jumps along the vector axis to a layout that is contiguous there."""
    block = Block(sch, sch.get_sblock(name))
    vector, row = _tile_axes(block)
    if row is None or block.extents[row] < UNSHARED_ROWS:
        return
    reads = [region.source for region in block.stmt.reads]
    for load in block.loads:
        stride = load.strides[vector]
        axis = _only_dimension(block, load, vector)
        if stride in (0, 1, None) or axis is None or len(load.indices) < 2:
            continue
        position = next(i for i, buffer in enumerate(reads) if buffer.same_as(load.buffer))
        copy = sch.cache_read(block.rv, position, "global")
        order = [d for d in range(len(load.indices)) if d != axis] + [axis]
        permute = tirx.IndexMap.from_func(_permutation(order), len(order))
        sch.transform_layout(copy, ("write", 0), permute)
        sch.transform_block_layout(copy, permute)


def _permutation(order: list[int]) -> Any:
    def permute(*axes: Any) -> list[Any]:
        return [axes[i] for i in order]

    return permute


def _only_dimension(block: Block, load: Access, axis: int) -> int | None:
    """The buffer dimension indexed by just this axis of the block, if there is one."""
    for dimension, index in enumerate(load.indices):
        if index.same_as(block.vars[axis]):
            return dimension
    return None


def choose_tile(rows: int, columns: int, lanes: int, registers: int) -> Tile:
    """The tile for rows x columns results that needs the fewest cycles for one reduced step.

    A step of R x P multiply-adds loads P vectors and R scalars; the machine does about as
    many of one as of the other. Tiles at the end overlap, so they cost as much as any.
    """
    if columns < lanes:
        lanes = columns
    best, least = Tile(1, 1, lanes), float("inf")
    for vectors in range(1, min(MAX_VECTORS, columns // lanes) + 1):
        for height in range(1, min(MAX_ROWS, rows) + 1):
            if height * vectors + vectors + 1 > registers:
                break
            tiles = -(-rows // height) * -(-columns // (vectors * lanes))
            cycles = tiles * (max(height * vectors, height + vectors, LATENCY) + 1)
            if cycles < least:
                best, least = Tile(height, vectors, lanes), cycles
    return best


def _schedule_tile(sch: s_tir.Schedule, block: Block, anchor: Block, target: PivotTarget) -> None:
    """Tile the anchor, compute the contraction inside one tile, run tiles on threads."""
    work = block.size
    vector, row = _tile_axes(block)
    axes = [axis for axis, kind in enumerate(block.kinds) if kind == "S"]
    loops = dict(zip(axes, anchor.loops, strict=True))
    rows = 1 if row is None else block.extents[row]
    shared = row is not None and any(load.strides[row] == 0 for load in block.loads)
    tile = choose_tile(
        rows if shared else min(rows, UNSHARED_ROWS),
        block.extents[vector],
        block.lanes(target.lanes),
        target.registers,
    )
    column_out, column_in = sch.split(loops.pop(vector), [None, tile.width])
    order = [column_out]
    inside = [*sch.split(column_in, [None, tile.lanes])]
    if row is not None:
        row_out, row_in = sch.split(loops.pop(row), [None, tile.rows])
        order.append(row_out)
        inside.insert(0, row_in)
    batch = list(loops.values())
    sch.reorder(*batch, *order, *inside)
    _spread(sch, batch, order, work, target)  # before the reduction is decomposed, or TVM refuses
    sch.compute_at(block.rv, order[-1])
    _schedule_inside(sch, block, order[-1], tile)
    sch.vectorize(inside[-1])
    for loop in inside[:-1]:
        sch.unroll(loop)
    overlap_tail(sch, column_out, tile.width, block.extents[vector])
    if row is not None:
        overlap_tail(sch, row_out, tile.rows, rows)


def _schedule_inside(sch: s_tir.Schedule, block: Block, outer: Any, tile: Tile) -> None:
    """The contraction of one tile: reduced axes, then rows, vectors and lanes in registers."""
    sch.set_scope(block.rv, 0, "local")
    spatial, reduced = stage_loops(sch, block.rv, outer)
    spatial = [loop for loop in spatial if extent_of(sch, loop) > 1]
    vectors: list[Any] = []
    if spatial and tile.width > 1:
        vectors = list(sch.split(spatial.pop(), [None, tile.lanes]))
    sch.reorder(*reduced, *spatial, *vectors)
    for loop in [*spatial, *vectors[:-1]]:
        sch.unroll(loop)
    if vectors:
        sch.vectorize(vectors[-1])
    taps = 1
    for loop in reversed(reduced[1:]):
        taps *= extent_of(sch, loop)
        if taps <= UNROLLED_TAPS // max(1, tile.rows * tile.vectors // 4):
            sch.unroll(loop)
    sch.decompose_reduction(block.rv, reduced[0])


def _spread(
    sch: s_tir.Schedule, batch: list[Any], order: list[Any], work: int, target: PivotTarget
) -> None:
    """Give threads the batch if it is large enough, else the longest loop over tiles.

    `order` is left in the order of the loops.
    """
    if not worth_threads(work, target):
        return
    count = 1
    for loop in batch:
        count *= extent_of(sch, loop)
    if count >= target.cores:
        parallelise(sch, [fuse(sch, batch)], work, target)
        return
    longest = max(order, key=lambda loop: extent_of(sch, loop))
    order.sort(key=lambda loop: loop is not longest)
    sch.reorder(longest, *batch, *order[1:])
    parallelise(sch, [longest], work, target)
