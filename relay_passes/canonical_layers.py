"""Dense and convolution layers in one form each.

A dense layer is ``relax.matmul(x, const[K, N])``; a convolution is ``relax.nn.conv2d`` with
layouts NCHW and OIHW. `fold_channels` turns conv1d into conv2d as well, once the layer's bias
and scale are known.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Call, Expr, GenericConst

from .graph import Array, Rewriter, Rule, array_of, constant, dtype_of, ints, op_name, static_shape

CONVS = ("nn.conv2d", "nn.conv1d")


def _weight(rw: Rewriter, expr: Expr) -> Array | None:
    """A constant, or a matrix that a broadcast repeats whole; leading axes of extent 1 are cut."""
    below, shape = rw.definition(expr), static_shape(expr)
    value = array_of(below)
    if op_name(below) == "broadcast_to":
        value = array_of(below.args[0])
        if value is None or shape is None or value.shape[-2:] != shape[-2:]:
            return None
    while value is not None and value.ndim > 2 and value.shape[0] == 1:
        value = value[0]
    return value if value is not None and value.dtype.kind == "f" else None


def _reuse(expr: Expr, value: Array) -> GenericConst:
    """The constant that holds `value`: `expr` itself where it does already."""
    held = isinstance(expr, GenericConst) and static_shape(expr) == value.shape
    return expr if held else constant(value)


def dense(rw: Rewriter, call: Call) -> Expr | None:
    """matmul with a constant on one side -> matmul(x, const[K, N]), views around it as needed."""
    shape, dtypes = static_shape(call), {dtype_of(e) for e in (*call.args, call)}
    if shape is None or len(dtypes) != 1:
        return None
    if array_of(call.args[0]) is None:
        return _dense(rw, call, shape)
    return _mirrored(rw, call, shape)


def _dense(rw: Rewriter, call: Call, shape: tuple[int, ...]) -> Expr | None:
    """x @ const, where const is a matrix or a matrix repeated over a batch."""
    x, w = call.args
    value, x_shape = _weight(rw, w), static_shape(x)
    if value is None or value.ndim != 2 or x_shape is None:
        return None
    if len(x_shape) == 1:
        row = rw.emit(relax.op.reshape(x, (1, *x_shape)))
        return relax.op.reshape(rw.emit(relax.op.matmul(row, _reuse(w, value))), shape)
    weight = _reuse(w, value)
    result = (*x_shape[:-1], value.shape[1])
    scaled = rw.definition(x)
    if op_name(scaled) == "multiply" and static_shape(scaled.args[1]) == () and _fits(scaled):
        # alpha of a Gemm: behind the matmul it folds into the weights
        product = rw.emit(relax.op.matmul(scaled.args[0], weight))
        return relax.op.multiply(product, scaled.args[1]) if result == shape else None
    if result == shape:
        changed = not weight.same_as(w) or call.attrs.out_dtype is not None
        return relax.op.matmul(x, weight) if changed else None
    if [d for d in result if d != 1] == [d for d in shape if d != 1]:
        return relax.op.reshape(rw.emit(relax.op.matmul(x, weight)), shape)
    return None


def _fits(scaled: Call) -> bool:
    """Whether a scalar factor may move behind a sum without risk of overflow (not in float16)."""
    factor = array_of(scaled.args[1])
    return factor is not None and factor.dtype.itemsize >= 4 and abs(float(factor)) <= 2.0**32


def _mirrored(rw: Rewriter, call: Call, shape: tuple[int, ...]) -> Expr | None:
    """const[M, K] @ x -> (x^T @ const^T)^T."""
    value, x, x_shape = _weight(rw, call.args[0]), call.args[1], static_shape(call.args[1])
    if value is None or value.ndim != 2 or x_shape is None:
        return None
    weight = constant(value.T)
    if len(x_shape) == 1:
        row = rw.emit(relax.op.reshape(x, (1, *x_shape)))
        return relax.op.reshape(rw.emit(relax.op.matmul(row, weight)), shape)
    if shape != (*x_shape[:-2], value.shape[0], x_shape[-1]):
        return None
    order = [*range(len(x_shape) - 2), len(x_shape) - 1, len(x_shape) - 2]
    product = rw.emit(relax.op.matmul(rw.emit(relax.op.permute_dims(x, order)), weight))
    return relax.op.permute_dims(product, order)


def absorb_pad(rw: Rewriter, call: Call) -> Expr | None:
    """A zero `nn.pad` of the planes before a convolution becomes the convolution's own padding."""
    below, attrs = rw.definition(call.args[0]), call.attrs
    if op_name(below) != "nn.pad" or attrs.data_layout not in ("NCHW", "NCW"):
        return None
    width = ints(below.attrs.pad_width)
    if below.attrs.pad_mode != "constant" or float(below.attrs.pad_value) != 0 or any(width[:4]):
        return None
    before, after = width[4::2], width[5::2]
    if min(width) < 0:
        return None
    padding = [p + q for p, q in zip(ints(attrs.padding), before + after, strict=True)]
    return make_conv(call, below.args[0], call.args[1], padding=padding)


def make_conv(
    call: Call,
    x: Expr,
    weight: Expr,
    *,
    padding: list[int] | None = None,
    groups: int | None = None,
) -> Call:
    """The convolution `call` with other operands of equal type, and what else is given."""
    a = call.attrs
    make = relax.op.nn.conv2d if op_name(call) == "nn.conv2d" else relax.op.nn.conv1d
    return make(
        x,
        weight,
        strides=list(ints(a.strides)),
        padding=list(ints(a.padding)) if padding is None else padding,
        dilation=list(ints(a.dilation)),
        groups=int(a.groups) if groups is None else groups,
        data_layout=a.data_layout,
        kernel_layout=a.kernel_layout,
        out_layout=a.out_layout,
        out_dtype=None if dtype_of(call) == dtype_of(call.args[0]) else a.out_dtype,
    )


def conv1d_as_conv2d(rw: Rewriter, call: Call, x: Expr, weight: Array) -> Expr:
    """The conv2d over planes of height 1 that computes an NCW conv1d, as [N, O, 1, W]."""
    a, (n, c, w) = call.attrs, static_shape(x)  # type: ignore[misc]
    left, right = ints(a.padding)
    planes = rw.emit(relax.op.reshape(x, (n, c, 1, w)))
    return relax.op.nn.conv2d(
        planes,
        constant(weight[:, :, None, :]),
        strides=[1, *ints(a.strides)],
        padding=[0, left, 0, right],
        dilation=[1, *ints(a.dilation)],
        groups=int(a.groups),
    )


def layouts_are_canonical(mod: tvm.ir.IRModule) -> bool:
    """Whether every conv2d of `main` is NCHW / OIHW."""
    bindings = [b for block in mod["main"].body.blocks for b in block.bindings]
    convs = [b.value for b in bindings if op_name(b.value) == "nn.conv2d"]
    wanted = ("NCHW", "OIHW", "NCHW")
    return all(
        (c.attrs.data_layout, c.attrs.kernel_layout, c.attrs.out_layout) == wanted for c in convs
    )


RULES: dict[str, tuple[Rule, ...]] = {
    "matmul": (dense,),
    **dict.fromkeys(CONVS, (absorb_pad,)),
}
