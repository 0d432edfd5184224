"""Legalise softmax with one division per sum in place of one per element."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx
from tvm.ir import Call, Expr

from .graph import dtype_of, static_shape


def legalize_softmax(builder: relax.BlockBuilder, call: Call) -> Expr:
    """What `relax.transform.LegalizeOps` is to make of ``nn.softmax``; TVM's own if not float32."""
    shape = static_shape(call.args[0])
    if shape is None or dtype_of(call.args[0]) != "float32":
        return call.op.get_attr("FLegalize")(builder, call)
    axis = int(call.attrs.axis) % len(shape)
    return builder.call_te(softmax, call.args[0], axis, primfunc_name_hint="softmax")


def softmax(x: te.Tensor, axis: int) -> te.Tensor:
    """exp(x - max) / sum along an axis of a tensor of any rank, of known shape."""
    rows = [extent for i, extent in enumerate(x.shape) if i != axis]

    def reduced(values: te.Tensor, how: Any, name: str) -> te.Tensor:
        k = te.reduce_axis((0, x.shape[axis]), name="k")

        def element(*row: Any) -> Any:
            return how(values(*row[:axis], k, *row[axis:]), axis=k)

        return te.compute(rows, element, name=name)

    def row_of(index: tuple[Any, ...]) -> list[Any]:
        return [at for i, at in enumerate(index) if i != axis]

    top = reduced(x, te.max, "maximum")
    power = te.compute(x.shape, lambda *i: te.exp(x(*i) - top(*row_of(i))), name="power")
    total = reduced(power, te.sum, "total")
    one = tirx.const(1.0, x.dtype)
    share = te.compute(rows, lambda *row: one / total(*row), name="share")
    return te.compute(x.shape, lambda *i: power(*i) * share(*row_of(i)), name="softmax")
