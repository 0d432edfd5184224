"""Hypergraph partitioning as a way to order rows: what `find_pivot` is compared with.

Rows are the vertices of a hypergraph and columns its nets, which join the rows that have a non-zero
there. Parts are groups of R rows. The connectivity of a partition, the sum over all nets of the
parts that each one touches, is then exactly the number of R x 1 blocks. It is lowered the way
multilevel partitioners do (hMETIS, PaToH): vertices that share many nets are matched, level by
level; the coarsest ones are put into parts; then each level, down to single rows, is refined by
passes that exchange vertices, also where this costs something at first (Fiduccia and Mattheyses).
Parts hold exactly R rows; where rows do not divide into them, rows without nets fill up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tvm_pivot.pivot_groups import BoolArray, Groups

Floats = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]
# How often it all begins anew within the parts that it has: V-cycles.
CYCLES = 3
# Passes of a level that exchange whatever gains, and passes that climb out of a minimum.
SWEEPS, CLIMBS = 16, 4
# Exchanges of one climb, those without a gain after which it ends, and the memory bound of both.
MOST_MOVES, PATIENCE = 200, 40
# Vertices that a pass looks at: its time grows with their square.
MOST_VERTICES = 1024


class Level(NamedTuple):
    """Vertices of one size: nets bool as float [vertices, nets], and the part that each is in."""

    nets: Floats
    part: Index


def hypergraph(mask: BoolArray, size: int, seed: int = 0) -> Groups:
    """Groups of rows as multilevel hypergraph partitioning finds them.

    Args:
        mask: bool [N, K].
        size: R, rows of a part.
        seed: of the order in which vertices are tried.
    """
    count = mask.shape[0]
    parts = -(-count // size)
    if parts < 2 or size < 2:
        return Groups.chunks(np.arange(count), size)
    rng = np.random.default_rng(seed)
    nets = np.zeros((parts * size, mask.shape[1]), np.float32)
    nets[:count] = mask
    part: Index | None = None
    best, lowest = np.zeros(0, np.intp), np.inf
    for _ in range(CYCLES):
        part = _cycle(nets, part, size, rng)
        connectivity = _connectivity(nets, part)
        if connectivity < lowest:
            best, lowest = part, connectivity
    members = np.argsort(best, kind="stable").reshape(parts, size)
    return Groups(np.minimum(members, count).astype(np.int32), count)


def _connectivity(nets: Floats, part: Index) -> float:
    """Parts that each net touches, summed over all nets."""
    held = nets[np.argsort(part, kind="stable")].reshape(int(part.max()) + 1, -1, nets.shape[1])
    return float(held.any(axis=1).sum())


def _cycle(nets: Floats, part: Index | None, size: int, rng: np.random.Generator) -> Index:
    """Coarsen (within the parts, if there are any), partition the coarsest level, refine each."""
    levels: list[tuple[Floats, Index]] = []  # finer vertices, and what each is in next
    left = size
    while left % 2 == 0 and left > 1:
        into = _matched(nets, part, rng)
        levels.append((nets, into))
        order = np.argsort(into, kind="stable")
        nets = np.maximum(nets[order[::2]], nets[order[1::2]])
        part = None if part is None else part[order[::2]]
        left //= 2
    if part is None:
        part = _grown(nets, left)
    part = _refined(Level(nets, part), rng)
    for finer, into in reversed(levels):
        part = _refined(Level(finer, part[into]), rng)
    return part


def _matched(nets: Floats, part: Index | None, rng: np.random.Generator) -> Index:
    """Pairs of vertices that share most nets, the heaviest first: the pair each vertex is in."""
    number = nets.shape[0]
    order = rng.permutation(number)  # decides where pairs are as heavy as each other
    shared = nets[order] @ nets[order].T
    if part is not None:
        shared[part[order][:, None] != part[order]] = -1
    shared[np.tri(number, dtype=np.bool_)] = -1
    pairs = np.argsort(-shared, axis=None, kind="stable")[: np.count_nonzero(shared >= 0)]
    into = np.full(number, -1, np.intp)
    found = 0
    # Most pairs are of vertices that are taken already: those are left out again and again.
    while found < number // 2:
        first, second = (order[side] for side in np.divmod(pairs, number))
        for a, b in zip(first[:number].tolist(), second[:number].tolist(), strict=True):
            if into[a] < 0 and into[b] < 0:
                into[a] = into[b] = found
                found += 1
        pairs = pairs[number:]
        a, b = np.divmod(pairs, number)
        pairs = pairs[(into[order[a]] < 0) & (into[order[b]] < 0)]
    return into


def _grown(nets: Floats, size: int) -> Index:
    """Parts of `size` vertices that grow by whichever adds fewest nets, from dense ones."""
    part = np.full(nets.shape[0], -1, np.intp)
    count = nets.sum(axis=1)
    number = 0
    for seed in np.argsort(-count, kind="stable"):
        if part[seed] >= 0:
            continue
        part[seed], held = number, nets[seed]
        for _ in range(size - 1):
            added = np.where(part < 0, count - nets @ held, np.inf)
            best = int(np.argmin(added))
            part[best], held = number, np.maximum(held, nets[best])
        number += 1
    return part


def _refined(level: Level, rng: np.random.Generator) -> Index:
    """Parts after sweeps of exchanges that gain, and climbs while those find something."""
    if int(level.part.max()) == 0 or level.part.size == int(level.part.max()) + 1:
        return level.part
    part = level.part.copy()
    for _ in range(SWEEPS):
        if not _sweep(Level(level.nets, part), rng):
            break
    for _ in range(CLIMBS):
        if not _climb(Level(level.nets, part), rng):
            break
    return part


class Gains:
    """What exchanging vertices of some parts gains: their connectivity falls by that much.

    Attributes:
        vertices: the vertices that are looked at, all those of some parts.
        own: [vertices], what each one adds to its own part.
        added: [vertices, vertices], what vertex i adds to the part of j without j.
    """

    def __init__(self, level: Level, rng: np.random.Generator) -> None:
        self.nets, self.part = level
        self.each = self.part.size // (int(self.part.max()) + 1)
        chosen = rng.permutation(int(self.part.max()) + 1)[: max(2, MOST_VERTICES // self.each)]
        order = np.argsort(self.part, kind="stable").reshape(-1, self.each)
        self.vertices = order[chosen].ravel()
        self.mine = self.nets[self.vertices]
        self.added = self.mine @ self._lacking(np.arange(self.vertices.size)).T

    def _lacking(self, places: Index) -> Floats:
        """The nets that the parts of some vertices do not have without those."""
        where = self.part[self.vertices[places]]
        parts, inverse = np.unique(where, return_inverse=True)
        held = np.stack([self.nets[self.vertices[self.of(p)]].sum(axis=0) for p in parts])
        lacking: Floats = (held[inverse] - self.mine[places] == 0).astype(np.float32)
        return lacking

    def of(self, part: int) -> Index:
        """The places of the vertices in a part."""
        return np.flatnonzero(self.part[self.vertices] == part)

    def table(self) -> Floats:
        """[vertices, vertices]: what an exchange gains; -inf within a part."""
        own = np.diag(self.added)
        gain: Floats = own[:, None] + own - self.added - self.added.T
        where = self.part[self.vertices]
        gain[where[:, None] == where] = -np.inf
        return gain

    def swap(self, a: int, b: int) -> None:
        """Exchange two vertices."""
        first, second = self.vertices[[a, b]]
        self.part[[first, second]] = self.part[[second, first]]

    def update(self, a: int, b: int) -> Index:
        """Bring up to date what the parts of two vertices are missing; the places in them."""
        places = np.concatenate([self.of(self.part[self.vertices[i]]) for i in (a, b)])
        self.added[:, places] = self.mine @ self._lacking(places).T
        return places


def _sweep(level: Level, rng: np.random.Generator) -> bool:
    """Exchange pairs, the best first, each part once; whether there was any that gains."""
    gains = Gains(level, rng)
    table = np.triu(gains.table())
    first, second = np.nonzero(table > 0)
    where, done = level.part[gains.vertices], set[int]()
    for i in np.argsort(-table[first, second], kind="stable")[:50_000].tolist():
        a, b = int(first[i]), int(second[i])
        if where[a] not in done and where[b] not in done:
            done |= {int(where[a]), int(where[b])}
            gains.swap(a, b)
    return bool(done)


def _climb(level: Level, rng: np.random.Generator) -> bool:
    """A pass of the best exchanges, good or bad, each vertex once; the best moment is kept."""
    gains = Gains(level, rng)
    table = gains.table()
    best, total, moves = (0.0, 0), 0.0, list[tuple[int, int]]()
    locked = np.zeros(gains.vertices.size, np.bool_)
    while len(moves) < min(MOST_MOVES, best[1] + PATIENCE):
        a, b = (int(i) for i in np.unravel_index(np.argmax(table), table.shape))
        if not np.isfinite(table[a, b]):
            break
        total += float(table[a, b])
        gains.swap(a, b)
        moves.append((a, b))
        if total > best[0]:
            best = (total, len(moves))
        locked[[a, b]] = True
        places = gains.update(a, b)
        own = np.diag(gains.added)
        fresh = own[:, None] + own[places] - gains.added[:, places] - gains.added[places].T
        where = level.part[gains.vertices]
        fresh[(where[:, None] == where[places]) | locked[:, None] | locked[places]] = -np.inf
        table[:, places], table[places] = fresh, fresh.T
        table[[a, b]] = table[:, [a, b]] = -np.inf
    for a, b in reversed(moves[best[1] :]):
        gains.swap(a, b)
    return best[0] > 0
