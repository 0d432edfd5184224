"""Gathers out of a few registers: the rewrite behind windows.

Each lane of a rows kernel with windows multiplies an element of its own of `window` vectors of
the input. Scalar code would load these elements one by one, and hardware gathers do just that;
a permutation of registers picks all of them at once. TE has no word for it, so `look_up` puts
vector code in place of the vectorized loop that says the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize

from ..targets import PivotTarget
from .analysis import substitute, walk

# Registers that one instruction picks from, and the intrinsic, by the lanes of a register.
_PERMUTES = {
    16: {1: "llvm.x86.avx512.permvar.sf.512", 2: "llvm.x86.avx512.vpermi2var.ps.512"},
    8: {1: "llvm.x86.avx2.permps"},
}


def can_look_up(target: PivotTarget) -> bool:
    """Whether the target's vectors have an instruction that picks lanes by a vector of numbers."""
    return target.family == "x86" and target.lanes in _PERMUTES


def look_up(body: Any, params: Mapping[str, Any], window: int) -> Any:
    """The body of a rows kernel whose vectorized sums pick from `window` vectors of the input.

    Args:
        body: the scheduled body.
        params: the kernel's parameters by name.
        window: vectors of the input, at least 1.
    """

    def rewrite(loop: tirx.For) -> Any:
        blocks = walk(loop.body, SBlockRealize)
        if loop.kind != tirx.ForKind.VECTORIZED or not blocks:
            return loop
        (realize,) = blocks
        loads = {load.source: load for load in walk(realize.block.body, TensorLoad)}
        if params["starts"] not in loads:
            return loop
        body = _vector_sum(realize.block.body, loads, params, window, int(loop.extent))
        names = ("iter_vars", "reads", "writes", "name_hint", "init", "alloc_buffers")
        block = SBlock(**{name: getattr(realize.block, name) for name in names}, body=body)
        first = substitute(realize.iter_values, {loop.loop_var: tirx.const(0, "int32")})
        return SBlockRealize(first, realize.predicate, block)

    return tvm_ffi.structural_map(body, (tirx.For, rewrite))


def _vector_sum(
    store: tirx.BufferStore,
    loads: Mapping[Any, Any],
    params: Mapping[str, Any],
    window: int,
    lanes: int,
) -> tirx.BufferStore:
    """``acc[r] += weight[e, r] * X[m, starts[e] + index[e, r]]`` for all r of a vector."""
    *outer, row = store.indices
    rows = tirx.Ramp(row, 1, lanes)
    entry = loads[params["weight"]].indices[0]
    which = tirx.BufferLoad(params["index"], [entry, rows]).astype(f"int32x{lanes}")
    x, m = params["X"], loads[params["X"]].indices[0]
    start = tirx.BufferLoad(params["starts"], [entry])
    vectors = [
        tirx.BufferLoad(x, [m, tirx.Ramp(start + v * lanes, 1, lanes)]) for v in range(window)
    ]
    weight = tirx.BufferLoad(params["weight"], [entry, rows])
    so_far = tirx.BufferLoad(store.buffer, [*outer, rows])
    total = so_far + weight * _pick(vectors, which, lanes)
    return tirx.BufferStore(store.buffer, total, [*outer, rows])


def _pick(vectors: Sequence[Any], which: Any, lanes: int) -> Any:
    """The elements of `vectors`, laid end to end, that have the numbers `which`."""
    permute = _PERMUTES[lanes]
    if len(vectors) in permute:
        first, *more = vectors
        name = permute[len(vectors)]
        return tirx.call_llvm_pure_intrin(f"float32x{lanes}", name, first, which, *more)
    half = 1 << (len(vectors) - 1).bit_length() - 1
    upper = tirx.bitwise_and(which, tirx.Broadcast(tirx.const(half * lanes, "int32"), lanes))
    zero = tirx.Broadcast(tirx.const(0, "int32"), lanes)
    return tirx.Select(
        upper.equal(zero),
        _pick(vectors[:half], which, lanes),
        _pick(vectors[half:], which, lanes),
    )
