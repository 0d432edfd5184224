"""Which entries of axes may change places, given what ties them to each other.

Entries that are the same channel of different tensors move together; entries that are part of
others (the pixels of a flattened channel, the features of an attention head) move along with
those, and among themselves where nothing tells them apart. Where every entry is part of one other
at most, what may change places is found exactly; where entries are parts of several, those
several keep their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Index = npt.NDArray[np.intp]
# The number of a relation, the ranks in the parent and in the child, the place among ordered parts.
_Edge = tuple[int, int, int, int]
SEVERAL = "its channels are parts of several groups that cut them differently"
CYCLE = "its channels are tied to parts of themselves"


@dataclass(frozen=True, eq=False)
class Units:
    """Units of entries, any two of which may change places; or that keep their order.

    Attributes:
        size: how many units.
        depth: how many other units these are part of, each of which is part of the next.
        places: per axis, [size, width]: its entries in each unit, in matching order.
        frozen: why the units keep their order; empty where they may change places.
    """

    size: int
    depth: int
    places: dict[int, Index]
    frozen: str = ""


@dataclass(frozen=True)
class _Same:
    first: int
    a: Index
    second: int
    b: Index


@dataclass(frozen=True)
class _Part:
    parent: int
    outer: Index
    child: int
    inner: Index
    ordered: bool


@dataclass
class Entries:
    """Axes, numbered as they are added, and what is known of their entries."""

    sizes: list[int] = field(default_factory=list)
    _root: list[int] = field(default_factory=list)
    _same: list[_Same] = field(default_factory=list)
    _parts: list[_Part] = field(default_factory=list)
    _frozen: list[tuple[int, Index, str]] = field(default_factory=list)
    _wholes: dict[tuple[int, bytes], int] = field(default_factory=dict)

    def axis(self, size: int) -> int:
        """A new axis of `size` entries."""
        self.sizes.append(size)
        self._root.append(len(self._root))
        return len(self._root) - 1

    def root(self, axis: int) -> int:
        """The axis that stands for this one: the first of those that are entirely the same."""
        while self._root[axis] != axis:
            axis = self._root[axis] = self._root[self._root[axis]]
        return axis

    def same(self, first: int, a: Index, second: int, b: Index) -> None:
        """Entries ``a[i]`` of one axis are entries ``b[i]`` of another; no entry twice."""
        full = np.arange(self.sizes[first])
        if np.array_equal(a, full) and self.sizes[second] == full.size and np.array_equal(b, full):
            low, high = sorted((self.root(first), self.root(second)))
            self._root[high] = low
        else:
            self._same.append(_Same(first, a, second, b))

    def part(self, parent: int, outer: Index, child: int, inner: Index, *, ordered: bool) -> None:
        """Entries ``inner[i]`` of `child`, no one twice, are part of ``outer[i]`` of `parent`.

        With `ordered`, the parts of an entry stay in their order.
        """
        self._parts.append(_Part(parent, outer, child, inner, ordered))

    def owner(self, child: int) -> tuple[int, Index] | None:
        """The axis that all entries of `child` are ordered parts of, and which entry each is of."""
        for p in self._parts:
            if p.ordered and p.child == child and p.inner.size == self.sizes[child]:
                outer = np.empty_like(p.outer)
                outer[p.inner] = p.outer
                return p.parent, outer
        return None

    def whole(self, child: int, outer: Index, size: int) -> int:
        """An axis of `size` entries, ``outer[i]`` of which takes entry i of `child` along.

        Where those are pixels of channels that lie in one entry each, the channels are what is
        taken along. What is asked for twice is the same axis.
        """
        owner = self.owner(child)
        if owner is not None:
            parent, of = owner
            above = np.zeros(self.sizes[parent], np.intp)
            above[of] = outer
            if np.unique(of).size == above.size and np.array_equal(above[of], outer):
                return self.whole(parent, above, size)
        key = (self.root(child), outer.tobytes())
        if key not in self._wholes:
            self._wholes[key] = self.axis(size)
            every = np.arange(self.sizes[child])
            self.part(self._wholes[key], outer, child, every, ordered=False)
        return self._wholes[key]

    def freeze(self, axis: int, reason: str, index: Index | None = None) -> None:
        """Entries, by default all of an axis, keep their places."""
        every = np.arange(self.sizes[axis]) if index is None else index
        self._frozen.append((axis, every, reason))

    def units(self) -> list[Units]:
        """Which entries may change places, and which keep theirs; outer units before inner."""
        return _Solver(self).units() if self.sizes else []


class _Solver:
    """Atoms, the sets of entries that are the same, and the trees that they form as parts.

    Attributes:
        atom: [entries], the atom of each entry of all axes, one axis after the other.
        rank: [entries], its number among the entries of its axis in its atom.
    """

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.roots = sorted({entries.root(a) for a in range(len(entries.sizes))})
        sizes = [entries.sizes[r] for r in self.roots]
        self.starts = dict(zip(self.roots, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self.axis_of = np.repeat(np.arange(len(self.roots)), sizes)
        self._join()
        self._rank()
        self.frozen: dict[int, str] = {}
        self._find_parents()
        self._freeze()

    def _at(self, axis: int, index: Index) -> Index:
        return np.asarray(index + self.starts[self.entries.root(axis)])

    def _join(self) -> None:
        self.ties = [(self._at(s.first, s.a), self._at(s.second, s.b)) for s in self.entries._same]
        n = self.axis_of.size
        a = np.concatenate([np.empty(0, np.intp), *(t[0] for t in self.ties)])
        b = np.concatenate([np.empty(0, np.intp), *(t[1] for t in self.ties)])
        graph = coo_matrix((np.ones(a.size, bool), (a, b)), (n, n))
        self.count, self.atom = connected_components(graph, directed=False)
        self.order = np.argsort(self.atom, kind="stable")
        self.ends = np.searchsorted(self.atom[self.order], np.arange(self.count + 1))

    def _rank(self) -> None:
        atom, axis = self.atom[self.order], self.axis_of[self.order]
        first = np.ones(atom.size, bool)
        first[1:] = (atom[1:] != atom[:-1]) | (axis[1:] != axis[:-1])
        begins = np.maximum.accumulate(np.where(first, np.arange(atom.size), 0))
        self.rank = np.empty(atom.size, np.intp)
        self.rank[self.order] = np.arange(atom.size) - begins

    def _find_parents(self) -> None:
        """The edges from each atom to those it is part of, and from each to its parts."""
        self.parents: dict[int, dict[int, list[_Edge]]] = defaultdict(dict)
        self.children: dict[int, set[int]] = defaultdict(set)
        for number, p in enumerate(self.entries._parts):
            outer, inner = self._at(p.parent, p.outer), self._at(p.child, p.inner)
            label = _count_up(p.outer) if p.ordered else np.zeros_like(p.outer)
            table = zip(
                self.atom[outer].tolist(),
                self.atom[inner].tolist(),
                self.rank[outer].tolist(),
                self.rank[inner].tolist(),
                label.tolist(),
                strict=True,
            )
            for parent, child, *edge in table:
                self.parents[child].setdefault(parent, []).append((number, *edge))
                self.children[parent].add(child)

    def _freeze(self) -> None:
        for axis, index, reason in self.entries._frozen:
            for atom in self.atom[self._at(axis, index)].tolist():
                self.frozen.setdefault(atom, reason)
        self._spread(list(self.frozen))
        cut = {p for parents in self.parents.values() if len(parents) > 1 for p in parents}
        cut -= self.frozen.keys()
        self.frozen.update((p, SEVERAL) for p in sorted(cut))
        self._spread(sorted(cut))
        settled = set(self._leaves_first)
        looping = [a for a in range(self.count) if a not in settled and a not in self.frozen]
        self.frozen.update((a, CYCLE) for a in looping)

    def _spread(self, todo: list[int]) -> None:
        """What has a part that keeps its place keeps its own, and so do its ordered parts."""
        while todo:
            atom = todo.pop()
            near = set(self.parents.get(atom, ()))
            near |= {c for c in self.children.get(atom, ()) if self._is_ordered(atom, c)}
            for other in near:
                if other not in self.frozen:
                    self.frozen[other] = self.frozen[atom]
                    todo.append(other)

    def _is_ordered(self, parent: int, child: int) -> bool:
        return any(self.entries._parts[e[0]].ordered for e in self.parents[child][parent])

    @cached_property
    def _leaves_first(self) -> list[int]:
        """Free atoms, each after all of its parts."""
        left = {a: len(self.children[a]) for a in list(self.children)}
        done = [a for a in range(self.count) if not left.get(a) and a not in self.frozen]
        for atom in done:
            for parent in self.parents.get(atom, ()):
                left[parent] -= 1
                if not left[parent] and parent not in self.frozen:
                    done.append(parent)
        return done

    @cached_property
    def _codes(self) -> list[bytes]:
        """What each atom is made of: its entries and the ties between them, by rank."""
        shift = max(1, int(self.rank.max(initial=0)).bit_length())
        atoms, codes = [self.atom], [(self.axis_of << 2 * shift) + self.rank]
        for number, (a, b) in enumerate(self.ties, start=len(self.roots)):
            atoms.append(self.atom[a])
            codes.append((number << 2 * shift) + (self.rank[a] << shift) + self.rank[b])
        atom, code = np.concatenate(atoms), np.concatenate(codes)
        order = np.lexsort((code, atom))
        ends = np.searchsorted(atom[order], np.arange(self.count + 1)).tolist()
        code = code[order]
        return [code[i:j].tobytes() for i, j in pairwise(ends)]

    @cached_property
    def _kind(self) -> dict[int, int]:
        """Free atoms of one kind are made of the same, with parts of the same kinds."""
        kinds: dict[object, int] = {}
        found: dict[int, int] = {}
        for atom in self._leaves_first:
            if atom in self.frozen:
                continue
            parts = sorted((self._edges(atom, c), found[c]) for c in self.children.get(atom, ()))
            found[atom] = kinds.setdefault((self._codes[atom], tuple(parts)), len(kinds))
        return found

    def _edges(self, parent: int, child: int) -> tuple[_Edge, ...]:
        return tuple(sorted(self.parents[child][parent]))

    def _own(self, atom: int) -> Index:
        return np.asarray(self.order[self.ends[atom] : self.ends[atom + 1]])

    def _all(self, atom: int) -> Iterator[Index]:
        """The entries of an atom and its parts, in an order that is the same for all of a kind."""
        yield self._own(atom)
        parts = self.children.get(atom, ())
        key = {c: (self._edges(atom, c), self._kind[c], self._own(c)[0]) for c in parts}
        for child in sorted(parts, key=key.__getitem__):
            yield from self._all(child)

    def _depth(self, atom: int) -> int:
        depth = 0
        while atom not in self.frozen and len(self.parents.get(atom, ())) == 1:
            (atom,) = self.parents[atom]
            depth += 1
        return depth

    def units(self) -> list[Units]:
        alike: dict[object, list[int]] = defaultdict(list)
        for atom in range(self.count):
            if atom in self.frozen:
                alike["frozen", self.frozen[atom], self._codes[atom]].append(atom)
                continue
            within = tuple(sorted((p, *self._edges(p, atom)) for p in self.parents.get(atom, ())))
            alike[self._kind[atom], within].append(atom)
        found = []
        for atoms in alike.values():
            reason = self.frozen.get(atoms[0], "")
            if reason or len(atoms) > 1:
                walk = [[self._own(a)] if reason else list(self._all(a)) for a in atoms]
                table = np.stack([np.concatenate(parts) for parts in walk])
                found.append(Units(len(atoms), self._depth(atoms[0]), self._places(table), reason))
        return sorted(found, key=lambda units: units.depth)

    def _places(self, table: Index) -> dict[int, Index]:
        """Per axis, its entries in each row of a table of entries."""
        axes = self.axis_of[table[0]]
        return {
            self.roots[a]: table[:, axes == a] - self.starts[self.roots[a]]
            for a in np.unique(axes).tolist()
        }


def _count_up(values: Index) -> Index:
    """How often each value came before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered)
    count = np.empty_like(values)
    count[order] = np.arange(values.size) - first
    return count
