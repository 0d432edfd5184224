"""Legalise max pooling as its own kernel where that has one."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.ir import Call, Expr

from ..planes import AxisGeometry
from ..schedules.max_pool import is_supported, max_pool
from ..schedules.moves import worth_threads
from ..targets import PivotTarget
from .graph import dtype_of, ints, static_shape

Legalize = Callable[[relax.BlockBuilder, Call], Expr]


def legalize_max_pool2d(target: PivotTarget) -> Legalize:
    """What `relax.transform.LegalizeOps` is to make of ``nn.max_pool2d``.

    The kernel of `schedules.max_pool` for float32 in NCHW without dilation; TVM's own for the rest.
    """

    def legalize(builder: relax.BlockBuilder, call: Call) -> Expr:
        shape, axes = static_shape(call.args[0]), pooled_axes(call)
        if shape is None or axes is None or not is_supported(*axes):
            return call.op.get_attr("FLegalize")(builder, call)
        y, x = axes
        planes = shape[0] * shape[1]
        work = planes * y.output * (y.kernel * x.size + x.kernel * x.output)
        parallel = worth_threads(work, target)
        kernel = max_pool(shape[0], shape[1], y, x, target.lanes, parallel)
        function = builder.add_func(kernel, "max_pool2d")
        return relax.call_tir(function, [call.args[0]], call.ty)

    return legalize


def pooled_axes(call: Call) -> tuple[AxisGeometry, AxisGeometry] | None:
    """Rows and columns of a float32 pooling in NCHW with known sizes; None for any other."""
    attrs, source, result = call.attrs, static_shape(call.args[0]), static_shape(call)
    layouts = {str(attrs.layout), str(attrs.out_layout)}
    if source is None or result is None or layouts != {"NCHW"}:
        return None
    if dtype_of(call.args[0]) != "float32":
        return None
    kernels, strides, dilations = (
        ints(v) for v in (attrs.pool_size, attrs.strides, attrs.dilation)
    )
    before = ints(attrs.padding)[:2]
    y, x = (
        # The last window decides what is read, and so what is padded, in ceil mode too.
        AxisGeometry(size, k, s, d, b, (out - 1) * s + (k - 1) * d + 1 - size - b)
        for size, out, k, s, d, b in zip(
            source[2:], result[2:], kernels, strides, dilations, before, strict=True
        )
    )
    return y, x
