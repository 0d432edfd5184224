"""Clamps in all their disguises: relu, clip, maximum, minimum, where."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr
from tvm.tirx import FloatImm, IntImm

from .graph import Rewriter, Rule, dtype_of, is_float, op_name, static_shape, uniform

FLOAT32_MAX = float(np.finfo(np.float32).max)


def clamp_bounds(call: Expr) -> tuple[float, float] | None:
    """(low, high) of a float operator that clamps its first argument; None for any other."""
    name = op_name(call)
    if not name or not call.args or not is_float(call.args[0]):
        return None
    if name == "nn.relu":
        return 0.0, math.inf
    if name == "clip":
        low, high = (_number(a) for a in call.args[1:3])
        if low is None or high is None or not low <= high:
            return None
        return (
            -math.inf if low <= -FLOAT32_MAX else low,
            math.inf if high >= FLOAT32_MAX else high,
        )
    bound = uniform(call.args[1], call.args[0]) if name in ("maximum", "minimum") else None
    if bound is None or math.isnan(bound):
        return None
    return (bound, math.inf) if name == "maximum" else (-math.inf, bound)


def _number(expr: Expr) -> float | None:
    if isinstance(expr, IntImm | FloatImm):
        return float(expr.value)
    return uniform(expr)


def clamp(rw: Rewriter, call: Call) -> Expr | None:
    """Spell a clamp as relu, clip, or maximum/minimum with a scalar; join clamps in a row."""
    bounds = clamp_bounds(call)
    if bounds is None:
        return None
    (low, high), x = bounds, call.args[0]
    inner = clamp_bounds(rw.definition(x))
    if inner is not None:
        x = rw.definition(x).args[0]
        low, high = (min(max(b, low), high) for b in inner)
    clamped = spell_clamp(x, low, high)
    same = op_name(clamped) == op_name(call) and inner is None
    if same and [str(a) for a in clamped.args[1:]] == [str(a) for a in call.args[1:]]:
        return None
    return clamped


def spell_clamp(x: Expr, low: float, high: float) -> Expr:
    """The one way to write min(max(x, low), high)."""
    if high == math.inf:
        if low == 0:
            return relax.op.nn.relu(x)
        return x if low == -math.inf else relax.op.maximum(x, relax.const(low, dtype_of(x)))
    if low == -math.inf:
        return relax.op.minimum(x, relax.const(high, dtype_of(x)))
    return relax.op.clip(x, float(low), float(high))


def where(rw: Rewriter, call: Call) -> Expr | None:
    """where(x > 0, x, 0) and its mirror images are relu."""
    condition = rw.definition(call.args[0])
    name = op_name(condition)
    if name not in ("greater", "greater_equal", "less", "less_equal"):
        return None
    x, bound = condition.args
    then, other = call.args[1:]
    if name.startswith("less"):
        then, other = other, then
    if uniform(bound) != 0 or not then.same_as(x) or uniform(other, x) != 0:
        return None
    return relax.op.nn.relu(x) if static_shape(call) == static_shape(x) else None


RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(("nn.relu", "clip", "maximum", "minimum"), (clamp,)),
    "where": (where,),
}
