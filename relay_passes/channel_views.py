"""How channels pass operators that see them on several axes at once, as attention heads are.

Where a reshape cuts one axis into several, the channels are the entries of all of these together
(`Place`), so that features within a head may be followed as well as whole heads. These rules
add to those of `channel_moves`, which know channels on one axis only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from tvm.ir import Call, Expr

from .channel_freedom import Entries, Index
from .channel_values import BINARY, FUNCTIONS, PASSING, every
from .graph import array_of, ints, static_shape


@dataclass(frozen=True)
class Place:
    """Where the channels of a tensor are.

    Attributes:
        axes: the axes of the tensor that they lie on, in ascending order; the first counts slowest.
        sizes: the extents of those.
        number: the axis of `Entries` that they are.
    """

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    number: int

    @property
    def size(self) -> int:
        """How many channels there are."""
        return prod(self.sizes)

    def ids(self) -> Index:
        """The channels, in the shape of their axes."""
        return every(self.size).reshape(self.sizes)


class Walk(Protocol):
    """What a rule may ask and tell; see `channel_groups`."""

    entries: Entries

    def known(self, expr: Expr) -> Place | None:
        """Where the channels of a tensor are."""

    def adopt(self, expr: Expr, axes: tuple[int, ...]) -> Place:
        """Channels of a tensor without known ones, on `axes`; they keep their order."""

    def edit(self, position: int, axes: tuple[int, ...], number: int) -> None:
        """A constant argument of the call at hand follows the order of its channels."""


Result = tuple[Place, ...] | None
"""Where the channels of a call's result are, `()` if it has none; None: the rule does not apply."""
Rule = Callable[[Walk, Call], Result]


def unary(walk: Walk, call: Call) -> Result:
    """A function of one tensor, element by element."""
    x = walk.known(call.args[0])
    return None if x is None else (x,)


def binary(walk: Walk, call: Call) -> Result:
    """A broadcasting operator of two tensors, or of a tensor and a constant."""
    shape = static_shape(call)
    if shape is None:
        return None
    found = [(a, walk.known(a), static_shape(a)) for a in call.args]
    places = {
        tuple(i + len(shape) - len(form) for i in p.axes): p
        for _, p, form in found
        if p is not None and form is not None and p.size > 1
    }
    if len(places) == 2:
        few = min(places, key=len)
        form = next(form for _, p, form in found if p is places[few])
        varies = any(_extent(form, i, shape) > 1 for i in max(places, key=len) if i not in few)
        return None if varies else _of_wholes(walk, places, shape)
    if len(places) != 1:
        return None
    ((axes, first),) = places.items()
    extents = [tuple(_extent(form, i, shape) for i in axes) for _, _, form in found]
    full = tuple(shape[i] for i in axes)
    if first.sizes != full or any(e != full and prod(e) != 1 for e in extents):
        return None
    for position, ((arg, place, form), extent) in enumerate(zip(found, extents, strict=True)):
        if extent != full or form is None:
            continue
        own = tuple(i + len(form) - len(shape) for i in axes)
        if array_of(arg) is not None:
            walk.edit(position, own, first.number)
        else:
            second = place or walk.adopt(arg, own)
            walk.entries.same(first.number, every(first.size), second.number, every(first.size))
    return (Place(axes, full, first.number),)


def _of_wholes(walk: Walk, places: dict[tuple[int, ...], Place], shape: tuple[int, ...]) -> Result:
    """Channels, and what is the same for all of a group of them, as their mean is."""
    (few, coarse), (axes, fine) = sorted(places.items(), key=lambda item: len(item[0]))
    kept = [i for i, axis in enumerate(axes) if axis in few]
    full = tuple(shape[axis] for axis in axes)
    if len(kept) != len(few) or fine.sizes != full or len(few) == len(axes):
        return None
    if coarse.sizes != tuple(full[i] for i in kept):
        return None
    heads = _whole(walk, fine, kept, coarse)
    walk.entries.same(coarse.number, every(coarse.size), heads.number, every(heads.size))
    return (Place(axes, full, fine.number),)


def _extent(form: tuple[int, ...] | None, axis: int, shape: tuple[int, ...]) -> int:
    """The extent of an operand along an axis of the result; 0 if it is not known."""
    if form is None:
        return 0
    own = axis + len(form) - len(shape)
    return form[own] if own >= 0 else 1


def broadcast(walk: Walk, call: Call) -> Result:
    """A tensor repeated along other axes than those of its channels."""
    x, shape, to = walk.known(call.args[0]), static_shape(call.args[0]), static_shape(call)
    if x is None or shape is None or to is None:
        return None
    axes = tuple(i + len(to) - len(shape) for i in x.axes)
    same = all(to[i] == n for i, n in zip(axes, x.sizes, strict=True))
    return (Place(axes, x.sizes, x.number),) if same else None


def softmax(walk: Walk, call: Call) -> Result:
    """Channel by channel, or over all channels, whose order matters to the rounding only."""
    x, shape = walk.known(call.args[0]), static_shape(call)
    if x is None or shape is None:
        return None
    axis = int(call.attrs.axis) % len(shape)
    return (x,) if axis not in x.axes or len(x.axes) == 1 else None


def normalize(walk: Walk, call: Call) -> Result:
    """Layer and RMS norms: within channels, or over all of them with a scale for each."""
    x, shape = walk.known(call.args[0]), static_shape(call)
    if x is None or shape is None:
        return None
    over = [a % len(shape) for a in ints(call.attrs.axes)]
    within = [a in over for a in x.axes]
    if any(within) and not all(within):
        return None
    if all(within):
        axes = tuple(over.index(a) for a in x.axes)
        for position, arg in enumerate(call.args[1:], start=1):
            form = static_shape(arg)
            if array_of(arg) is None or form is None or tuple(form[a] for a in axes) != x.sizes:
                return None
            walk.edit(position, axes, x.number)
    return (x,)


def group_norm(walk: Walk, call: Call) -> Result:
    """A norm of each group of channels, with a scale and a shift for every channel.

    Channels stay within their group, where they may change places; and so may whole groups.
    """
    x, shape, groups = walk.known(call.args[0]), static_shape(call), int(call.attrs.num_groups)
    if x is None or shape is None or x.axes != (int(call.attrs.channel_axis) % len(shape),):
        return None
    if any(array_of(arg) is None or static_shape(arg) != x.sizes for arg in call.args[1:]):
        return None
    walk.entries.whole(x.number, every(x.size) // (x.size // groups), groups)
    for position in (1, 2):
        walk.edit(position, (0,), x.number)
    return (x,)


def reduce(walk: Walk, call: Call) -> Result:
    """A mean, variance, sum or extreme value over some axes, in any order."""
    x, shape = walk.known(call.args[0]), static_shape(call.args[0])
    if x is None or shape is None:
        return None
    over = [*range(len(shape))] if call.attrs.axis is None else ints(call.attrs.axis)
    over = [a % len(shape) for a in over]
    kept = [i for i, a in enumerate(x.axes) if a not in over]
    if not kept:
        return ()
    down = 0 if call.attrs.keepdims else 1
    axes = tuple(x.axes[i] - down * sum(a < x.axes[i] for a in over) for i in kept)
    sizes = tuple(x.sizes[i] for i in kept)
    return (_whole(walk, x, kept, Place(axes, sizes, x.number)),)


def _whole(walk: Walk, x: Place, kept: list[int], out: Place) -> Place:
    """`out`, whose channels are those of `x` that agree on the `kept` of its axes."""
    if len(kept) == len(x.axes):
        return out
    spread = [n if i in kept else 1 for i, n in enumerate(x.sizes)]
    outer = np.broadcast_to(every(out.size).reshape(spread), x.sizes).ravel()
    return Place(out.axes, out.sizes, walk.entries.whole(x.number, outer, out.size))


def permute(walk: Walk, call: Call) -> Result:
    """A permutation of axes."""
    x, shape = walk.known(call.args[0]), static_shape(call)
    if x is None or shape is None:
        return None
    given = call.attrs.axes
    order = [*range(len(shape))][::-1] if given is None else [a % len(shape) for a in ints(given)]
    axes = sorted(order.index(a) for a in x.axes)
    moved = [x.axes.index(order[a]) for a in axes]
    ids = x.ids().transpose(moved).ravel()
    number = x.number
    if not np.array_equal(ids, every(x.size)):
        number = walk.entries.axis(x.size)
        walk.entries.same(x.number, ids, number, every(x.size))
    return (Place(tuple(axes), tuple(x.sizes[i] for i in moved), number),)


def reshape(walk: Walk, call: Call) -> Result:
    """A reshape: channels on other axes, or joined with other axes, whose entries are parts."""
    x, shape, to = walk.known(call.args[0]), static_shape(call.args[0]), static_shape(call)
    if x is None or shape is None or to is None or 0 in shape:
        return None
    ids = x.ids().reshape([n if i in x.axes else 1 for i, n in enumerate(shape)])
    spread, axes, out = [1] * len(shape), [], prod(to)
    for old, new in _blocks(shape, to):
        if not any(i in x.axes for i in old):
            continue
        axes += new
        for i in old:
            spread[i] = shape[i]
    outer = np.broadcast_to(ids, np.maximum(spread, ids.shape)).ravel()
    sizes = tuple(to[i] for i in axes)
    if outer.size != prod(sizes) or not 0 < outer.size <= out:
        return None
    if outer.size == x.size:
        return (_joined(walk, Place(tuple(axes), sizes, x.number)),)
    number = walk.entries.axis(outer.size)
    walk.entries.part(x.number, outer, number, every(outer.size), ordered=True)
    return (Place(tuple(axes), sizes, number),)


def _joined(walk: Walk, x: Place) -> Place:
    """Channels on one axis again, if `x` is their pixels on that axis and those after it."""
    owner = walk.entries.owner(x.number)
    if owner is None or len(x.axes) < 2:
        return x
    parent, of = owner
    if walk.entries.sizes[parent] != x.sizes[0]:
        return x
    if not np.array_equal(of, every(x.size) // (x.size // x.sizes[0])):
        return x
    return Place(x.axes[:1], x.sizes[:1], parent)


def _blocks(shape: tuple[int, ...], to: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that hold as much; axes of extent 1 are left out."""
    old, new = ([i for i, n in enumerate(s) if n > 1] for s in (shape, to))
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while (a := prod(shape[i] for i in left)) != (b := prod(to[i] for i in right)):
            if a < b:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        yield left, right


def matmul(walk: Walk, call: Call) -> Result:
    """A product of two tensors, as in attention: whole batches, rows, columns, or what it sums."""
    a, b = (walk.known(e) for e in call.args)
    first, second = (static_shape(e) or () for e in call.args)
    rank = len(first)
    if rank != len(second) or rank < 2 or first[:-2] != second[:-2]:
        return None
    if a is None or b is None:  # rows of the one, or columns of the other, whatever the other is
        if a is not None and a.axes == (rank - 2,):
            return (a,)
        return (b,) if b is not None and b.axes == (rank - 1,) else None
    batch = tuple(i for i in a.axes if i < rank - 2)
    if batch != tuple(i for i in b.axes if i < rank - 2):
        return None
    inner_a, inner_b = a.axes[len(batch) :], b.axes[len(batch) :]
    count = len(batch)
    if inner_a == (rank - 1,) and inner_b == (rank - 2,):
        walk.entries.same(a.number, every(a.size), b.number, every(b.size))
        if not batch:
            return ()
        return (_whole(walk, a, [*range(count)], Place(batch, a.sizes[:count], a.number)),)
    if (inner_a, inner_b) == ((), (rank - 1,)):
        whole, fine = a, b
    elif (inner_a, inner_b) in (((rank - 2,), ()), ((), ())):
        whole, fine = b, a
    else:
        return None
    if not batch:
        return None
    heads = _whole(walk, fine, [*range(count)], Place(batch, fine.sizes[:count], fine.number))
    walk.entries.same(whole.number, every(whole.size), heads.number, every(whole.size))
    return (fine,)


RULES: dict[str, Rule] = {
    **dict.fromkeys((*FUNCTIONS, *PASSING, "nn.dropout", "astype"), unary),
    **dict.fromkeys((*BINARY, "power"), binary),
    **dict.fromkeys(("max", "mean", "min", "sum", "variance"), reduce),
    **dict.fromkeys(("nn.log_softmax", "nn.softmax"), softmax),
    **dict.fromkeys(("nn.layer_norm", "nn.rms_norm"), normalize),
    "broadcast_to": broadcast,
    "nn.group_norm": group_norm,
    "matmul": matmul,
    "permute_dims": permute,
    "reshape": reshape,
}
