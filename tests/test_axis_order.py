"""How axes and pieces of them lie in memory: what moves elements, and what only renames them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tvm_pivot.relay_passes.axis_order import (
    Piece,
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

EXTENTS = st.sampled_from([1, 1, 2, 3, 4, 6])


def memory(x: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """`x` as it lies in memory, in the extents of the pieces; by definition."""
    y = np.empty(extents(storage), x.dtype)
    for place in np.ndindex(y.shape):
        index = [0] * x.ndim
        for piece, i in zip(storage, place, strict=True):
            index[piece.axis] += i * piece.step
        y[place] = x[tuple(index)]
    return y


@st.composite
def storages(draw: st.DrawFn, shape: list[int]) -> Storage:
    """Axes cut into pieces, which lie anyhow."""
    pieces = []
    for axis, extent in enumerate(shape):
        step = 1
        while step < extent:
            left = extent // step
            size = draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0]))
            pieces.append(Piece(axis, step, size))
            step *= size
    return tuple(draw(st.permutations(pieces)))


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[NDArray[Any], Storage]:
    shape = draw(st.lists(EXTENTS, min_size=1, max_size=4))
    return np.arange(math.prod(shape)).reshape(shape), draw(storages(shape))


@st.composite
def shapes_of(draw: st.DrawFn, size: int) -> list[int]:
    """A shape with `size` elements."""
    shape = []
    while size > 1:
        shape.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= shape[-1]
    return shape or [1]


@given(st.data())
def test_storages_follow_reshapes(data: st.DataObject) -> None:
    x, storage = data.draw(stored_tensors())
    y = x.reshape(data.draw(shapes_of(x.size)))
    found = reshaped(storage, x.shape, y.shape)
    flat = memory(x, storage).ravel().tolist()
    if found is not None:
        assert memory(y, found).ravel().tolist() == flat
        assert found == joined(found)
        return
    # no pieces of the new axes have the same elements in the same places
    assume(y.size <= 36)
    assert all(memory(y, other).ravel().tolist() != flat for other in all_storages(y.shape))


def all_storages(shape: tuple[int, ...]) -> list[Storage]:
    def cuts(axis: int, extent: int, step: int) -> list[list[Piece]]:
        if step == extent:
            return [[]]
        sizes = [d for d in range(2, extent // step + 1) if extent // step % d == 0]
        return [
            [Piece(axis, step, d), *rest] for d in sizes for rest in cuts(axis, extent, step * d)
        ]

    ways = itertools.product(*(cuts(axis, extent, 1) for axis, extent in enumerate(shape)))
    return [order for way in ways for order in itertools.permutations(itertools.chain(*way))]


@given(st.data())
def test_storages_follow_transposes(data: st.DataObject) -> None:
    x, storage = data.draw(stored_tensors())
    axes = data.draw(st.permutations(range(x.ndim)))
    y, moved = x.transpose(axes), permuted(storage, axes)
    same = memory(y, moved)
    np.testing.assert_array_equal(memory(x, storage), same)
    own = in_own_order(moved)
    back = same.transpose(transposition(moved, own))
    np.testing.assert_array_equal(back.reshape(y.shape), y)


@given(st.data())
def test_pieces_are_cut_and_joined_where_they_lie(data: st.DataObject) -> None:
    x, storage = data.draw(stored_tensors())
    flat, whole = memory(x, storage).ravel().tolist(), joined(storage)
    assert memory(x, whole).ravel().tolist() == flat
    assert len(whole) <= len(storage)
    other = data.draw(storages(list(x.shape)))
    finer = cut_like(storage, other)
    if finer is None:
        return
    assert memory(x, finer).ravel().tolist() == flat
    again = cut_like(other, finer)
    assert again is not None
    assert set(again) == set(finer)


def test_pieces_that_do_not_divide_are_not_cut() -> None:
    twos, threes = ((Piece(0, 1, 2), Piece(0, 2, 3)), (Piece(0, 1, 3), Piece(0, 3, 2)))
    assert cut_like(twos, threes) is None
    assert cut_like(row_major((6,)), threes) == ((0, 3, 2), (0, 1, 3))


@pytest.mark.parametrize(
    ("old", "storage", "new", "want"),
    [
        # [part, feature, token of the part], into heads and back
        ((128, 768), ((0, 64, 2), (1, 1, 768), (0, 1, 64)), (128, 12, 64),
         ((0, 64, 2), (1, 1, 12), (2, 1, 64), (0, 1, 64))),
        ((128, 12, 64), ((0, 64, 2), (1, 1, 12), (2, 1, 64), (0, 1, 64)), (1, 128, 768),
         ((1, 64, 2), (2, 1, 768), (1, 1, 64))),
        ((4, 6), ((1, 1, 6), (0, 1, 4)), (6, 4), None),
    ],
)  # fmt: skip
def test_reshapes_of_parts(old: Any, storage: Any, new: Any, want: Any) -> None:
    got = reshaped(tuple(Piece(*p) for p in storage), old, new)
    assert got == (None if want is None else tuple(Piece(*p) for p in want))
