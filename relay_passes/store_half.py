"""Let what float16 kernels hand on stay float16 between them.

The kernels have casts around them, and all else computes in float32. Here an operator that moves
elements, or for which 11 bits are as good as its input, takes and gives float16; any other one
computes in float32, and its casts are fused into it. Inputs and outputs of the network keep their
dtype.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir import Call, Expr, IRModule, Tuple, Var

from .graph import Rewriter, array_of, constant, dtype_of, op_name, static_shape

# Results are inputs, or the largest of some, or one rounding away from them.
EXACT = frozenset(
    (
        *("reshape", "permute_dims", "expand_dims", "squeeze", "flatten", "broadcast_to", "tile"),
        *("concat", "split", "strided_slice", "flip", "take", "repeat", "nn.pad"),
        *("nn.relu", "nn.max_pool2d", "maximum", "minimum", "clip", "abs", "negative"),
    )
)
ROUNDED = frozenset(("add", "subtract", "multiply", "nn.leakyrelu"))


def store_half(mod: IRModule) -> IRModule:
    """The module, with every float32 tensor that its kernels made kept as float16."""
    return relax.transform.DeadCodeElimination(["main"])(Rewriter(mod).run(_Half().visit))


class _Half:
    def __init__(self) -> None:
        self.half: dict[Expr, Expr] = {}  # of float32 variables, the float16 tensor they come from

    def visit(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """Keep a result in float16 where its operands are."""
        if not isinstance(value, Call):
            return value
        name = op_name(value)
        if name == "astype":
            return self._cast(rw, value)
        if name not in EXACT | ROUNDED or not self._has_half(value.args):
            return value
        if dtype_of(var) != "float32" or static_shape(var) is None:
            return value
        args = [self._as_half(rw, arg) for arg in value.args]
        made = rw.emit(Call(value.op, args, value.attrs, list(value.ty_args)))
        if dtype_of(made) != "float16":
            return value
        return self._as_float(rw, made)

    def _cast(self, rw: Rewriter, call: Call) -> Expr:
        source = call.args[0]
        if dtype_of(call) == "float16" and source in self.half:
            return self.half[source]
        if dtype_of(call) == "float32" and dtype_of(source) == "float16":
            return self._as_float(rw, source)
        return call

    def _as_float(self, rw: Rewriter, half: Expr) -> Expr:
        whole = rw.emit(relax.op.astype(half, "float32"))
        self.half[whole] = half
        return whole

    def _has_half(self, args: list[Expr]) -> bool:
        """Whether float operands are known in float16, but for constants, and one is not one."""
        found = False
        for arg in args:
            for one in arg.fields if isinstance(arg, Tuple) else [arg]:
                if dtype_of(one) != "float32" or array_of(one) is not None:
                    continue
                if one not in self.half:
                    return False
                found = True
        return found

    def _as_half(self, rw: Rewriter, arg: Expr) -> Expr:
        if isinstance(arg, Tuple):
            return Tuple([self._as_half(rw, field) for field in arg.fields])
        if dtype_of(arg) != "float32":
            return arg
        array = array_of(arg)
        return self.half[arg] if array is None else constant(array.astype("float16"))
