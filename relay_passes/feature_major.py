"""Keep activations of dense layers as [features, rows] from layer to layer.

The planes kernel reads and writes that layout, so elements move only where a network's own
row-major tensor enters or leaves a chain of dense layers and of operators that can do with any
order of the axes: elementwise ones, normalisation, and all of an attention. There
`reshape` and `permute_dims` mostly give the same memory new names.

Layers whose rows are in parts (see `split_tokens`) have [part, features, rows of the part].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tvm import relax
from tvm.ir import Call, Expr, Var

from ..targets import PivotTarget
from .axis_order import (
    Shape,
    Storage,
    cut_like,
    extents,
    in_own_order,
    joined,
    permuted,
    reshaped,
    row_major,
    transposition,
)
from .graph import Rewriter, array_of, constant, dtype_of, ints, op_name, static_shape, uniform

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
    """A tensor as it lies in memory: `value` has the extents of the pieces of `storage`."""

    value: Expr
    storage: Storage


@dataclass
class FeatureMajor:
    """Which tensors of the new function are stored in an order other than row-major.

    Each of them is bound as a row-major tensor too, which costs nothing if nobody reads it.

    Attributes:
        target: the machine; sums leave the order if its contiguous axis fills no vector.
        stored: how each tensor lies in memory.
        matrices: tensors as [parts, features, rows], by their parts, where one has been asked for.
    """

    target: PivotTarget
    stored: dict[Expr, _Stored] = field(default_factory=dict)
    matrices: dict[tuple[Expr, int], Expr] = field(default_factory=dict)

    def record(self, rw: Rewriter, matrix: Expr, shape: Shape, parts: int) -> Expr:
        """The row-major tensor of `shape` [..., features] that `matrix` [parts, features, rows]
        holds.
        """
        storage = features_first(shape, parts)
        assert storage is not None
        x = _bind(self, rw, rw.reshape(matrix, extents(storage)), storage, shape)
        self.matrices[x, parts] = matrix
        return x

    def of(self, rw: Rewriter, x: Expr, parts: int) -> Expr:
        """The [parts, features, rows] form of a tensor [..., features]."""
        if (x, parts) not in self.matrices:
            shape = _shape(x)
            storage = features_first(shape, parts)
            assert storage is not None
            matrix = (parts, shape[-1], math.prod(shape[:-1]) // parts)
            self.matrices[x, parts] = rw.reshape(_in_order(self, rw, x, storage), matrix)
        return self.matrices[x, parts]

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
        return value if found is None else _bind(self, rw, found.value, found.storage, shape)


def _shape(x: Expr) -> Shape:
    shape = static_shape(x)
    assert shape is not None
    return shape


def features_first(shape: Shape, parts: int) -> Storage | None:
    """The storage of a tensor [..., features] as [parts, features, rows]; None if there is none."""
    cut = (parts, math.prod(shape[:-1]) // parts, shape[-1])
    part, row, feature = (tuple(p for p in row_major(cut) if p.axis == i) for i in range(3))
    return reshaped((*part, *feature, *row), cut, shape)


def _permute(rw: Rewriter, x: Expr, old: Storage, new: Storage) -> Expr:
    return x if old == new else rw.emit(relax.op.permute_dims(x, transposition(old, new)))


def _bind(known: FeatureMajor, rw: Rewriter, value: Expr, storage: Storage, shape: Shape) -> Expr:
    """The row-major tensor of `shape` that `value` holds."""
    own = in_own_order(storage)
    x = rw.reshape(_permute(rw, value, storage, own), shape)
    if storage != own:
        known.stored[x] = _Stored(value, storage)
    return x


def _as_stored(known: FeatureMajor, rw: Rewriter, x: Expr) -> _Stored:
    """How a tensor lies in memory, row-major ones included."""
    if x in known.stored:
        return known.stored[x]
    storage = row_major(_shape(x))
    return _Stored(rw.reshape(x, extents(storage)), storage)


def _cut_like(rw: Rewriter, x: _Stored, other: Storage) -> _Stored | None:
    """The same memory, cut wherever `other` is cut; None if the pieces do not divide."""
    storage = cut_like(x.storage, other)
    return None if storage is None else _Stored(rw.reshape(x.value, extents(storage)), storage)


def _in_order(known: FeatureMajor, rw: Rewriter, x: Expr, storage: Storage) -> Expr:
    """A tensor as it lies in memory in `storage`; elements move unless it is stored so."""
    stored = _cut_like(rw, _as_stored(known, rw, x), storage)
    if stored is None:
        whole = row_major(_shape(x))
        stored = _cut_like(rw, _Stored(rw.reshape(x, extents(whole)), whole), storage)
    assert stored is not None
    new = cut_like(storage, stored.storage)
    assert new is not None
    return rw.reshape(_permute(rw, stored.value, stored.storage, new), extents(storage))


def _elementwise(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    """All operands of full size in one order; smaller ones, that broadcast, are brought there."""
    full = [a for a in call.args if isinstance(a, Var) and static_shape(a) == shape]
    storages = {known.stored[a].storage if a in known.stored else None for a in full}
    storage = storages.pop() if len(storages) == 1 else None
    if storage is None:
        return None
    args = []
    for arg in call.args:
        if static_shape(arg) is None:  # an attribute-like operand, e.g. the bounds of clip
            args.append(arg)
        elif any(arg.same_as(other) for other in full):
            args.append(known.stored[arg].value)
        elif math.prod(_shape(arg)) == math.prod(shape):
            return None  # it would cost as much to reorder as the result
        else:
            args.append(_broadcast(known, rw, arg, shape, storage))
    return _Stored(rw.emit(Call(call.op, args, call.attrs, list(call.ty_args))), storage)


def _broadcast(
    known: FeatureMajor, rw: Rewriter, arg: Expr, shape: Shape, storage: Storage
) -> Expr:
    """An operand smaller than the result of `shape`, broadcasting in that storage."""
    if uniform(arg) is not None and _shape(arg) == ():
        return arg
    own = _shape(arg)
    padded = (1,) * (len(shape) - len(own)) + own
    kept = tuple(piece for piece in storage if padded[piece.axis] != 1)
    spread = tuple(piece.extent if padded[piece.axis] != 1 else 1 for piece in storage)
    array = array_of(arg)
    if array is not None:
        rows = in_own_order(kept)
        moved = array.reshape(extents(rows)).transpose(transposition(rows, kept))
        return constant(moved.reshape(spread))
    return rw.reshape(_in_order(known, rw, rw.reshape(arg, padded), kept), spread)


def _permute_dims(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    stored = known.stored[call.args[0]]
    axes = ints(call.attrs.axes) if call.attrs.axes else tuple(range(len(shape)))[::-1]
    return _Stored(stored.value, permuted(stored.storage, axes))


def _reshaped(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    x = call.args[0]
    stored = known.stored[x]
    storage = reshaped(stored.storage, _shape(x), shape)
    if storage is None:
        return None
    return _Stored(rw.reshape(stored.value, extents(storage)), storage)


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
    pair = _as_stored(known, rw, a), _as_stored(known, rw, b)
    factors = _cut_alike(
        rw, *(_renamed(x, axis, summed) for x, axis in zip(pair, (column, row), strict=True))
    )
    if factors is None:
        return None
    left, right = factors
    rows, columns = _of_axis(left.storage, row), _of_axis(right.storage, column)
    if not (rows and columns and _of_axis(left.storage, summed)):
        return None
    by_row, by_column = left.storage[-1] == rows[-1], right.storage[-1] == columns[-1]
    if by_row and (not by_column or known.fits_columns(shape[column])):
        storage = _product_storage(left.storage, rows, right.storage, columns, summed)
    elif by_column:
        storage = _product_storage(right.storage, columns, left.storage, rows, summed)
    else:
        return None
    if storage[-1].extent < known.target.lanes:
        return None
    pieces = dict.fromkeys((*left.storage, *right.storage))
    letters = {piece: chr(ord("a") + i) for i, piece in enumerate(pieces)}
    terms = ("".join(letters[p] for p in s) for s in (left.storage, right.storage, storage))
    value = rw.emit(relax.op.einsum((left.value, right.value), "{},{}->{}".format(*terms)))
    return _Stored(value, storage)


def _renamed(x: _Stored, axis: int, name: int) -> _Stored:
    """The same with another number for an axis."""
    storage = (p._replace(axis=name) if p.axis == axis else p for p in x.storage)
    return _Stored(x.value, tuple(storage))


def _cut_alike(rw: Rewriter, left: _Stored, right: _Stored) -> tuple[_Stored, _Stored] | None:
    """Two tensors with the axes that they share in the same pieces; None if they do not divide."""
    finer = _cut_like(rw, left, right.storage)
    other = None if finer is None else _cut_like(rw, right, finer.storage)
    return None if finer is None or other is None else (finer, other)


def _of_axis(storage: Storage, axis: int) -> Storage:
    return in_own_order(tuple(piece for piece in storage if piece.axis == axis))


def _product_storage(
    inner: Storage, along: Storage, outer: Storage, across: Storage, summed: int
) -> Storage:
    """That of a product whose contiguous piece is the last one of `along`, an axis of `inner`.

    Parts of `along`, and what lies around them, come first. The rest lies as the other operand
    does, `outer`, but for its axis `across`, whose pieces are neighbours: a softmax over it will
    follow.
    """
    around = inner[: inner.index(along[0])] if len(along) > 1 else ()
    first = (*(piece for piece in around if piece.axis != summed), *along[:-1])
    rest = [piece for piece in outer if piece.axis != summed and piece not in first]
    at = rest.index(across[-1])
    before, behind = ([p for p in some if p not in across] for some in (rest[:at], rest[at:]))
    return (*first, *before, *across, *behind, along[-1])


def _softmax(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    stored = _joined(rw, known.stored[call.args[0]])
    axis = int(call.attrs.axis) % len(shape)
    place = _place(stored, axis, known.target)
    if place is None:
        return None
    if place != len(stored.storage) - 1 and not known.fits_columns(shape[axis]):
        return None
    softmax = relax.op.nn.softmax if op_name(call) == "nn.softmax" else relax.op.nn.log_softmax
    return _Stored(rw.emit(softmax(stored.value, place)), stored.storage)


def _joined(rw: Rewriter, x: _Stored) -> _Stored:
    """The same memory in as few pieces as can be."""
    storage = joined(x.storage)
    return _Stored(rw.reshape(x.value, extents(storage)), storage)


def _place(stored: _Stored, axis: int, target: PivotTarget) -> int | None:
    """Where an axis is in memory; None if it is cut, or where no vector is full."""
    places = [i for i, piece in enumerate(stored.storage) if piece.axis == axis]
    return places[0] if len(places) == 1 and stored.storage[-1].extent >= target.lanes else None


def _layer_norm(known: FeatureMajor, rw: Rewriter, call: Call, shape: Shape) -> _Stored | None:
    x, gamma, beta = call.args
    axes, attrs = [axis % len(shape) for axis in ints(call.attrs.axes)], call.attrs
    if x not in known.stored or len(axes) != 1:
        return None
    stored = _joined(rw, known.stored[x])
    place = _place(stored, axes[0], known.target)
    if place is None:
        return None
    norm = relax.op.nn.layer_norm(
        stored.value,
        gamma,
        beta,
        [place],
        float(attrs.epsilon),
        bool(attrs.center),
        bool(attrs.scale),
    )
    return _Stored(rw.emit(norm), stored.storage)


_RULES: dict[str, Callable[[FeatureMajor, Rewriter, Call, Shape], _Stored | None]] = {
    "permute_dims": _permute_dims,
    "reshape": _reshaped,
    "matmul": _matmul,
    "nn.softmax": _softmax,
    "nn.log_softmax": _softmax,
    "nn.layer_norm": _layer_norm,
}
