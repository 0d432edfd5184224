"""Schedule moves that the rules share: vectors without a scalar tail, fusing, parallel loops.

A tail without scalar code: an axis of 100 elements and vectors of 16 need 7 vectors, of which
the last may start at 84 instead of 96 and compute 12 elements a second time. `overlap_tail`
asks for that and `finish` writes it, after the last schedule primitive, because TVM's
primitives only know affine loops. It is right wherever computing an element twice gives the
same element: for spatial axes, not for the axis of a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx

from ..targets import PivotTarget
from .analysis import Block, CannotSchedule, offset, substitute, variables, walk
from .squares import transpose_square

Loop = Any
# Tasks of a parallel loop, at least: enough to share out among 16 cores evenly.
TASKS = 32

# Starting a parallel region costs about the time of this many vectorised additions.
PARALLEL_WORK = 1 << 16

MAX_CUTS = 24  # each repeats the loop's code

_OVERLAP = "pivot.overlap"


def extent_of(sch: s_tir.Schedule, loop: Loop) -> int:
    """How many iterations a loop has; its extent must be a constant."""
    return int(sch.get(loop).extent)


def fuse(sch: s_tir.Schedule, loops: Sequence[Loop]) -> Loop:
    """The loops as one."""
    return loops[0] if len(loops) == 1 else sch.fuse(*loops)


def worth_threads(work: int, target: PivotTarget) -> bool:
    """Whether `work`, in additions, repays starting threads on this target."""
    vectors = work * 16 // max(1, target.lanes)  # narrower machines take longer
    return target.cores > 1 and vectors >= PARALLEL_WORK


def overlap_tail(
    sch: s_tir.Schedule, outer: Loop, tile: int, extent: int, cuts: Sequence[int] = ()
) -> None:
    """Let the last of `outer`'s tiles of `tile` elements end at `extent`, over its neighbour.

    With `cuts`, the range is cut there first: no tile crosses a cut, and pieces shorter than
    a tile get one shorter vector. `outer` must not be split or fused after this.
    """
    if extent % tile or cuts:
        sch.annotate(outer, _OVERLAP, [tile, extent, *cuts])


def split_vector(
    sch: s_tir.Schedule,
    block: Block,
    loop: Loop,
    target: PivotTarget,
    cuts: Sequence[int] = (),
) -> Loop | None:
    """Vectorise the last spatial loop of `block`, in pieces of one register if it is longer.

    Args:
        sch: the schedule.
        block: the block.
        loop: its loop.
        target: the machine.
        cuts: where conditions on the loop change.

    Returns:
        The loop over the pieces, None if there is only one.
    """
    extent, lanes = extent_of(sch, loop), block.lanes(target.lanes)
    if extent <= lanes and not cuts:
        sch.vectorize(loop)
        return None
    lanes = min(lanes, extent)
    outer, inner = sch.split(loop, [None, lanes])
    sch.vectorize(inner)
    cuts = cuts[:MAX_CUTS]
    if block.may_run_in_place:  # an element computed again would start from its own result
        cuts = whole_tiles(extent, lanes, cuts)
    overlap_tail(sch, outer, lanes, extent, cuts)
    return outer


def whole_tiles(extent: int, tile: int, cuts: Sequence[int] = ()) -> list[int]:
    """`cuts`, and one more in each piece after its last whole tile, so that no tiles overlap."""
    bounds = [0, *cuts, extent]
    ends = (low + (high - low) // tile * tile for low, high in pairwise(bounds))
    return sorted({cut for cut in (*cuts, *ends) if 0 < cut < extent})


def parallelise(
    sch: s_tir.Schedule, loops: Sequence[Loop], work: int, target: PivotTarget
) -> Loop | None:
    """Fuse `loops` and run them on threads if the `work` repays it; returns the loop."""
    if not loops:
        return None
    if any(_OVERLAP in sch.get(loop).annotations for loop in loops):
        loops = loops[:1]
    outer = fuse(sch, loops)
    if worth_threads(work, target) and extent_of(sch, outer) > 1:
        sch.parallel(outer)
    return outer


def finish(sch: s_tir.Schedule) -> s_tir.Schedule:
    """Write what TVM's primitives cannot express; nothing may be scheduled after.

    The overlapping tiles that `overlap_tail` asked for, flat addresses instead of the quotients
    that merging axes left, and transposes in registers.

    Raises:
        CannotSchedule: a block inside an overlapping loop is not linear in it.
    """
    func = sch.mod["main"]
    loops = walk(func.body, tirx.For)
    if any(_OVERLAP in loop.annotations for loop in loops):
        ranges = {loop.loop_var: ir.Range.from_min_extent(loop.min, loop.extent) for loop in loops}
        func = tvm_ffi.structural_map(func, (tirx.For, lambda loop: _overlap(loop, ranges)))
    arguments = {param for param in func.params if tirx.is_buffer_var(param)}
    func = tvm_ffi.structural_map(func, (s_tir.SBlock, lambda block: _flatten(block, arguments)))
    func = tvm_ffi.structural_map(func, (tirx.For, transpose_square))
    return s_tir.Schedule(tvm_ffi.structural_map(func, (tirx.For, few_tasks)))


def task_count(extent: int) -> int:
    """Into how many equal tasks a parallel loop of `extent` is cut: at least `TASKS`, or all."""
    return next((n for n in range(TASKS, extent + 1) if extent % n == 0), extent)


def few_tasks(loop: tirx.For) -> tirx.For:
    """A parallel loop as a few tasks that each run a stretch of it one by one.

    TVM allocates temporaries once per iteration of the parallel loop, however short that is.
    """
    extent = int(loop.extent) if isinstance(loop.extent, tirx.IntImm) else 0
    if loop.kind != tirx.ForKind.PARALLEL or extent <= TASKS or int(loop.min) != 0:
        return loop
    tasks = task_count(extent)
    stretch = extent // tasks
    dtype = str(loop.loop_var.ty.dtype)
    task, step = tirx.Var("task", dtype), tirx.Var("step", dtype)
    body = substitute(loop.body, {loop.loop_var: task * stretch + step})
    zero, length = tirx.const(0, dtype), tirx.const(stretch, dtype)
    inner = tirx.For(step, zero, length, tirx.ForKind.SERIAL, body)
    return tirx.For(task, zero, tirx.const(tasks, dtype), tirx.ForKind.PARALLEL, inner)


def _flatten(block: Any, arguments: set[Any]) -> Any:
    """`block` with x[0, 0, v] for x[0, v // 7, v % 7]: the same element, found without dividing.

    TVM flattens addresses after it has put tiles into v, and then cannot simplify them.
    Only for the function's arguments, whose layout is fixed.
    """
    analyzer = sym.Analyzer()
    for axis in block.iter_vars:
        analyzer.bind(axis.var, axis.dom)

    def flat(buffer: Any, indices: Sequence[Any]) -> list[Any] | None:
        divided = any(walk(index, (tirx.FloorDiv, tirx.FloorMod)) for index in indices)
        if buffer not in arguments or not divided:
            return None
        address = analyzer.simplify(offset(buffer, indices))
        if walk(address, (tirx.FloorDiv, tirx.FloorMod)):
            return None
        zero = tirx.const(0, str(address.ty))
        return [*[zero] * (len(indices) - 1), address]

    def load(node: Any) -> Any:
        indices = flat(node.source, node.indices)
        return node if indices is None else tirx.BufferLoad(node.source, indices)

    def store(node: Any) -> Any:
        indices = flat(node.buffer, node.indices)
        return node if indices is None else tirx.BufferStore(node.buffer, node.value, indices)

    body = tvm_ffi.structural_map(block.body, [(ir.TensorLoad, load), (tirx.BufferStore, store)])
    if body.same_as(block.body):
        return block
    names = ("iter_vars", "reads", "writes", "name_hint", "init", "alloc_buffers", "match_buffers")
    fields = {name: getattr(block, name) for name in names}
    return s_tir.SBlock(**fields, body=body, annotations=block.annotations)


def _overlap(loop: Any, ranges: dict[Any, Any]) -> Any:
    if _OVERLAP not in loop.annotations:
        return loop
    tile, *bounds = (int(x) for x in loop.annotations[_OVERLAP])
    pieces = sorted({0, *bounds})
    analyzer = sym.Analyzer()
    for var, domain in ranges.items():
        analyzer.bind(var, domain)
    loops = [_piece(loop, tile, low, high, analyzer) for low, high in pairwise(pieces)]
    return loops[0] if len(loops) == 1 else tirx.SeqStmt([renamed(piece) for piece in loops])


def renamed(stmt: Any) -> Any:
    """A copy of `stmt` that defines variables of its own."""
    defined = [loop.loop_var for loop in walk(stmt, tirx.For)]
    defined += [axis.var for block in walk(stmt, s_tir.SBlock) for axis in block.iter_vars]
    defined += [bind.var for bind in walk(stmt, tirx.Bind)]
    return substitute(stmt, {var: tirx.Var(var.name, var.ty) for var in defined})


def _piece(loop: Any, tile: int, low: int, high: int, analyzer: Any) -> Any:
    """`loop` over the elements low..high only, in tiles that overlap if the sizes demand it.

    A piece shorter than a tile becomes one tile with shorter vectors.
    """
    var, size = loop.loop_var, high - low
    count = -(-size // tile)
    aligned = size % tile == 0 or count == 1
    last = tirx.const(max(low, high - tile), str(var.ty))
    start = tirx.min(var * tile + low, last) if count > 1 else last
    vectors = {
        inner.loop_var
        for inner in walk(loop.body, tirx.For)
        if inner.kind == tirx.ForKind.VECTORIZED and int(inner.extent) == tile
    }

    def move(expr: Any) -> Any:
        """`expr` with the tile's start in place of var * tile."""
        linear = sym.detect_linear_equation(expr, [var])
        factor = int(linear[0]) if linear and isinstance(linear[0], tirx.IntImm) else None
        if factor == 0:
            return expr
        if factor is not None and factor % tile == 0:
            return start * (factor // tile) + linear[1]
        raise CannotSchedule(f"{expr} is not linear in the tiles of {var}")

    def move_pair(expr: Any) -> Any:
        """The same where the tile's number and the place in it are axes of their own."""
        if expr.same_as(var):
            first = tirx.const(low // tile, str(var.ty))
            return var + first if count > 1 else first
        return expr + low % tile if count == 1 and variables(expr) & vectors else expr

    def rewrite(realize: Any) -> Any:
        if any(value.same_as(var) for value in realize.iter_values):
            if not aligned or (count > 1 and low % tile):
                raise CannotSchedule(f"the tiles of {var} cannot overlap")
            values = [move_pair(value) for value in realize.iter_values]
        else:
            values = [move(value) for value in realize.iter_values]
        predicate = _moved_predicate(realize.predicate, move, analyzer)
        return s_tir.SBlockRealize(values, predicate, realize.block)

    def shorten(inner: Any) -> Any:
        if inner.loop_var not in vectors:
            return inner
        return _with(inner, extent=tirx.const(size, str(inner.extent.ty)))

    body = tvm_ffi.structural_map(loop.body, (s_tir.SBlockRealize, rewrite))
    if size < tile:
        body = tvm_ffi.structural_map(body, (tirx.For, shorten))
    kept = {key: value for key, value in loop.annotations.items() if key != _OVERLAP}
    extent = tirx.const(count, str(loop.extent.ty))
    return _with(loop, extent=extent, body=body, annotations=kept)


def _with(loop: Any, **changes: Any) -> Any:
    """A copy of a loop with some fields changed."""
    names = ("loop_var", "min", "extent", "kind", "body", "thread_binding", "annotations")
    return tirx.For(*(changes.get(name, getattr(loop, name)) for name in names))


def _moved_predicate(predicate: Any, move: Any, analyzer: Any) -> Any:
    """The block's condition on the moved tiles; bounds that always hold are dropped."""
    if isinstance(predicate, tirx.And):
        left = _moved_predicate(predicate.a, move, analyzer)
        right = _moved_predicate(predicate.b, move, analyzer)
        return analyzer.simplify(tirx.all(left, right))
    if isinstance(predicate, tirx.LT):
        moved = move(predicate.a) < predicate.b
        return tirx.const(True, "bool") if analyzer.can_prove(moved) else moved
    if isinstance(predicate, tirx.IntImm):
        return predicate
    raise CannotSchedule(f"unexpected condition {predicate}")


def in_sequence(statements: Iterable[tirx.Stmt]) -> tirx.Stmt:
    """Statements one after the other; TVM refuses sequences in a sequence, and those of one."""
    flat: list[tirx.Stmt] = []
    for statement in statements:
        flat.extend(statement.seq if isinstance(statement, tirx.SeqStmt) else [statement])
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)
