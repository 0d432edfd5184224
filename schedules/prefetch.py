"""Prefetches for kernels that stream their weights from memory, which reads every byte once.

The processor's own prefetchers stop at the end of every page, and look less far ahead.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlockRealize

from .analysis import substitute, walk

LINE_BYTES = 64
_FLOAT_BYTES = 4


def prefetch_weights(body: Any, weight: Any, mark: str, entries: int, ahead: int) -> Any:
    """`body` with prefetches in its innermost loop over packed entries.

    Args:
        body: of a scheduled rows kernel.
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
            _prefetch(tirx.BufferLoad(weight, [first + at // per_entry, at % per_entry // 4]))
            for at in range(0, entries * per_entry, LINE_BYTES)
        ]
        inner = tirx.SeqStmt([*steps, loop.body])
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, loop.kind, inner, annotations=loop.annotations
        )

    return tvm_ffi.structural_map(body, (tirx.For, add))


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


def _prefetch(element: Any) -> tirx.Stmt:
    """For reading, into all caches, as data."""
    how = [tirx.const(value, "int32") for value in (0, 3, 1)]
    address = tirx.address_of(element)
    return tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *how))
