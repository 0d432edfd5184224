"""Keep activations of dense layers as [features, rows] from layer to layer.

The planes kernel reads and writes that layout, so a transpose stands only where a network's own
row-major tensor enters or leaves a chain of dense layers and elementwise operators.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr, Var

from .graph import Rewriter, dtype_of, op_name, static_shape, uniform

ELEMENTWISE = frozenset(
    f"{prefix}{name}"
    for prefix, names in {
        "": "add subtract multiply divide maximum minimum clip exp erf tanh sigmoid sqrt rsqrt "
        "abs negative power",
        "nn.": "relu gelu gelu_tanh silu leakyrelu",
    }.items()
    for name in names.split()
)


class FeatureMajor:
    """Which row-major tensors [..., features] exist as [features, rows] too."""

    def __init__(self) -> None:
        self.twin: dict[Expr, Expr] = {}

    def record(self, rw: Rewriter, matrix: Expr, shape: tuple[int, ...]) -> Expr:
        """The row-major tensor of `shape` whose twin is `matrix` [features, rows]."""
        rows = rw.emit(relax.op.permute_dims(matrix, [1, 0]))
        x = rows if len(shape) == 2 else rw.emit(relax.op.reshape(rows, shape))
        self.twin[x] = matrix
        return x

    def of(self, rw: Rewriter, x: Expr) -> Expr:
        """The [features, rows] form of a row-major tensor."""
        if x not in self.twin:
            shape = static_shape(x)
            assert shape is not None
            rows = x
            if len(shape) != 2:
                rows = rw.emit(relax.op.reshape(x, (int(np.prod(shape[:-1])), shape[-1])))
            self.twin[x] = rw.emit(relax.op.permute_dims(rows, [1, 0]))
        return self.twin[x]

    def follow(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """The value of the old `var`, on its operands' twins where it is elementwise."""
        shape = static_shape(var)
        if shape is None or dtype_of(var) != "float32" or not isinstance(value, Call):
            return value
        if not self._is_elementwise(value, shape):
            return value
        args = [self.twin.get(a, a) if isinstance(a, Var) else a for a in value.args]
        matrix = rw.emit(Call(value.op, args, value.attrs, list(value.ty_args)))
        return self.record(rw, matrix, shape)

    def _is_elementwise(self, call: Call, shape: tuple[int, ...]) -> bool:
        if op_name(call) not in ELEMENTWISE:
            return False
        tensors = [a for a in call.args if isinstance(a, Var)]
        others = [a for a in call.args if not isinstance(a, Var)]
        same = all(a in self.twin and static_shape(a) == shape for a in tensors)
        return bool(tensors) and same and all(_is_scalar(a) for a in others)


def _is_scalar(expr: Expr) -> bool:
    """Whether an operand that is not a variable means the same for any layout."""
    shape = static_shape(expr)
    if shape is None:  # an attribute-like operand, e.g. the bounds of clip
        return True
    return len(shape) <= 2 and np.prod(shape) == 1 and uniform(expr) is not None
