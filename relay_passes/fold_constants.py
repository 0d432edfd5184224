"""Evaluate operators on constants with NumPy.

Nothing is compiled, so folding hundreds of megabytes of weights costs a few copies. The
operators are those that frontends put between a stored weight and its layer, and those that
compute shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr, Tuple

from .graph import Array, array_of, dtype_of, ints, op_name, static_shape

# A folded constant may be this large even where its inputs are smaller (zeros, broadcasts).
FREE_BYTES = 1 << 20

_ELEMENTWISE: dict[str, Callable[..., Array]] = {
    "abs": np.abs,
    "add": np.add,
    "ceil": np.ceil,
    "cos": np.cos,
    "equal": np.equal,
    "exp": np.exp,
    "floor": np.floor,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "isfinite": np.isfinite,
    "isinf": np.isinf,
    "isnan": np.isnan,
    "less": np.less,
    "less_equal": np.less_equal,
    "log": np.log,
    "logical_and": np.logical_and,
    "logical_not": np.logical_not,
    "logical_or": np.logical_or,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "negative": np.negative,
    "nn.relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "not_equal": np.not_equal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "subtract": np.subtract,
    "tanh": np.tanh,
    "where": np.where,
}
# Only floats: integer division rounds differently in NumPy and in TVM.
_FLOAT_ONLY: dict[str, Callable[..., Array]] = {"divide": np.divide, "power": np.power}
RESHAPES = ("reshape", "expand_dims", "squeeze", "flatten", "nn.batch_flatten")
_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "max": np.max,
    "mean": np.mean,
    "min": np.min,
    "prod": np.prod,
    "sum": np.sum,
}
_FILLS = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1}


def tensor_args(call: Call) -> list[Expr]:
    """The tensors a call reads, those of a tuple argument (concat) included."""
    args: list[Expr] = []
    for arg in call.args:
        fields = arg.fields if isinstance(arg, Tuple) else [arg]
        args += [a for a in fields if isinstance(a.ty, relax.TensorType)]
    return args


def evaluate(call: Call, arrays: Sequence[Array]) -> Array | list[Array] | None:
    """The value of a typed call whose tensor arguments have the values `arrays`.

    Returns one array, a list for a split, or None where the operator is not known here, its
    value is not certain to be what TVM would compute, or the result would be much larger than
    what it is made from.
    """
    with np.errstate(all="ignore"):
        result = _evaluate(call, arrays)
    if result is None or isinstance(result, list):
        return result
    shape, dtype = static_shape(call), dtype_of(call)
    if shape != result.shape or result.dtype.kind != np.dtype(dtype).kind:
        return None
    if result.nbytes > max(FREE_BYTES, sum(a.nbytes for a in arrays)):
        return None
    return result.astype(dtype, copy=False)


def _evaluate(call: Call, arrays: Sequence[Array]) -> Array | list[Array] | None:
    """`evaluate` before its result is checked against the call's type."""
    name, shape = op_name(call), static_shape(call)
    if name in _ELEMENTWISE:
        return np.asarray(_ELEMENTWISE[name](*arrays))
    if name in _FLOAT_ONLY and all(a.dtype.kind == "f" for a in arrays):
        return np.asarray(_FLOAT_ONLY[name](*arrays))
    if name == "split":
        return _split(call, arrays[0])
    if shape is None:
        return None
    if name in RESHAPES:
        return arrays[0].reshape(shape)
    if name == "broadcast_to":
        return np.broadcast_to(arrays[0], shape)
    if name in _FILLS:
        return _filled(call, shape, _FILLS[name])
    if name in ("full", "full_like"):
        return _filled(call, shape, arrays[-1])
    if name == "permute_dims":
        axes = call.attrs.axes
        return arrays[0].transpose(None if axes is None else ints(axes))
    if name == "concat":
        axis = call.attrs.axis
        return np.concatenate(list(arrays), 0 if axis is None else int(axis))
    if name in _REDUCTIONS and arrays[0].dtype.kind == "f":
        axis = call.attrs.axis
        axes = None if axis is None else ints(axis)
        return np.asarray(_REDUCTIONS[name](arrays[0], axes)).reshape(shape)
    if name == "matmul" and {a.dtype.kind for a in arrays} == {"f"}:
        return np.asarray(np.matmul(arrays[0], arrays[1], dtype=np.float64))
    if name == "astype":
        return _astype(arrays[0], dtype_of(call))
    if name == "take":
        return _take(call, arrays)
    return _strided_slice(call, arrays[0]) if name == "strided_slice" else None


def _filled(call: Call, shape: tuple[int, ...], value: Array | int) -> Array | None:
    """An array of one value, unless it is too large to be worth storing."""
    dtype = np.dtype(dtype_of(call))
    if int(np.prod(shape)) * dtype.itemsize > FREE_BYTES:
        return None
    return np.full(shape, value, dtype)


def _astype(x: Array, dtype: str) -> Array | None:
    """A cast that is exact or rounds to nearest; casts that could overflow are left to TVM."""
    try:
        target = np.dtype(dtype)
    except TypeError:  # bfloat16, float8
        return None
    if x.dtype.kind == "f" and target.kind != "f":
        return None
    return x.astype(target)


def _take(call: Call, arrays: Sequence[Array]) -> Array | None:
    """Rows picked by valid indices; what others pick depends on the mode."""
    data, index = arrays
    axis = call.attrs.axis
    axis = 0 if axis is None else int(axis)
    if index.dtype.kind not in "iu" or index.size == 0:
        return None
    if int(index.min()) < 0 or int(index.max()) >= data.shape[axis]:
        return None
    return np.take(data, index, axis)


def slices(call: Call, rank: int) -> tuple[slice, ...] | None:
    """A `strided_slice` as Python slices; None for open bounds or negative strides."""
    parts = [ints([f.value for f in arg.fields]) for arg in call.args[1:] if isinstance(arg, Tuple)]
    if len(parts) != len(call.args) - 1 or len(parts) < 3:
        return None
    axes, begins, ends = parts[:3]
    strides = parts[3] if len(parts) > 3 else (1,) * len(axes)
    if any(s < 1 for s in strides):
        return None
    out = [slice(None)] * rank
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        out[axis] = slice(begin, end, stride)
    return tuple(out)


def _strided_slice(call: Call, x: Array) -> Array | None:
    picked = slices(call, x.ndim)
    return None if picked is None else x[picked]


def _split(call: Call, x: Array) -> list[Array] | None:
    """The parts of an evenly divided or indexed split."""
    sections, axis = call.attrs.indices_or_sections, int(call.attrs.axis)
    parts = int(sections) if not hasattr(sections, "__len__") else list(ints(sections))
    if isinstance(parts, int) and x.shape[axis] % parts:
        return None
    return list(np.split(x, parts, axis))


def constants(call: Call) -> list[Array] | None:
    """The values of the tensors a call's result depends on; None if any is not a constant."""
    # of the tensor whose likeness they take, fills read the shape only
    skip = 1 if op_name(call) in ("zeros_like", "ones_like", "full_like") else 0
    arrays = [array_of(a) for a in tensor_args(call)[skip:]]
    known = [a for a in arrays if a is not None]
    return known if len(known) == len(arrays) else None
