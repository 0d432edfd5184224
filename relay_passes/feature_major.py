"""Keep activations of dense layers as [features, rows] from layer to layer.

The planes kernel reads and writes that layout, so elements move only where a network's own
row-major tensor enters or leaves a chain of dense layers and of operators that can do with any
order of the axes: elementwise ones, normalisation, and all of an attention. There
`reshape` and `permute_dims` mostly give the same memory new names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr, Var

from ..targets import PivotTarget
from .axis_order import Order, permuted, reshaped, row_major, transposition
from .graph import Rewriter, array_of, constant, dtype_of, ints, op_name, static_shape, uniform

Shape = tuple[int, ...]

# Softmax over an axis that is not contiguous reads a tile of columns, of four vectors each, three
# times. Up to this share of the level-2 cache that costs less than the transposes it saves.
COLUMNS_SHARE = 8
COLUMN_VECTORS = 4

ELEMENTWISE = frozenset(
    f"{prefix}{name}"
    for prefix, names in {
        "": "add subtract multiply divide maximum minimum clip exp erf tanh sigmoid sqrt rsqrt "
        "abs negative power where",
        "nn.": "relu gelu gelu_tanh silu leakyrelu",
    }.items()
    for name in names.split()
)


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in memory: `value` has the axes in `order`, outermost first."""

    value: Expr
    order: Order


@dataclass
class FeatureMajor:
    """Which tensors of the new function are stored in an order other than row-major.

    Each of them is bound as a row-major tensor too, which costs nothing if nobody reads it.

    Attributes:
        target: the machine; sums leave the order if its contiguous axis fills no vector.
        stored: how each tensor lies in memory.
        matrices: tensors as [features, rows], where one has been asked for.
    """

    target: PivotTarget
    stored: dict[Expr, _Stored] = field(default_factory=dict)
    matrices: dict[Expr, Expr] = field(default_factory=dict)

    def record(self, rw: Rewriter, matrix: Expr, shape: Shape) -> Expr:
        """The row-major tensor of `shape` [..., features] that `matrix` [features, rows] holds."""
        order = _features_first(shape)
        x = _bind(self, rw, rw.reshape(matrix, _extents(shape, order)), order, shape)
        self.matrices[x] = matrix
        return x

    def of(self, rw: Rewriter, x: Expr) -> Expr:
        """The [features, rows] form of a tensor [..., features]."""
        if x not in self.matrices:
            shape = _shape(x)
            moved = _in_order(self, rw, x, _features_first(shape))
            self.matrices[x] = rw.reshape(moved, (shape[-1], int(np.prod(shape[:-1]))))
        return self.matrices[x]

    def fits_columns(self, extent: int) -> bool:
        """Whether softmax over an axis of `extent` elements, not the contiguous one, is fast."""
        column_bytes = extent * COLUMN_VECTORS * self.target.lanes * 4
        return column_bytes * COLUMNS_SHARE <= self.target.l2_bytes

    def follow(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """The value of the old `var`, computed in its operands' orders where that is possible."""
        shape = static_shape(var)
        if shape is None or 0 in shape or dtype_of(var) != "float32" or not isinstance(value, Call):
            return value
        if not any(arg in self.stored for arg in value.args if isinstance(arg, Var)):
            return value
        name = op_name(value)
        rule = _elementwise if name in ELEMENTWISE else _RULES.get(name)
        found = None if rule is None else rule(self, rw, value, shape)
        return value if found is None else _bind(self, rw, found.value, found.order, shape)


def _shape(x: Expr) -> Shape:
    shape = static_shape(x)
    assert shape is not None
    return shape


def _extents(shape: Shape, order: Order) -> Shape:
    return tuple(shape[axis] for axis in order)


def _features_first(shape: Shape) -> Order:
    *lead, features = range(len(shape))
    return tuple(axis for axis in (features, *lead) if shape[axis] != 1)


def _permute(rw: Rewriter, x: Expr, old: Order, new: Order) -> Expr:
    return x if old == new else rw.emit(relax.op.permute_dims(x, transposition(old, new)))


def _bind(known: FeatureMajor, rw: Rewriter, value: Expr, order: Order, shape: Shape) -> Expr:
    """The row-major tensor of `shape` that `value` holds, its axes in `order`."""
    x = rw.reshape(_permute(rw, value, order, row_major(shape)), shape)
    if order != row_major(shape):
        known.stored[x] = _Stored(value, order)
    return x


def _as_stored(known: FeatureMajor, rw: Rewriter, x: Expr) -> _Stored:
    """How a tensor lies in memory, row-major ones included."""
    if x in known.stored:
        return known.stored[x]
    order = row_major(_shape(x))
    return _Stored(rw.reshape(x, _extents(_shape(x), order)), order)


def _in_order(known: FeatureMajor, rw: Rewriter, x: Expr, order: Order) -> Expr:
    """A tensor with its axes in `order`; elements move unless it is stored so."""
    stored = _as_stored(known, rw, x)
    return _permute(rw, stored.value, stored.order, order)


def _elementwise(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    """All operands of full size in one order; smaller ones, that broadcast, are brought there."""
    full = [a for a in call.args if isinstance(a, Var) and static_shape(a) == shape]
    orders = {known.stored[a].order if a in known.stored else None for a in full}
    order = orders.pop() if len(orders) == 1 else None
    if order is None:
        return None
    args = []
    for arg in call.args:
        if static_shape(arg) is None:  # an attribute-like operand, e.g. the bounds of clip
            args.append(arg)
        elif any(arg.same_as(other) for other in full):
            args.append(known.stored[arg].value)
        elif int(np.prod(_shape(arg))) == int(np.prod(shape)):
            return None  # it would cost as much to reorder as the result
        else:
            args.append(_broadcast(known, rw, arg, shape, order))
    return _Stored(rw.emit(Call(call.op, args, call.attrs, list(call.ty_args))), order)


def _broadcast(known: FeatureMajor, rw: Rewriter, arg: Expr, shape: Shape, order: Order) -> Expr:
    """An operand smaller than the result of `shape`, broadcasting in that order of its axes."""
    if uniform(arg) is not None and _shape(arg) == ():
        return arg
    own = _shape(arg)
    padded = (1,) * (len(shape) - len(own)) + own
    extents = _extents(padded, order)
    axes = tuple(axis for axis in order if padded[axis] != 1)
    array = array_of(arg)
    if array is not None:
        moved = array.reshape(_extents(padded, row_major(padded)))
        moved = moved.transpose(transposition(row_major(padded), axes))
        return constant(moved.reshape(extents))
    arg = rw.reshape(arg, padded)
    return rw.reshape(_in_order(known, rw, arg, axes), extents)


def _permute_dims(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    stored = known.stored[call.args[0]]
    axes = ints(call.attrs.axes) if call.attrs.axes else tuple(range(len(shape)))[::-1]
    return _Stored(stored.value, permuted(stored.order, axes))


def _reshaped(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    x = call.args[0]
    stored = known.stored[x]
    order = reshaped(stored.order, _shape(x), shape)
    if order is None:
        return None
    return _Stored(rw.reshape(stored.value, _extents(shape, order)), order)


def _matmul(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    """A batched product in the order that leaves the result's contiguous axis to one operand.

    The result is stored like the other operand, with that axis in place of the summed one: keys
    and values [heads, features, tokens] by queries give [heads, ..., queries]. Where both operands
    could have it, a softmax will follow, and over the rows if they would make long columns.
    """
    a, b = call.args
    rank = len(shape)
    if not rank == len(_shape(a)) == len(_shape(b)) or dtype_of(a) != dtype_of(b):
        return None
    if not _shape(a)[:-2] == _shape(b)[:-2] == shape[:-2]:
        return None
    row, column, summed = rank - 2, rank - 1, rank
    left, right = _as_stored(known, rw, a), _as_stored(known, rw, b)
    left_axes = tuple({column: summed}.get(axis, axis) for axis in left.order)
    right_axes = tuple({row: summed}.get(axis, axis) for axis in right.order)
    if summed not in left_axes or row not in left_axes or column not in right_axes:
        return None
    by_row, by_column = left_axes[-1] == row, right_axes[-1] == column
    if by_row and (not by_column or known.fits_columns(shape[column])):
        order = (*(axis for axis in right_axes if axis != summed), row)
    elif by_column:
        order = (*(axis for axis in left_axes if axis != summed), column)
    else:
        return None
    if shape[order[-1]] < known.target.lanes:
        return None
    terms = f"{_letters(left_axes)},{_letters(right_axes)}->{_letters(order)}"
    return _Stored(rw.emit(relax.op.einsum((left.value, right.value), terms)), order)


def _letters(axes: Order) -> str:
    return "".join(chr(ord("a") + axis) for axis in axes)


def _softmax(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    stored = known.stored[call.args[0]]
    axis = int(call.attrs.axis) % len(shape)
    if axis not in stored.order or shape[stored.order[-1]] < known.target.lanes:
        return None
    if axis != stored.order[-1] and not known.fits_columns(shape[axis]):
        return None
    softmax = relax.op.nn.softmax if op_name(call) == "nn.softmax" else relax.op.nn.log_softmax
    return _Stored(rw.emit(softmax(stored.value, stored.order.index(axis))), stored.order)


def _layer_norm(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    x, gamma, beta = call.args
    axes, attrs = [axis % len(shape) for axis in ints(call.attrs.axes)], call.attrs
    if x not in known.stored or len(axes) != 1 or axes[0] not in known.stored[x].order:
        return None
    stored = known.stored[x]
    if shape[stored.order[-1]] < known.target.lanes:
        return None
    place = [stored.order.index(axes[0])]
    norm = relax.op.nn.layer_norm(
        stored.value,
        gamma,
        beta,
        place,
        float(attrs.epsilon),
        bool(attrs.center),
        bool(attrs.scale),
    )
    return _Stored(rw.emit(norm), stored.order)


_RULES: dict[str, Callable[[FeatureMajor, Rewriter, Call, Shape], _Stored | None]] = {
    "permute_dims": _permute_dims,
    "reshape": _reshaped,
    "matmul": _matmul,
    "nn.softmax": _softmax,
    "nn.log_softmax": _softmax,
    "nn.layer_norm": _layer_norm,
}
