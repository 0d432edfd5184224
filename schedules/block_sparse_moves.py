"""Schedules of the block-sparse kernels: the moves, and the two rewrites that come last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad, TensorRegion
from tvm.s_tir import SBlock, SBlockRealize, Schedule

from ..planes import LINE_FLOATS
from .analysis import substitute, walk
from .block_sparse import OUTPUT, PANEL, STRIP, Kernel
from .carried_sums import K_TILES, carry_sums
from .held_operands import hold_operands, sum_row
from .last_tile import TILES, VECTORS, narrow_last_tile
from .lookup import look_up
from .masked_stores import mask_stores
from .moves import few_tasks, in_sequence, renamed
from .prefetch import prefetch_inputs, prefetch_weights
from .problems import Panel, PlanesProblem, PlanesTile, RowsProblem, RowsTile
from .row_sum import AHEAD
from .single_pixels import SinglePixels
from .sliding_sums import slide_sums
from .store_once import store_once

RAGGED = "pivot.ragged"
# The loop over the row blocks of a K tile, whose entries lie one behind the other.
ROW_BLOCKS = "pivot.row_blocks"
SCHEDULED = "tirx.is_scheduled"


def _accumulate(sch: Schedule, at: Any, lanes: int, order: str, scope: str = "local") -> None:
    """Compute the accumulators in registers at loop `at`.

    `order` names the loops inside, outermost first: ``p`` the ragged sum, ``t``, ``u``, ``m``,
    ``r`` unrolled ones, ``q`` the vector axis, which is split by `lanes`.
    """
    acc = sch.get_sblock("acc")
    sch.compute_at(acc, at, preserve_unit_loops=True)
    sch.set_scope(acc, 0, scope)
    inner = sch.get_loops(acc)[-len(order) :]
    by_name = dict(zip([*order.replace("p", ""), "p"], inner, strict=True))
    vectors, vector = sch.split(by_name["q"], [None, lanes])
    unrolled = [by_name[name] for name in order if name not in "pq"] + [vectors]
    sch.reorder(by_name["p"], *unrolled, vector)
    for loop in unrolled:
        sch.unroll(loop)
    sch.annotate(vectors, VECTORS, 1)
    sch.vectorize(vector)  # before decompose_reduction, which forbids it
    sch.annotate(by_name["p"], RAGGED, 1)
    sch.decompose_reduction(acc, by_name["p"])


def _scope(problem: PlanesProblem, tile: PlanesTile) -> str:
    """Where the accumulators are: what a function changes must be on the stack for LLVM to hold it
    in registers, and TVM puts small buffers there if they are global.
    """
    return "global" if tile.in_assembly or problem.block_rows == 1 else "local"


def _outer(sch: Schedule, loops: list[Any], parallel: bool) -> Any:
    outer = sch.fuse(*loops)
    if parallel:
        sch.parallel(outer)
    return outer


def _row_blocks(sch: Schedule, loops: list[Any], tile: PlanesTile) -> Any:
    """Make tasks of the loops n, g, h, s, b; the innermost loop that walks row blocks is left.

    With several K tiles, or a panel, the loops over these and over a stretch's row blocks stay
    inside a task.
    """
    if tile.k_tiles == 1 and not tile.panel:
        return _outer(sch, loops, tile.parallel)
    *outer, s, b = loops
    _outer(sch, outer, tile.parallel)
    if tile.k_tiles > 1:
        sch.annotate(s, K_TILES, 1)
    sch.annotate(b, ROW_BLOCKS, 1)
    return b


def _copy_panel(sch: Schedule, loops: list[Any], problem: PlanesProblem, tile: PlanesTile) -> None:
    """Copy a K tile's inputs where its loop begins."""
    if not tile.panel:
        return
    panel = sch.get_sblock(PANEL)
    sch.compute_at(panel, loops[3], preserve_unit_loops=True)
    row, q = sch.get_loops(panel)[-2:]
    sch.split(row, [None, Panel(problem, tile).height])
    vectors, vector = sch.split(q, [None, min(tile.lanes, tile.panel_pitch)])
    sch.unroll(vectors)
    sch.vectorize(vector)


def schedule_planes(kernel: Kernel, problem: PlanesProblem, tile: PlanesTile) -> tirx.PrimFunc:
    """R x P accumulators of `lanes` floats stay in registers; the epilogue follows at once.

    Raises:
        ValueError: the tile's sums slide, and are to be multiplied by lanes of loaded weights; or
            it has single pixels, and cuts or copies its columns, or walks rows by themselves.
    """
    if tile.slides and tile.weight_lanes:
        raise ValueError("sums that slide are not multiplied by lanes of weights")
    cut = tile.k_tiles > 1 or tile.panel or tile.weight_lanes or problem.block_rows == 1
    if tile.singles and (cut or not problem.compact):
        raise ValueError("single pixels are summed with all columns of a block at once")
    sch = Schedule(kernel.func)
    loops = sch.get_loops(sch.get_sblock(OUTPUT))
    if problem.compact or tile.within_rows(problem):
        *walked, t, r, q = loops
        vectors, vector = sch.split(q, [None, tile.lanes])
        sch.annotate(t, TILES, 1)
        _row_blocks(sch, walked, tile)
        _accumulate(sch, t, tile.lanes, "prq", _scope(problem, tile))
        _copy_panel(sch, walked, problem, tile)
        for loop in (r, vectors):
            sch.unroll(loop)
    else:
        *walked, _, _, _, vector = loops
        outer = _row_blocks(sch, walked, tile)
        strip = sch.get_sblock(STRIP)
        sch.compute_at(strip, outer, preserve_unit_loops=True)
        row, q = sch.get_loops(strip)[-2:]
        t, vectors, lane = sch.split(q, [tile.tiles, tile.vectors, tile.lanes])
        sch.reorder(t, row, vectors, lane)
        sch.annotate(t, TILES, 1)
        _accumulate(sch, t, tile.lanes, "prq", _scope(problem, tile))
        _copy_panel(sch, walked, problem, tile)
        for loop in (row, vectors):
            sch.unroll(loop)
        sch.vectorize(lane)
    sch.vectorize(vector)
    sch.annotate(vectors, VECTORS, 1)
    func = sch.mod["main"]
    if (last := tile.last(problem)) < tile.vectors:
        func = narrow_last_tile(func, last)
    if tile.ahead and problem.block_rows > 1:
        func = _prefetching(func, tile.ahead)
    if tile.inputs_ahead:
        func = _prefetching_inputs(func, problem, tile)
    done = store_once(finish(func, kernel, problem, tile), kernel, problem, tile)
    if not tile.masked(problem):
        return done
    if not problem.compact:
        return mask_stores(done, OUTPUT, tile.columns(problem))
    return mask_stores(mask_stores(done, OUTPUT, problem.pixels), PANEL, problem.pixels)


def schedule_rows(kernel: Kernel, problem: RowsProblem, tile: RowsTile) -> tirx.PrimFunc:
    """All input rows share one walk over the kept weights; a vector is R rows of the output."""
    sch = Schedule(kernel.func)
    b, m, r = sch.get_loops(sch.get_sblock(OUTPUT))
    outer = _outer(sch, [b], tile.parallel)
    _accumulate(sch, outer, problem.block_rows, "pmuq")
    sch.unroll(m)
    sch.vectorize(r)
    func = sch.mod["main"]
    if problem.window:
        params = {param.name: param for param in func.params}
        body = look_up(func.body, params, problem.window)
        func = tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)
    if tile.ahead:
        func = _prefetching(func, tile.ahead, tile.unroll)
    return finish(func, kernel)


def _prefetching(func: tirx.PrimFunc, ahead: int, unroll: int = 1) -> tirx.PrimFunc:
    """The function with its weights fetched `ahead` entries before they are used."""
    weight = next(param for param in func.params if param.name == "weight")
    body = prefetch_weights(func.body, weight, RAGGED, unroll, ahead)
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def _prefetching_inputs(
    func: tirx.PrimFunc, problem: PlanesProblem, tile: PlanesTile
) -> tirx.PrimFunc:
    """The function with the inputs of later entries fetched."""
    index = next(param for param in func.params if param.name == "index")
    read = (tile.width, tile.last(problem) * tile.lanes, tile.line_floats(problem))
    aligned = all(floats % LINE_FLOATS == 0 for floats in read)
    marks, ahead = (RAGGED, VECTORS), tile.inputs_ahead
    body = prefetch_inputs(func.body, index, marks, tile.lanes, aligned, ahead)
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def finish(
    func: tirx.PrimFunc,
    kernel: Kernel,
    problem: PlanesProblem | None = None,
    tile: PlanesTile | None = None,
) -> tirx.PrimFunc:
    """Tighten ragged loops to their data-dependent extents, carry sums from K tile to K tile, put
    the output in place, and let each parallel task run a stretch of row blocks.

    All but the last leave the affine domain that schedules need, so they come last.
    """
    params = {param.name: param for param in func.params}
    old = params[OUTPUT]
    new = tirx.decl_buffer(kernel.shape, old.ty.dtype, name=OUTPUT)
    body = tvm_ffi.structural_map(func.body, (tirx.FloorMod, _unbounded(params["index"])))
    tighten = _Tightener(params, kernel, problem, tile, new)
    body = tvm_ffi.structural_map(body, (tirx.For, tighten.loop))
    body = tighten.allocated(body)
    body = tvm_ffi.structural_map(body, (SBlockRealize, _whole_strip))
    if tile is not None and tile.in_assembly:
        body = tvm_ffi.structural_map(body, (SBlockRealize, _biased(params["bias"], kernel)))
    body = carry_sums(body, kernel.walked)

    def store(node: tirx.BufferStore) -> tirx.BufferStore:
        if not node.buffer.same_as(old):
            return node
        return tirx.BufferStore(new, node.value, kernel.place(params["rows"], node.indices))

    whole = [tvm.ir.Range(0, extent) for extent in kernel.shape]

    def region(node: TensorRegion) -> TensorRegion:
        return tirx.BufferRegion(new, whole) if node.source.same_as(old) else node

    body = tvm_ffi.structural_map(body, [(tirx.BufferStore, store), (TensorRegion, region)])
    body = tvm_ffi.structural_map(body, (tirx.For, few_tasks))
    done = tirx.PrimFunc([*func.params[:-1], new], body, func.ret_type, func.attrs)
    return done.with_attr(SCHEDULED, True)


def _whole_strip(node: SBlockRealize) -> SBlockRealize:
    """Puts away all of a strip, with what lies behind its last output pixel.

    Scheduling leaves that out. Then the last vector is not whole, the accumulators must lie in
    memory to be copied, and each copy waits for stores that it only partly covers.
    """
    if node.block.name_hint != STRIP:
        return node
    return SBlockRealize(node.iter_values, tirx.const(True, "bool"), node.block)


def _unbounded(index: Any) -> Any:
    """Drops the remainder of what the table `index` holds: it counts columns of its tile."""

    def drop(node: tirx.FloorMod) -> Any:
        load = node.a
        return load if isinstance(load, TensorLoad) and load.source.same_as(index) else node

    return drop


def _biased(bias: Any, kernel: Kernel) -> Any:
    """Gives accumulators their first value: the bias of their row."""

    def start(node: SBlockRealize) -> SBlockRealize:
        block = node.block
        if block.name_hint != "acc_init":
            return node
        axes = {iv.var.name: iv.var for iv in block.iter_vars}
        store = block.body
        zero = tirx.const(0, "int32")
        rows = int(store.buffer.ty.shape[-2])
        slot = kernel.segment({**axes, "v_s": zero}) * rows + axes["v_r"]
        first = tirx.BufferStore(store.buffer, tirx.BufferLoad(bias, [slot]), store.indices)
        names = ("iter_vars", "writes", "name_hint", "init", "alloc_buffers")
        fields = {name: getattr(block, name) for name in names}
        reads = [tirx.BufferRegion(bias, [tvm.ir.Range.from_min_extent(slot, 1)])]
        return SBlockRealize(
            node.iter_values, node.predicate, SBlock(**fields, reads=reads, body=first)
        )

    return start


class _Tightener:
    """Gives ragged loops the length of their row block."""

    def __init__(
        self,
        params: Mapping[str, Any],
        kernel: Kernel,
        problem: PlanesProblem | None,
        tile: PlanesTile | None,
        output: Any,
    ) -> None:
        self.params, self.kernel, self.problem, self.tile = params, kernel, problem, tile
        self.held, self.unroll, self.singles = None, 1, None
        if problem is not None and tile is not None:
            self.unroll = tile.unroll(problem)
            if tile.carries(problem):
                self.held = tirx.decl_buffer((AHEAD,), "int32", name="held")
            if tile.singles:
                self.singles = SinglePixels(problem, tile, params, output)
        self.begins: list[Any] = []

    def loop(self, loop: tirx.For) -> tirx.Stmt:
        """A ragged loop, or that over row blocks with what goes before it."""
        if RAGGED in loop.annotations:
            return self._ragged(loop)
        if ROW_BLOCKS in loop.annotations and self.held is not None:
            # In the first row block; those of the loops inside that matter have one iteration.
            inside = {inner.loop_var: tirx.const(0, "int32") for inner in walk(loop, tirx.For)}
            start = substitute(self.begins.pop(), inside)
            entry = tirx.BufferLoad(self.params["indptr"], [start]) * self.unroll
            return in_sequence([*(self._wait(entry, i) for i in range(AHEAD)), loop])
        return loop

    def _wait(self, entry: Any, i: int) -> tirx.Stmt:
        index = tirx.BufferLoad(self.params["index"], [entry + i])
        return tirx.BufferStore(self.held, index, [tirx.const(i, "int32")])

    def _ragged(self, loop: tirx.For) -> tirx.Stmt:
        problem, tile, indptr = self.problem, self.tile, self.params["indptr"]
        blocks: list[Any] = []
        tvm_ffi.structural_walk(loop.body, (SBlockRealize, blocks.append))
        names = [str(iv.var.name) for iv in blocks[0].block.iter_vars]
        axes = dict(zip(names, blocks[0].iter_values, strict=True))
        at = self.kernel.segment(axes)
        zero, steps = tirx.const(0, "int32"), _between(indptr, at, at + 1)
        if problem is None or tile is None:
            return tirx.For(loop.loop_var, loop.min, steps, loop.kind, loop.body)
        if tile.weight_lanes:
            return hold_operands(loop, steps, tile.weight_lanes, tile.entries)
        unroll = self.unroll
        self.begins.append(at)
        if self.singles is not None:
            slot = at * problem.block_rows
            return self.singles.summed(loop, lambda one: _of_length(one, zero, steps), axes, slot)

        def run(i: int) -> tirx.Stmt:
            begin = _between(indptr, at, at + i) * unroll if i else zero
            count = _between(indptr, at + i, at + i + 1) * unroll
            if problem.block_rows == 1:
                return sum_row(loop, begin, count, self.held, tile.ahead)
            return _of_length(loop, begin, count)

        return slide_sums(loop, run, tile.slides, tile.k_tiles > 1)

    def allocated(self, body: SBlockRealize) -> SBlockRealize:
        """The root block with what its tasks need beside."""
        buffers = [] if self.held is None else [self.held]
        buffers += [] if self.singles is None else [self.singles.sums]
        if not buffers:
            return body
        root = body.block
        names = ("iter_vars", "reads", "writes", "name_hint", "body", "init", "annotations")
        fields = {name: getattr(root, name) for name in names}
        block = SBlock(**fields, alloc_buffers=[*root.alloc_buffers, *buffers])
        return SBlockRealize(body.iter_values, body.predicate, block)


def _of_length(loop: tirx.For, begin: Any, count: Any) -> tirx.For:
    """`count` iterations of a loop from `begin` on, with variables of its own."""
    p = tirx.Var("p", "int32")
    body = substitute(loop.body, {loop.loop_var: begin + p})
    return tirx.For(p, tirx.const(0, "int32"), count, loop.kind, renamed(body))


def _between(indptr: Any, first: Any, end: Any) -> Any:
    """Steps of the ragged sum from one place in `indptr` to another."""
    return tirx.BufferLoad(indptr, [end]) - tirx.BufferLoad(indptr, [first])
