"""Ways to order rows that others have published, on masks: what `find_pivot` is compared with.

Each is a function from a mask bool [N, K] and a block height R to groups of rows; `two_sided` makes
blocks that are wider than one column with it. They follow the ideas of the papers they are named
after, written for NumPy, with bounded time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import eigsh

from benchmarks.pivot_hypergraph import hypergraph
from tvm_pivot.layout import BlockShape
from tvm_pivot.pivot_groups import BoolArray, Grouping, Groups, merged, row_lengths

Order = Callable[[BoolArray, int], Groups]
Floats = npt.NDArray[np.float32]
SWEEPS = 12
# Rows that a sweep of swaps tries out against each other.
MOST_TRIED = 1024
# How alike rows must be that 1-SA blocks together.
ALIKE = 0.1
# Partitions of two groups that are tried, and rounds of random pairs.
MOST_PARTITIONS, ROUNDS = 35, 60


def natural(mask: BoolArray, size: int) -> Groups:
    """The order the matrix has."""
    return Groups.chunks(np.arange(mask.shape[0]), size)


def by_density(mask: BoolArray, size: int) -> Groups:
    """Dense rows beside dense ones."""
    return Groups.chunks(np.argsort(-np.count_nonzero(mask, axis=1), kind="stable"), size)


def jaccard(mask: BoolArray, size: int) -> Groups:
    """Groups that grow greedily by the row most similar to what they hold (Jaccard)."""
    return _grown(mask, size, 0.0)


def jaccard_swaps(mask: BoolArray, size: int) -> Groups:
    """Greedy growth by Jaccard similarity, and swaps of pairs of rows after it."""
    return _swapped(mask, _grown(mask, size, 0.0))


def one_sa(mask: BoolArray, size: int) -> Groups:
    """1-SA (Labini et al. 2022): groups take only rows that are similar enough; then chunks."""
    return Groups.chunks(_grown(mask, size, ALIKE).order, size)


def tetris(mask: BoolArray, size: int) -> Groups:
    """TETRIS (Ji et al. 2018): swaps of pairs, from the order the matrix has."""
    return _swapped(mask, natural(mask, size))


def channel_swaps(mask: BoolArray, size: int) -> Groups:
    """Channel permutation search (Pool and Yu 2021): two groups at a time are divided anew."""
    rng = np.random.default_rng(0)
    members = natural(mask, size).members.copy()
    padded = np.concatenate([mask, np.zeros((1, mask.shape[1]), np.bool_)]).astype(np.float32)
    halves = list(combinations(range(1, 2 * size), size - 1))
    picked = rng.permutation(len(halves))[:MOST_PARTITIONS]
    pick = np.zeros((picked.size + 1, 2 * size), np.float32)
    pick[0, :size] = 1  # as it is
    for i, half in enumerate(picked, start=1):
        pick[i, [0, *halves[half]]] = 1
    for _ in range(ROUNDS):
        pairs = rng.permutation(members.shape[0])
        pairs = pairs[: pairs.size // 2 * 2].reshape(-1, 2)
        for pair in pairs[:64]:
            both = members[pair].ravel()
            rows = padded[both]
            price = ((pick @ rows > 0).sum(axis=1)) + (((1 - pick) @ rows > 0).sum(axis=1))
            best = pick[int(np.argmin(price))] > 0
            members[pair[0]], members[pair[1]] = both[best], both[~best]
    return Groups(members, mask.shape[0])


def spectral(mask: BoolArray, size: int) -> Groups:
    """Graph partitioning: rows in the order of the Fiedler vector of their similarity graph."""
    weights = mask.astype(np.float32)
    shared = weights @ weights.T + np.float32(1e-3)
    scale = 1 / np.sqrt(shared.sum(axis=1))
    start = np.linspace(1, 2, mask.shape[0])
    if mask.shape[0] < 4:
        return natural(mask, size)
    _, vectors = eigsh(shared * scale[:, None] * scale, k=2, v0=start, tol=1e-3)
    return Groups.chunks(np.argsort(vectors[:, 0] * scale, kind="stable"), size)


BASELINES: dict[str, Order] = {
    "by density": by_density,
    "Jaccard": jaccard,
    "Jaccard + swaps": jaccard_swaps,
    "1-SA": one_sa,
    "TETRIS": tetris,
    "channel swaps": channel_swaps,
    "spectral": spectral,
    "hypergraph": hypergraph,
}


def two_sided(order: Order, mask: BoolArray, block: BlockShape) -> Grouping:
    """Blocks of R x C: the rows in an order, then the columns of those blocks in theirs."""
    rows = order(mask, block.rows)
    columns = natural(mask.T, block.cols)
    if block.cols > 1:
        columns = order(np.ascontiguousarray(merged(mask, rows).T > 0), block.cols)
        across = np.ascontiguousarray(mask.T)
        rows = order(np.ascontiguousarray(merged(across, columns).T > 0), block.rows)
    return Grouping(rows, columns, "baseline")


def fill(mask: BoolArray, grouping: Grouping, block: BlockShape) -> float:
    """Non-zeros per slot of the kept blocks."""
    kept = int(row_lengths(mask, grouping.rows, grouping.columns).sum())
    return int(np.count_nonzero(mask)) / max(kept * block.rows * block.cols, 1)


def _grown(mask: BoolArray, size: int, alike: float) -> Groups:
    """Groups of up to `size` rows, each the most similar to what its group holds already."""
    weights = mask.astype(np.float32)
    count = weights.sum(axis=1)
    free = np.ones(mask.shape[0], np.bool_)
    lists: list[list[int]] = []
    for seed in np.argsort(-count, kind="stable"):
        if not free[seed]:
            continue
        free[seed] = False
        group, held = [int(seed)], weights[seed].copy()
        while len(group) < size and free.any():
            shared = weights @ held
            similar = shared / np.maximum(count + held.sum() - shared, 1)
            best = int(np.argmax(np.where(free, similar, -1)))
            if similar[best] < alike:
                break
            free[best] = False
            group.append(best)
            np.maximum(held, weights[best], out=held)
        lists.append(group)
    return Groups.of(lists, size, mask.shape[0])


def _swapped(mask: BoolArray, groups: Groups) -> Groups:
    """The best swaps of pairs of rows, as many in a sweep as touch no group twice."""
    padded = np.concatenate([mask, np.zeros((1, mask.shape[1]), np.bool_)]).astype(np.float32)
    members, rng = groups.members.copy(), np.random.default_rng(0)
    size = groups.size
    for _ in range(SWEEPS):
        held = padded[members].sum(axis=1)
        place = rng.permutation(members.size)[:MOST_TRIED]
        rows, group = members.ravel()[place], place // size
        alone = padded[rows]
        rest = (held[group] - alone == 0).astype(np.float32)
        price = alone @ rest.T  # what row i adds to the group of row j without row j
        own = np.diag(price)
        gain = own[:, None] + own - price - price.T
        gain[group[:, None] == group] = 0
        if not _swap(members, place, group, gain):
            break
    return Groups(members, groups.count)


def _swap(
    members: npt.NDArray[np.int32],
    place: npt.NDArray[np.int64],
    group: npt.NDArray[np.int64],
    gain: Floats,
) -> bool:
    """Swap pairs, the best first, each group once; whether there was any that gains."""
    first, second = np.nonzero(np.triu(gain) > 0)
    best = np.argsort(-gain[first, second], kind="stable")
    done: set[int] = set()
    flat = members.reshape(-1)
    for i, j in zip(first[best[:50_000]], second[best[:50_000]], strict=True):
        if group[i] in done or group[j] in done:
            continue
        done |= {int(group[i]), int(group[j])}
        flat[[place[i], place[j]]] = flat[[place[j], place[i]]]
    return bool(done)
