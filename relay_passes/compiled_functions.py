"""Turn functions that the ONNX frontend has compiled already back into operators.

It writes Clip and Pad as calls of PrimFuncs. A call is recognised by making the same function
again and comparing the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import tvm_ffi
from tvm import relax, topi
from tvm.ir import Call, Expr, GlobalVar, IRModule, Tuple
from tvm.tirx import FloatImm, PrimFunc

from .graph import Rewriter, Rule, dtype_of, static_shape

_CLAMPS = {
    "maximum": (topi.maximum, relax.op.maximum),
    "minimum": (topi.minimum, relax.op.minimum),
}


def raise_call_tir(mod: IRModule) -> Rule:
    """A rule that turns compiled maxima, minima and constant pads back into operators."""

    def rule(rw: Rewriter, call: Call) -> Expr | None:
        callee = call.args[0]
        if not isinstance(callee, GlobalVar) or not isinstance(call.args[1], Tuple):
            return None
        if len(call.args) != 2:
            return None
        kind = callee.name_hint.rstrip("0123456789_")
        operands = list(call.args[1].fields)
        if kind in _CLAMPS:
            return _clamp(kind, mod[callee], operands)
        return _pad(mod[callee], operands[0], call) if kind == "pad" else None

    return rule


def _clamp(kind: str, func: PrimFunc, operands: list[Expr]) -> Expr | None:
    te_op, relax_op = _CLAMPS[kind]
    if len(operands) == 2:
        return relax_op(*operands) if _same_function(func, te_op, operands) else None
    for bound in _float_immediates(func):
        if _same_function(func, te_op, [*operands, bound]):
            return relax_op(*operands, relax.const(bound, dtype_of(operands[0])))
    return None


def _pad(func: PrimFunc, x: Expr, call: Call) -> Expr | None:
    """Padding by a constant: at both ends alike, or at one end."""
    shape, to = static_shape(x), static_shape(call)
    if shape is None or to is None or len(shape) != len(to):
        return None
    for before in _befores([b - a for a, b in zip(shape, to, strict=True)]):
        after = [b - a - n for a, b, n in zip(shape, to, before, strict=True)]
        for value in _float_immediates(func):
            if _same_function(func, topi.nn.pad, [x, list(before), after, value]):
                width = [n for pair in zip(before, after, strict=True) for n in pair]
                return relax.op.nn.pad(x, width, "constant", value)
    return None


def _befores(extra: list[int]) -> Iterator[tuple[int, ...]]:
    """How many elements may stand before a tensor that is longer by `extra`."""
    ends = [dict.fromkeys((n // 2, n - n // 2, 0, n)) if n > 0 else (n,) for n in extra]
    if all(n >= 0 for n in extra):
        yield from product(*ends)


def _same_function(func: PrimFunc, te_op: Callable[..., object], args: list[object]) -> bool:
    """Whether `func` is what `te_op(*args)` compiles to."""
    builder = relax.BlockBuilder()
    call = builder.call_te(te_op, *args)
    made = builder.get()[call.args[0]]
    return bool(tvm_ffi.structural_equal(func, made, map_free_vars=True))


def _float_immediates(func: PrimFunc) -> list[float]:
    """The float literals in a function's text, each once."""
    found: list[float] = []

    def visit(node: FloatImm) -> None:
        if float(node.value) not in found:
            found.append(float(node.value))

    tvm_ffi.structural_walk(func.body, (FloatImm, visit))
    return found
