"""Prefetches for kernels that stream their weights from beyond level 2.

The processor's own prefetchers stop at the end of every page, and look less far ahead.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import StringImm, TensorLoad
from tvm.s_tir import SBlockRealize

from ..planes import LINE_FLOATS
from .analysis import substitute, walk
from .moves import in_sequence

_FLOAT_BYTES = 4
LINE_BYTES = LINE_FLOATS * _FLOAT_BYTES
# LLVM takes a prefetch for a read of memory, before which sums that rest in registers must be
# stored. These are declared to touch nothing that the kernel sees.
_FUNCTION = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr void @pivot_prefetch_level%d(ptr %%p) #0 {
call void @llvm.prefetch.p0(ptr %%p, i32 0, i32 %d, i32 1) #1
ret void
}
attributes #0 = { alwaysinline nounwind willreturn memory(inaccessiblemem: readwrite) }
attributes #1 = { nounwind willreturn memory(inaccessiblemem: readwrite) }
"""


def prefetch_weights(body: Any, weight: Any, mark: str, entries: int, ahead: int) -> Any:
    """`body` with prefetches in its innermost loop over packed entries.

    Args:
        body: of a scheduled kernel.
        weight: its parameter of that name, [entries, rows].
        mark: the annotation of that loop.
        entries: packed entries of one iteration.
        ahead: entries between those that are used and those that are fetched. Beyond the last one
            nothing is read: a prefetch of an address that is no memory does nothing.
    """

    def add(loop: tirx.For) -> tirx.For:
        if mark not in loop.annotations:
            return loop
        first = _first_entry(loop, weight) + ahead
        per_entry = int(weight.ty.shape[1]) * _FLOAT_BYTES
        steps = [
            _prefetch(tirx.BufferLoad(weight, [first + at // per_entry, at % per_entry // 4]), 2)
            for at in range(0, entries * per_entry, LINE_BYTES)
        ]
        inner = tirx.SeqStmt([*steps, loop.body])
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, inner, annotations=loop.annotations
        )

    return tvm_ffi.structural_map(body, (tirx.For, add))


def prefetch_inputs(
    body: Any, index: Any, marks: tuple[str, str], lanes: int, aligned: bool, ahead: int
) -> Any:
    """`body` with prefetches of what its innermost loop over packed entries reads of the planes.

    Args:
        body: of a scheduled kernel.
        index: its parameter of that name, behind whose last value there are `ahead` more.
        marks: the annotations of that loop, whose iterations take one entry, and of the one inside
            over the vectors that an entry reads, one behind the other.
        lanes: floats of a vector.
        aligned: what entries read begins with a cache line, and ends with one.
        ahead: entries between those that are used and those whose inputs are fetched.
    """
    each, vectors = marks

    def add(loop: tirx.For) -> tirx.For:
        if each not in loop.annotations:
            return loop
        (inside,) = (one for one in walk(loop.body, tirx.For) if vectors in one.annotations)
        floats = lanes * int(inside.extent)
        lines = [*range(0, floats, LINE_FLOATS), *([] if aligned else [floats - 1])]
        first = _first_input(loop, index)
        later = {loop.loop_var: loop.loop_var + ahead}
        at = [substitute(place, later) for place in first.indices]
        steps = [
            _prefetch(tirx.BufferLoad(first.source, [*at[:-1], at[-1] + line]), 1) for line in lines
        ]
        inner = in_sequence([*steps, loop.body])
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, inner, annotations=loop.annotations
        )

    return tvm_ffi.structural_map(body, (tirx.For, add))


def _first_input(loop: tirx.For, index: Any) -> Any:
    """The load of the first float that an iteration of the loop reads of the planes."""
    for realize in walk(loop.body, SBlockRealize):
        for load in walk(realize, TensorLoad):
            if any(
                inner.source.same_as(index) for at in load.indices for inner in walk(at, TensorLoad)
            ):
                axes = zip(realize.block.iter_vars, realize.iter_values, strict=True)
                own = substitute(load, {axis.var: value for axis, value in axes})
                starts = {one.loop_var: tirx.const(0, "int32") for one in walk(loop.body, tirx.For)}
                return substitute(own, starts)
    raise ValueError("the loop reads no planes")


def _first_entry(loop: tirx.For, weight: Any) -> Any:
    """The first packed entry that an iteration of the loop reads."""
    for realize in walk(loop.body, SBlockRealize):
        loads = [load for load in walk(realize, TensorLoad) if load.source.same_as(weight)]
        if loads:
            axes = zip(realize.block.iter_vars, realize.iter_values, strict=True)
            entry = substitute(loads[0].indices[0], {axis.var: value for axis, value in axes})
            inner = walk(loop.body, tirx.For)
            starts = {one.loop_var: tirx.const(0, str(one.loop_var.ty.dtype)) for one in inner}
            return substitute(entry, starts)
    raise ValueError("the loop reads no weights")


def _prefetch(element: Any, level: int) -> tirx.Stmt:
    """For reading, as data, into the caches from `level` on.

    What comes from beyond level 2 takes long, and level 1 can wait for few lines at a time.
    """
    name, address = f"pivot_prefetch_level{level}", tirx.address_of(element)
    call, zero = tirx.Evaluate(tirx.call_extern("void", name, address)), tirx.const(0, "int32")
    function = StringImm(prefetch_function(level))
    return tirx.AttrStmt(zero, "pragma_import_llvm", function, call)


def prefetch_function(level: int) -> str:
    """The function ``pivot_prefetch_level{level}`` of a pointer, in LLVM's language."""
    # In LLVM's terms of locality 3 is for all levels.
    return _FUNCTION % (level, 4 - level)
