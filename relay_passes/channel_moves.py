"""Operators that move channels: reshape, permutation, concatenation, padding and slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr, Tuple

from . import channel_values
from .channel_values import Channels, Effect, Known, Mask, Rule, Tie, Values, every, same_channels
from .fold_constants import slices
from .graph import constant, dtype_of, ints, static_shape


def permute(call: Call, known: Known) -> Effect | None:
    """A permutation of axes."""
    effect = same_channels(call, known, np.copy)
    if effect is None or call.attrs.axes is None:
        return None
    order = ints(call.attrs.axes)
    axis = [a % len(order) for a in order].index(effect.out.axis)
    return Effect(Channels(axis, effect.out.values), effect.ties, effect.rebuild)


def reshape(call: Call, known: Known) -> Effect | None:
    """A reshape that leaves channels whole, splits each into k, or joins every k into one."""
    source, shape, to = call.args[0], static_shape(call.args[0]), static_shape(call)
    x = known(source)
    if x is None or shape is None or to is None:
        return None
    size, outer, inner = shape[x.axis], prod(shape[: x.axis]), prod(shape[x.axis + 1 :])
    # whole channels before split ones before joined ones, where extents of 1 leave a choice
    for axis in sorted(range(len(to)), key=lambda b: (to[b] != size, to[b] < size, -to[b])):
        extent, after = to[axis], prod(to[axis + 1 :])
        if prod(to[:axis]) != outer or 0 in (size, extent, after, inner):
            continue
        many, few = max(size, extent), min(size, extent)
        if many % few:
            continue
        group = every(many) // (many // few)
        inside, outside = (group, every(many)) if extent >= size else (every(many), group)
        values = x.values[group] if extent >= size else _joined(x.values, few)
        tie = Tie(source, inside, outside)
        return Effect(Channels(axis, values), (tie,), _reshaper(to, axis))
    return None


def _joined(values: Values, groups: int) -> Values:
    """One value for each run of channels that all have the same."""
    rows = values.reshape(groups, -1)
    return np.where((rows == rows[:, :1]).all(axis=1), rows[:, 0], np.nan)


def _reshaper(
    to: tuple[int, ...], axis: int
) -> Callable[[Sequence[Expr], Mask, Sequence[Mask]], Expr]:
    def rebuild(new: Sequence[Expr], keep: Mask, _: Sequence[Mask]) -> Expr:
        return relax.op.reshape(new[0], (*to[:axis], int(keep.sum()), *to[axis + 1 :]))

    return rebuild


def concat(call: Call, known: Known) -> Effect | None:
    """Tensors side by side along the channels, or along another axis."""
    parts, shape = call.args[0], static_shape(call)
    if not isinstance(parts, Tuple) or shape is None:
        return None
    channels = [known(f) for f in parts.fields]
    axes = {c.axis for c in channels if c is not None}
    if None in channels or len(axes) != 1:
        return None
    known_parts = [c for c in channels if c is not None]
    axis = axes.pop()
    along = int(call.attrs.axis or 0) % len(shape)
    if along != axis:
        stacked = np.stack([c.values for c in known_parts])
        values = np.where((stacked == stacked[0]).all(axis=0), stacked[0], np.nan)
        starts = [0] * len(known_parts)
    else:
        values = np.concatenate([c.values for c in known_parts])
        starts = list(np.cumsum([0] + [len(c.values) for c in known_parts[:-1]]))
    ties = tuple(
        Tie(f, every(len(c.values)), every(len(c.values)) + start)
        for f, c, start in zip(parts.fields, known_parts, starts, strict=True)
    )

    def rebuild(new: Sequence[Expr], _: Mask, masks: Sequence[Mask]) -> Expr:
        left = [e for e, mask in zip(new, masks, strict=True) if mask.any()]
        return relax.op.concat(left, along)

    return Effect(Channels(axis, values), ties, rebuild)


def pad(call: Call, known: Known) -> Effect | None:
    """Constant padding, of the planes or by whole channels (as ResNet's option A shortcut)."""
    source, shape = call.args[0], static_shape(call.args[0])
    x, attrs = known(source), call.attrs
    if x is None or shape is None or attrs.pad_mode != "constant":
        return None
    width, fill = list(ints(attrs.pad_width)), float(attrs.pad_value)
    before, after = width[2 * x.axis : 2 * x.axis + 2]
    if min(width) < 0:
        return None
    planes = any(w for i, w in enumerate(width) if i // 2 != x.axis)
    inside = np.where(x.values == fill, x.values, np.nan) if planes else x.values
    values = np.concatenate([np.full(before, fill), inside, np.full(after, fill)])
    inner = every(len(x.values))

    def rebuild(new: Sequence[Expr], keep: Mask, masks: Sequence[Mask]) -> Expr:
        first, last = int(keep[:before].sum()), int(keep[len(keep) - after :].sum())
        if not masks[0].any():
            dims = [n + width[2 * i] + width[2 * i + 1] for i, n in enumerate(shape)]
            dims[x.axis] = first + last
            return relax.op.full(dims, relax.const(fill, dtype_of(call)), dtype_of(call))
        new_width = [*width[: 2 * x.axis], first, last, *width[2 * x.axis + 2 :]]
        return relax.op.nn.pad(new[0], new_width, "constant", fill)

    return Effect(Channels(x.axis, values), (Tie(source, inner, inner + before),), rebuild)


def strided_slice(call: Call, known: Known) -> Effect | None:
    """A slice of other axes, or a run of channels."""
    source, shape = call.args[0], static_shape(call.args[0])
    x = known(source)
    picked = None if shape is None else slices(call, len(shape))
    if x is None or picked is None or shape is None:
        return None
    inner = every(shape[x.axis])[picked[x.axis]]
    if len(inner) == 0:
        return None

    def rebuild(new: Sequence[Expr], keep: Mask, masks: Sequence[Mask]) -> Expr:
        ranges = [s.indices(n) for s, n in zip(picked, shape, strict=True)]
        old = masks[0]
        # counted in the channels that are left; a stride along them has become a plain run only
        # if nothing between was kept, so such slices pick by index
        kept = np.cumsum(old)[inner[keep]] - 1
        if not np.array_equal(kept, np.arange(kept[0], kept[0] + len(kept))):
            new = [relax.op.take(new[0], constant(kept, "int64"), x.axis, "clip")]
            ranges[x.axis] = (0, len(kept), 1)
        else:
            ranges[x.axis] = (int(kept[0]), int(kept[-1]) + 1, 1)
        begin, end, stride = zip(*ranges, strict=True)
        axes = list(range(len(shape)))
        return relax.op.strided_slice(new[0], axes, list(begin), list(end), list(stride))

    tie = Tie(source, inner, every(len(inner)))
    return Effect(Channels(x.axis, x.values[inner]), (tie,), rebuild)


RULES: dict[str, Rule] = {
    **channel_values.RULES,
    "concat": concat,
    "nn.pad": pad,
    "permute_dims": permute,
    "reshape": reshape,
    "strided_slice": strided_slice,
}
