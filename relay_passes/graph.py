"""Small helpers for reading and re-emitting Relax functions.

A function is read as a list of bindings (`live_bindings`) and written again, binding by binding,
by a `Rewriter`, always as one dataflow block in A-normal form. Passes differ only in what they
return for a binding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.ir import Call, Expr, GenericConst, IRModule, Op, Tuple, Var

Array = NDArray[Any]
MAIN = "main"


def op_name(expr: Expr | None) -> str:
    """``"nn.conv2d"`` for a call of the operator ``relax.nn.conv2d``; ``""`` for all else."""
    if isinstance(expr, Call) and isinstance(expr.op, Op):
        return str(expr.op.name).removeprefix("relax.")
    return ""


def static_shape(expr: Expr) -> tuple[int, ...] | None:
    """The shape of a tensor expression; None for tuples, and where a dimension is open."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        return None
    dims = ty.shape.values
    if not all(isinstance(d, tvm.tirx.IntImm) for d in dims):
        return None
    return tuple(int(d) for d in dims)


def dtype_of(expr: Expr) -> str:
    """The element type of a tensor expression (``"float32"``); ``""`` where there is none."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or ty.dtype is None:
        return ""
    return str(ty.dtype)


def is_float(expr: Expr) -> bool:
    """Whether an expression is a tensor of float16, float32 or float64."""
    return dtype_of(expr) in ("float16", "float32", "float64")


def constant(value: Array, dtype: str | None = None) -> GenericConst:
    """A tensor constant of exactly `dtype` (default: the array's own)."""
    # relax.const would silently narrow float64 and int64 arrays when given no dtype
    array = np.ascontiguousarray(value, dtype=dtype).reshape(np.shape(value))
    return relax.const(array, str(array.dtype))


def stored(value: Array, dtype: str) -> Array:
    """An array rounded to `dtype`, which may be ``"bfloat16"``."""
    return value.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def array_of(expr: Expr) -> Array | None:
    """The value of a tensor constant, without a copy (do not write to it); None for all else."""
    if isinstance(expr, GenericConst) and isinstance(expr.value, tvm.runtime.Tensor):
        tensor = expr.value
        # bfloat16 and float8 have no NumPy dtype of their own that DLPack could name
        if str(tensor.dtype).startswith(("float8_", "float6_", "float4_", "bfloat")):
            return None
        return np.from_dlpack(tensor)
    return None


def uniform(expr: Expr, like: Expr | None = None) -> float | None:
    """The one value of a float constant that does not enlarge `like` when broadcast to it."""
    value = array_of(expr)
    if value is None or value.dtype.kind != "f" or value.size == 0:
        return None
    first = value.flat[0]
    if value.size > 1 and not np.all(value == first):
        return None
    if like is not None:
        shape = static_shape(like)
        if shape is None or np.broadcast_shapes(shape, value.shape) != shape:
            return None
    return float(first)


def ints(values: Sequence[object] | None) -> tuple[int, ...]:
    """A sequence of TVM integers (attributes, shape dimensions) as Python integers."""
    return tuple(int(v) for v in values or ())  # type: ignore[call-overload]


def variables(expr: Expr) -> Iterator[Var]:
    """Every variable an A-normal expression mentions, once per mention."""
    if isinstance(expr, Var):
        yield expr
    elif isinstance(expr, Call):
        for arg in expr.args:
            yield from variables(arg)
    elif isinstance(expr, Tuple):
        for field in expr.fields:
            yield from variables(field)
    elif isinstance(expr, relax.TupleGetItem):
        yield from variables(expr.tuple_value)


def substitute(expr: Expr, remap: dict[Var, Expr]) -> Expr:
    """An A-normal expression with variables replaced; the same object if none is."""
    if isinstance(expr, Var):
        return remap.get(expr, expr)
    if not any(v in remap for v in variables(expr)):
        return expr
    if isinstance(expr, Call):
        args = [substitute(a, remap) for a in expr.args]
        return Call(expr.op, args, expr.attrs, list(expr.ty_args))
    if isinstance(expr, Tuple):
        return Tuple([substitute(f, remap) for f in expr.fields])
    return relax.TupleGetItem(substitute(expr.tuple_value, remap), expr.index)


def is_straight_line(func: relax.Function) -> bool:
    """Whether a function is pure, without branches, casts of shapes or nested functions."""
    if relax.analysis.contains_impure_call(func):
        return False
    bindings = [b for block in func.body.blocks for b in block.bindings]
    plain = (Call, Tuple, relax.TupleGetItem, Var, GenericConst, relax.ShapeExpr)
    return all(isinstance(b, relax.VarBinding) and isinstance(b.value, plain) for b in bindings)


def live_bindings(func: relax.Function) -> list[tuple[Var, Expr]]:
    """The bindings of a straight-line function that its result depends on, in order."""
    every = [(b.var, b.value) for block in func.body.blocks for b in block.bindings]
    needed = set(variables(func.body.body))
    live = []
    for var, value in reversed(every):
        if var in needed:
            live.append((var, value))
            needed.update(variables(value))
    return live[::-1]


def count_uses(func: relax.Function) -> Counter[Var]:
    """How often each variable is mentioned by live bindings and the result."""
    uses = Counter(variables(func.body.body))
    for _, value in live_bindings(func):
        uses.update(variables(value))
    return uses


class Rewriter:
    """Writes a straight-line function again as one dataflow block in A-normal form.

    `visit(rewriter, old_var, value)` gets every live binding, its arguments already replaced by
    their new forms, and returns what the old variable shall stand for: an expression to be
    emitted, or a variable or constant to be used in its place.
    """

    def __init__(self, mod: IRModule) -> None:
        self.mod = mod
        self.builder = relax.BlockBuilder()
        self.remap: dict[Var, Expr] = {}

    def emit(self, value: Expr, name: str = "") -> Expr:
        """Bind an expression to a new variable; variables and constants pass through."""
        return value if isinstance(value, Var | GenericConst) else self.builder.emit(value, name)

    def reshape(self, x: Expr, shape: tuple[int, ...]) -> Expr:
        """A tensor in another shape: one reshape of what it was reshaped from, or none."""
        while static_shape(x) != shape and op_name(source := self.definition(x)) == "reshape":
            assert isinstance(source, Call)
            x = source.args[0]
        return x if static_shape(x) == shape else self.emit(relax.op.reshape(x, shape))

    def definition(self, expr: Expr) -> Expr:
        """What an emitted variable is bound to; any other expression itself."""
        bound = self.builder.lookup_binding(expr) if isinstance(expr, Var) else None
        return expr if bound is None else bound

    def run(self, visit: Callable[[Rewriter, Var, Expr], Expr]) -> IRModule:
        """Rewrite `main` and return the module with the new one; the old one is not changed."""
        func = self.mod[MAIN]
        attrs = dict(func.attrs) if func.attrs else None
        live = live_bindings(func)
        result = func.body.body
        # the binding of the result itself becomes the block's output, not an alias of it
        ends = bool(live) and live[-1][0].same_as(result)
        with self.builder.function(MAIN, list(func.params), attrs=attrs):
            with self.builder.dataflow():
                for var, value in live[:-1] if ends else live:
                    new = visit(self, var, substitute(value, self.remap))
                    # names that say something last: reports and dumps show them
                    self.remap[var] = self.emit(new, telling(var.name))
                value = substitute(live[-1][1] if ends else result, self.remap)
                output = self.builder.emit_output(visit(self, result, value) if ends else value)
            self.builder.emit_func_output(output)
        written = self.builder.get()
        out = tvm.ir.IRModule(dict(self.mod.functions_items()), attrs=self.mod.attrs)
        out.update_func(out.get_global_var(MAIN), written[MAIN])
        return out


def telling(name: str) -> str:
    """A variable's own name: empty for one that a builder made up, without a step's mark."""
    return "" if re.fullmatch(r"(lv|gv)\d*", name) else re.sub(r"__step\d*$", "", name)


def step_name(name: str) -> str:
    """The name of one of several candidates for a variable, of which one will live."""
    return f"{name}__step" if name else ""


Rule = Callable[[Rewriter, Call], Expr | None]
