"""How the elements of a tensor lie in memory, where that is not row after row.

A storage lists the axes of a tensor from the outermost one in memory to the contiguous one. An axis
may be cut into pieces that lie apart: of 128 tokens in two parts, the number of the part and that
of the token in it. Axes of one element lie nowhere in particular, so it leaves them out. Of shape
(1, 128, 768) tokens by features, some storages are, as axis, step and extent:

    (1, 1, 128), (2, 1, 768)              row-major
    (2, 1, 768), (1, 1, 128)              [feature, token]
    (1, 64, 2), (2, 1, 768), (1, 1, 64)   [part, feature, token of the part]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """What lies together of an axis: every `step`-th element, `extent` of them."""

    axis: int
    step: int
    extent: int


Storage = tuple[Piece, ...]


def row_major(shape: Sequence[int]) -> Storage:
    """The storage of a tensor that is stored as it is."""
    return tuple(Piece(axis, 1, extent) for axis, extent in enumerate(shape) if extent != 1)


def in_own_order(storage: Storage) -> Storage:
    """The same pieces, row after row."""
    return tuple(sorted(storage, key=lambda piece: (piece.axis, -piece.step)))


def extents(storage: Storage) -> Shape:
    """The shape of the memory."""
    return tuple(piece.extent for piece in storage)


def transposition(old: Storage, new: Storage) -> list[int]:
    """The axes of a `permute_dims` that brings pieces from one order into another."""
    return [old.index(piece) for piece in new]


def permuted(storage: Storage, axes: Sequence[int]) -> Storage:
    """That of `permute_dims(x, axes)` without moving an element of x."""
    return tuple(piece._replace(axis=list(axes).index(piece.axis)) for piece in storage)


def joined(storage: Storage) -> Storage:
    """The same memory in as few pieces as can be."""
    found: list[Piece] = []
    for piece in storage:
        last = found[-1] if found else None
        if last is not None and last.axis == piece.axis and last.step == piece.step * piece.extent:
            piece = piece._replace(extent=last.extent * piece.extent)
            found.pop()
        found.append(piece)
    return tuple(found)


def cut_like(storage: Storage, other: Storage) -> Storage | None:
    """The same memory, cut wherever `other` is cut; None if the pieces do not divide."""
    found: list[Piece] = []
    for piece in storage:
        ends = [(p.step, p.step * p.extent) for p in other if p.axis == piece.axis]
        cuts = _cut(piece.step, piece.extent, [at for both in ends for at in both])
        if cuts is None:
            return None
        found += [Piece(piece.axis, step, extent) for step, extent in cuts]
    return tuple(found)


def reshaped(storage: Storage, old: Sequence[int], new: Sequence[int]) -> Storage | None:
    """That of a tensor of shape `old` once it is reshaped to `new`, without moving an element.

    Returns:
        None where an element's place in the new shape does not follow from pieces.
    """
    before = [math.prod(old[axis + 1 :]) for axis in range(len(old))]
    after = [math.prod(new[axis + 1 :]) for axis in range(len(new))]
    flat = joined(tuple(Piece(0, p.step * before[p.axis], p.extent) for p in storage))
    found: list[Piece] = []
    for piece in flat:
        cuts = _cut(piece.step, piece.extent, after)
        if cuts is None:
            return None
        for step, extent in cuts:
            axis = next(i for i, size in enumerate(after) if size <= step and new[i] != 1)
            if step % after[axis]:
                return None
            found.append(Piece(axis, step // after[axis], extent))
    return joined(tuple(found))


def _cut(step: int, extent: int, places: Iterable[int]) -> list[tuple[int, int]] | None:
    """`extent` elements of a step, cut at all places between: steps and extents, outermost first.

    None if they do not divide.
    """
    bounds = [step, *sorted({at for at in places if step < at < step * extent}), step * extent]
    if any(high % low for low, high in pairwise(bounds)):
        return None
    return [(low, high // low) for low, high in pairwise(bounds)][::-1]
