"""Local rewrites that give every view, clamp and arithmetic operator one spelling.

A rule is a function `(rewriter, typed call) -> replacement or None`; it may look at what the
call's arguments are bound to, which has been simplified before.
"""

from __future__ import annotations

from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Expr, GenericConst, Tuple

from .fold_constants import RESHAPES, slices
from .graph import (
    Rewriter,
    Rule,
    array_of,
    constant,
    dtype_of,
    ints,
    is_float,
    op_name,
    static_shape,
    uniform,
)

# elementwise operators of one tensor, and of numbers at most besides
UNARY = ("abs", "clip", "erf", "exp", "log", "negative", "sigmoid", "sqrt", "square", "tanh")
ACTIVATIONS = ("gelu", "gelu_tanh", "leakyrelu", "relu", "selu", "silu", "softplus")

# --- views --------------------------------------------------------------------------------------


def reshape(rw: Rewriter, call: Call) -> Expr | None:
    """Reshape, flatten, squeeze, expand_dims: one `reshape`, none in a row, none without effect.

    Nor are there two that undo each other around an elementwise operator.
    """
    shape = static_shape(call)
    if shape is None or static_shape(call.args[0]) is None:
        return None
    source, below = call.args[0], rw.definition(call.args[0])
    if op_name(below) == "reshape":
        source = below.args[0]
    if static_shape(source) == shape:
        return source
    if op_name(below) in UNARY or op_name(below).removeprefix("nn.") in ACTIVATIONS:
        under = rw.definition(below.args[0])
        if op_name(under) == "reshape" and static_shape(under.args[0]) == shape:
            return Call(below.op, [under.args[0], *below.args[1:]], below.attrs)
    changed = op_name(call) != "reshape" or not source.same_as(call.args[0])
    return relax.op.reshape(source, shape) if changed else None


def permute_dims(rw: Rewriter, call: Call) -> Expr | None:
    """Two permutations make one; one that moves only axes of extent 1 is a reshape."""
    shape = static_shape(call.args[0])
    if shape is None:
        return None
    axes = call.attrs.axes
    order = ints(axes) if axes is not None else tuple(range(len(shape)))[::-1]
    order = tuple(a % len(shape) for a in order)
    below = rw.definition(call.args[0])
    if op_name(below) == "permute_dims":
        inner = below.attrs.axes
        inner = ints(inner) if inner is not None else tuple(range(len(shape)))[::-1]
        joined = [inner[a] % len(shape) for a in order]
        return relax.op.permute_dims(below.args[0], joined)
    moved = [a for a in order if shape[a] != 1]
    if order == tuple(range(len(shape))):
        return call.args[0]
    if moved == sorted(moved):
        return relax.op.reshape(call.args[0], [shape[a] for a in order])
    return None if axes is not None else relax.op.permute_dims(call.args[0], list(order))


def unchanged(_: Rewriter, call: Call) -> Expr | None:
    """broadcast_to, astype and whole slices that give back their argument."""
    x = call.args[0]
    shape = static_shape(x)
    if shape is None or shape != static_shape(call) or dtype_of(x) != dtype_of(call):
        return None
    if op_name(call) == "strided_slice" and slices(call, len(shape)) is None:
        return None
    return x


def take_from_the_end(_: Rewriter, call: Call) -> Expr | None:
    """take with constant indices that count from the end; TVM would read before the start."""
    x, index = call.args
    shape, value, axis = static_shape(x), array_of(index), call.attrs.axis
    if call.attrs.mode != "fast" or shape is None or value is None or value.dtype.kind != "i":
        return None
    extent = prod(shape) if axis is None else shape[int(axis)]
    if value.size == 0 or int(value.min()) >= 0 or int(value.min()) < -extent:
        return None
    counted = np.where(value < 0, value + extent, value).astype(value.dtype)
    return relax.op.take(x, constant(counted), axis, "fast")


def single_concat(_: Rewriter, call: Call) -> Expr | None:
    """A concatenation of one tensor."""
    parts = call.args[0]
    return parts.fields[0] if isinstance(parts, Tuple) and len(parts.fields) == 1 else None


def shape_values(rw: Rewriter, call: Call) -> Expr | None:
    """shape_of, shape_to_tensor and tensor_to_shape of what is known."""
    name, arg = op_name(call), rw.definition(call.args[0])
    if name == "shape_of":
        shape = static_shape(call.args[0])
        return None if shape is None else relax.ShapeExpr(list(shape))
    if name == "shape_to_tensor" and isinstance(arg, relax.ShapeExpr):
        known = all(isinstance(d, tvm.tirx.IntImm) for d in arg.values)
        return constant(np.array(ints(arg.values), "int64")) if known else None
    value = array_of(arg) if name == "tensor_to_shape" else None
    return None if value is None else relax.ShapeExpr([int(v) for v in value])


# --- arithmetic ---------------------------------------------------------------------------------


def constant_second(_: Rewriter, call: Call) -> Expr | None:
    """A constant operand of a commutative operator comes second."""
    left, right = call.args
    if isinstance(left, GenericConst) and not isinstance(right, GenericConst):
        return Call(call.op, [right, left], call.attrs)
    return None


def inverse_operator(_: Rewriter, call: Call) -> Expr | None:
    """x - c is x + (-c); x / c is x * (1/c) where every 1/c is a normal number."""
    x, value = call.args[0], array_of(call.args[1])
    if value is None or not is_float(x):
        return None
    if op_name(call) == "subtract":
        return relax.op.add(x, constant(-value))
    with np.errstate(all="ignore"):
        inverse = (1 / value.astype("float64")).astype(value.dtype)
    tiny = np.finfo(inverse.dtype).tiny
    if not np.all(np.isfinite(inverse) & (np.abs(inverse) >= tiny)):
        return None
    return relax.op.multiply(x, constant(inverse))


def neutral_operand(_: Rewriter, call: Call) -> Expr | None:
    """x + 0 and x * 1 are x where the shape stays."""
    x, bound = call.args[0], uniform(call.args[1], call.args[0])
    neutral = 0.0 if op_name(call) == "add" else 1.0
    return x if bound == neutral and dtype_of(call) == dtype_of(x) else None


def unbroadcast_operand(rw: Rewriter, call: Call) -> Expr | None:
    """An operand that is a broadcast constant need not be broadcast by hand."""
    args = [_broadcast_source(rw, a) for a in call.args]
    if all(new.same_as(old) for new, old in zip(args, call.args, strict=True)):
        return None
    shapes = [static_shape(a) for a in args]
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes) or np.broadcast_shapes(*known) != static_shape(call):
        return None
    return Call(call.op, args, call.attrs)


def _broadcast_source(rw: Rewriter, expr: Expr) -> Expr:
    below = rw.definition(expr)
    if op_name(below) == "broadcast_to" and isinstance(below.args[0], GenericConst):
        return below.args[0]
    return expr


# --- pooling ------------------------------------------------------------------------------------


def mean_axes(_: Rewriter, call: Call) -> Expr | None:
    """Axes of a mean count from the front and ascend."""
    shape = static_shape(call.args[0])
    if shape is None:
        return None
    given = call.attrs.axis
    axes = list(range(len(shape))) if given is None else [a % len(shape) for a in ints(given)]
    if given is not None and sorted(axes) == list(ints(given)):
        return None
    return relax.op.mean(call.args[0], sorted(axes), bool(call.attrs.keepdims))


def global_pool(_: Rewriter, call: Call) -> Expr | None:
    """Average pooling of whole NCHW planes is a mean over axes 2 and 3."""
    shape, attrs = static_shape(call.args[0]), call.attrs
    if shape is None or len(shape) != 4 or attrs.layout != "NCHW" or attrs.out_layout != "NCHW":
        return None
    if static_shape(call) != (*shape[:2], 1, 1):
        return None
    if op_name(call) == "nn.avg_pool2d":
        plain = not any(ints(attrs.padding)) and set(ints(attrs.dilation)) == {1}
        if not plain or ints(attrs.pool_size) != shape[2:]:
            return None
    return relax.op.mean(call.args[0], [2, 3], True)


RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(RESHAPES, (reshape,)),
    "permute_dims": (permute_dims,),
    **dict.fromkeys(("broadcast_to", "astype", "strided_slice"), (unchanged,)),
    "concat": (single_concat,),
    "take": (take_from_the_end,),
    **dict.fromkeys(("shape_of", "shape_to_tensor", "tensor_to_shape"), (shape_values,)),
    **dict.fromkeys(("maximum", "minimum"), (unbroadcast_operand, constant_second)),
    **dict.fromkeys(("add", "multiply"), (unbroadcast_operand, constant_second, neutral_operand)),
    **dict.fromkeys(("subtract", "divide"), (unbroadcast_operand, inverse_operator)),
    "mean": (mean_axes,),
    **dict.fromkeys(("nn.avg_pool2d", "nn.adaptive_avg_pool2d"), (global_pool,)),
}
