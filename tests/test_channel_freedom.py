"""What may change places, against a search through all orders of a few small axes."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_pivot.relay_passes.channel_freedom import CYCLE, SEVERAL, Entries, Units

Same = tuple[int, list[int], int, list[int]]
Part = tuple[int, list[int], int, list[int], bool]


def build(sizes: list[int], same: list[Same], parts: list[Part], frozen: list[int]) -> Entries:
    entries = Entries()
    for size in sizes:
        entries.axis(size)
    for first, a, second, b in same:
        entries.same(first, np.array(a, np.intp), second, np.array(b, np.intp))
    for parent, outer, child, inner, ordered in parts:
        outer_index, inner_index = np.array(outer, np.intp), np.array(inner, np.intp)
        entries.part(parent, outer_index, child, inner_index, ordered=ordered)
    for axis in frozen:
        entries.freeze(axis, "a test", np.array([0]))
    return entries


def allowed(
    orders: list[tuple[int, ...]], same: list[Same], parts: list[Part], frozen: list[int]
) -> bool:
    """Whether orders of all axes (position i holds entry order[i]) keep every relation."""
    for first, a, second, b in same:
        pairs = set(zip(a, b, strict=True))
        if {(orders[first][i], orders[second][j]) for i, j in pairs} != pairs:
            return False
    for parent, outer, child, inner, ordered in parts:
        rank = {j: outer[:n].count(i) if ordered else 0 for n, (i, j) in _numbered(outer, inner)}
        triples = {(i, j, rank[j]) for i, j in zip(outer, inner, strict=True)}
        moved = {(orders[parent][i], orders[child][j], r) for i, j, r in triples}
        if moved != triples:
            return False
    return all(orders[axis][0] == 0 for axis in frozen)


def _numbered(outer: list[int], inner: list[int]) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(zip(outer, inner, strict=True)))


def swaps(entries: Entries, units: list[Units]) -> list[list[tuple[int, ...]]]:
    """The orders of all axes after each exchange of two units."""
    found = []
    for group in units:
        if group.frozen:
            continue
        for i in range(group.size - 1):
            order = {r: np.arange(entries.sizes[r]) for r in range(len(entries.sizes))}
            for axis, places in group.places.items():
                order[axis][places[i]], order[axis][places[i + 1]] = places[i + 1], places[i]
            full = [order[entries.root(r)] for r in range(len(entries.sizes))]
            found.append([tuple(o.tolist()) for o in full])
    return found


@st.composite
def relations(draw: st.DrawFn) -> tuple[list[int], list[Same], list[Part], list[int]]:
    """A few axes of up to four entries with random ties and parts."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    axis = st.integers(0, len(sizes) - 1)
    same: list[Same] = []
    parts: list[Part] = []
    for _ in range(draw(st.integers(0, 2))):
        first, second = draw(axis), draw(axis)
        count = draw(st.integers(1, min(sizes[first], sizes[second])))
        a, b = (draw(st.permutations(range(sizes[k])))[:count] for k in (first, second))
        same.append((first, list(a), second, list(b)))
    for _ in range(draw(st.integers(0, 2))):
        parent, child = draw(axis), draw(axis)
        inner = draw(st.permutations(range(sizes[child])))
        outer = [draw(st.integers(0, sizes[parent] - 1)) for _ in inner]
        inner = sorted(inner)
        parts.append((parent, outer, child, inner, draw(st.booleans())))
    return sizes, same, parts, draw(st.lists(axis, max_size=1))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(relations())
def test_no_exchange_breaks_a_relation(
    drawn: tuple[list[int], list[Same], list[Part], list[int]],
) -> None:
    sizes, same, parts, frozen = drawn
    entries = build(sizes, same, parts, frozen)
    for orders in swaps(entries, entries.units()):
        assert all(sorted(o) == list(range(n)) for o, n in zip(orders, sizes, strict=True))
        assert allowed(orders, same, parts, frozen)


@pytest.mark.parametrize(
    ("sizes", "same", "parts"),
    [
        ([4], [], []),
        ([3, 4], [(0, [0, 1], 1, [2, 3])], []),
        ([2, 4], [], [(0, [0, 0, 1, 1], 1, [0, 1, 2, 3], True)]),
        ([2, 4], [], [(0, [0, 1, 0, 1], 1, [0, 1, 2, 3], False)]),
        ([4, 2], [(0, [0, 1], 1, [0, 1]), (0, [2, 3], 1, [0, 1])], []),
        ([2, 3], [], [(0, [0, 0, 1], 1, [0, 1, 2], False)]),
    ],
    ids=["alone", "slice", "ordered parts", "parts", "gates", "parts of unequal number"],
)
def test_every_order_that_is_allowed_is_found(
    sizes: list[int], same: list[Same], parts: list[Part]
) -> None:
    entries = build(sizes, same, parts, [])
    every = product(*(permutations(range(n)) for n in sizes))
    wanted = {orders for orders in every if allowed(list(orders), same, parts, [])}
    steps = swaps(entries, entries.units())
    reached = {tuple(tuple(range(n)) for n in sizes)}
    todo = list(reached)
    while todo:
        orders = todo.pop()
        for step in steps:
            new = tuple(tuple(o[i] for i in s) for o, s in zip(orders, step, strict=True))
            if new not in reached:
                reached.add(new)
                todo.append(new)
    assert reached == wanted


def test_reasons() -> None:
    cut = build(
        [2, 2, 4],
        [],
        [(0, [0, 0, 1, 1], 2, [0, 1, 2, 3], False), (1, [0, 1, 0, 1], 2, [0, 1, 2, 3], False)],
        [],
    )
    assert {u.frozen for u in cut.units()} == {SEVERAL}
    circle = build([2], [], [(0, [1, 0], 0, [0, 1], False)], [])
    assert {u.frozen for u in circle.units()} == {CYCLE}
    assert Entries().units() == []
