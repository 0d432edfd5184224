"""Let what kernels of 16-bit numbers hand on stay in 16 bits between them.

The kernels have casts around them, and all else computes in float32. Here an operator that moves
elements, or whose result one more rounding makes no worse than its inputs, takes and gives 16-bit
numbers, float16 or bfloat16; any other one computes in float32, and its casts are fused into it.
Inputs and outputs of the network keep their dtype.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir import Call, Expr, IRModule, Tuple, Var

from .graph import Rewriter, array_of, constant, dtype_of, op_name, static_shape, stored

# Results are inputs, or the largest of some, or one rounding away from them.
EXACT = frozenset(
    (
        *("reshape", "permute_dims", "expand_dims", "squeeze", "flatten", "broadcast_to", "tile"),
        *("concat", "split", "strided_slice", "flip", "take", "repeat", "nn.pad"),
        *("nn.relu", "nn.max_pool2d", "maximum", "minimum", "clip", "abs", "negative"),
    )
)
ROUNDED = frozenset(("add", "subtract", "multiply", "nn.leakyrelu"))


def store_half(mod: IRModule, dtype: str) -> IRModule:
    """The module, with every float32 tensor that its kernels made kept as `dtype`.

    Args:
        mod: the module, with kernels that take and give `dtype`.
        dtype: ``"float16"`` or ``"bfloat16"``.
    """
    return relax.transform.DeadCodeElimination(["main"])(Rewriter(mod).run(_Half(dtype).visit))


class _Half:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.half: dict[Expr, Expr] = {}  # of float32 variables, the 16-bit tensor they come from

    def visit(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """Keep a result in float16 where its operands are."""
        if not isinstance(value, Call):
            return value
        name = op_name(value)
        if name == "astype":
            return self._cast(rw, dtype_of(var), value)
        if name not in EXACT | ROUNDED or not self._has_half(value.args):
            return value
        if dtype_of(var) != "float32" or static_shape(var) is None:
            return value
        args = [self._as_half(rw, arg) for arg in value.args]
        made = rw.emit(Call(value.op, args, value.attrs, list(value.ty_args)))
        if dtype_of(made) != self.dtype:
            return value
        return self._as_float(rw, made)

    def _cast(self, rw: Rewriter, dtype: str, call: Call) -> Expr:
        # The call has no type yet where its argument was replaced: `dtype` is that of its variable.
        source = call.args[0]
        if dtype == self.dtype and source in self.half:
            return self.half[source]
        if dtype == "float32" and dtype_of(source) == self.dtype:
            return self._as_float(rw, source)
        return call

    def _as_float(self, rw: Rewriter, half: Expr) -> Expr:
        whole = rw.emit(relax.op.astype(half, "float32"))
        self.half[whole] = half
        return whole

    def _has_half(self, args: list[Expr]) -> bool:
        """Whether float operands are known in 16 bits, but for constants, and one is not one."""
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
        return self.half[arg] if array is None else constant(stored(array, self.dtype))
