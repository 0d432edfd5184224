"""How the axes of a tensor lie in memory, where that is not in their own order.

An order lists a tensor's axes from the outermost to the one that is contiguous. Axes of one element
lie nowhere in particular, so it leaves them out: shape (1, 128, 768) has the orders (1, 2), which
is row-major, and (2, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

Order = tuple[int, ...]


def row_major(shape: Sequence[int]) -> Order:
    """The order of a tensor that is stored as it is."""
    return tuple(axis for axis, extent in enumerate(shape) if extent != 1)


def transposition(old: Order, new: Order) -> list[int]:
    """The axes of a `permute_dims` that brings a tensor stored in one order into another."""
    return [old.index(axis) for axis in new]


def permuted(order: Order, axes: Sequence[int]) -> Order:
    """The order of `permute_dims(x, axes)` without moving an element of x, stored in `order`."""
    return tuple(list(axes).index(axis) for axis in order)


def reshaped(order: Order, old: Sequence[int], new: Sequence[int]) -> Order | None:
    """The order of a tensor of shape `old`, stored in `order`, once it is reshaped to `new`.

    Returns:
        None where the reshape has to move elements: axes that it merges are not neighbours.
    """
    groups = {before[0]: (before, after) for before, after in _groups(old, new)}
    result: list[int] = []
    place = 0
    while place < len(order):
        before, after = groups.get(order[place], ((), ()))
        if not before or order[place : place + len(before)] != before:
            return None
        result.extend(after)
        place += len(before)
    return tuple(result)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[Order, Order]]:
    """The smallest runs of axes of two shapes, none of them 0, that hold the same elements."""
    sides = [(shape, list(row_major(shape))) for shape in (old, new)]
    groups = []
    while sides[0][1]:
        taken: list[list[int]] = [[], []]
        sizes = [0, 0]
        while 0 in sizes or sizes[0] != sizes[1]:
            behind = 0 if sizes[0] <= sizes[1] else 1
            shape, left = sides[behind]
            taken[behind].append(left.pop(0))
            sizes[behind] = max(sizes[behind], 1) * shape[taken[behind][-1]]
        groups.append((tuple(taken[0]), tuple(taken[1])))
    return groups
