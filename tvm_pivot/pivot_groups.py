"""Rows (or columns) in groups of one block each: what finders propose and the search improves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .layout import BlockShape, IntArray

AS_IT_IS = "as it is"
BoolArray = npt.NDArray[np.bool_]
# From the kept blocks of every row block (int [row blocks]) to a predicted time, in any unit.
Cost = Callable[[npt.NDArray[np.int64]], float]


@dataclass(frozen=True, eq=False)
class Groups:
    """`count` rows in groups of up to `size`.

    Attributes:
        members: int32 [groups, size]: each row once; `count` marks a place that is free.
        count: rows.
    """

    members: IntArray
    count: int

    @property
    def size(self) -> int:
        return int(self.members.shape[1])

    @property
    def heights(self) -> IntArray:
        """Rows of each group: int32 [groups]."""
        return np.asarray(np.count_nonzero(self.members < self.count, axis=1), np.int32)

    @property
    def order(self) -> IntArray:
        """The rows, group by group: int32 [count]."""
        order: IntArray = self.members[self.members < self.count]
        return order

    @staticmethod
    def chunks(order: npt.ArrayLike, size: int) -> Groups:
        """Groups of `size` neighbours of an order; the last one may have free places."""
        rows = np.asarray(order, np.int32)
        places = np.full(-(-rows.size // size) * size, rows.size, np.int32)
        places[: rows.size] = rows
        return Groups(places.reshape(-1, size), rows.size)

    @staticmethod
    def of(lists: Iterable[Iterable[int]], size: int, count: int) -> Groups:
        """Groups of the rows in each list, the last of a list with free places."""
        places: list[int] = []
        for rows in lists:
            places += rows
            places += [count] * (-len(places) % size)
        return Groups(np.array(places, np.int32).reshape(-1, size), count)

    def tidied(self) -> Groups:
        """Groups that fit into one made one, which never keeps more blocks; free places last."""
        members = np.sort(self.members, axis=1)
        heights = np.count_nonzero(members < self.count, axis=1)
        whole = [list(rows) for rows in members[heights == self.size].tolist()]
        short = [i for i in np.argsort(-heights, kind="stable") if 0 < heights[i] < self.size]
        joined: list[list[int]] = []
        room: list[list[list[int]]] = [[] for _ in range(self.size)]  # by places that are free
        for group in short:
            rows = members[group, : heights[group]].tolist()
            fits = next((r for r in room[len(rows) :] if r), None)
            found = fits.pop() if fits else []
            if not found:
                joined.append(found)
            found += rows
            room[self.size - len(found)].append(found)
        return Groups.of([*whole, *joined], self.size, self.count)

    def slots(self) -> IntArray:
        """The row in each slot, int32 [groups * size]: free places repeat their group's last row.

        No group may be empty.
        """
        last = np.max(np.where(self.members < self.count, self.members, -1), axis=1)
        slots: IntArray = np.where(self.members < self.count, self.members, last[:, None]).ravel()
        return slots


@dataclass(frozen=True, eq=False)
class Grouping:
    """Blocks of a matrix: groups of its rows by groups of its columns, and how they were found."""

    rows: Groups
    columns: Groups
    kind: str

    @staticmethod
    def natural(shape: tuple[int, int], block: BlockShape) -> Grouping:
        """Neighbours together, as they are."""
        n, k = shape
        rows = Groups.chunks(np.arange(n), block.rows)
        return Grouping(rows, Groups.chunks(np.arange(k), block.cols), AS_IT_IS)


def merged(mask: BoolArray, groups: Groups) -> npt.NDArray[np.uint8]:
    """Non-zeros of each column in each group of rows, for groups of up to 255: [groups, K]."""
    if groups.size == 1:
        return mask[groups.members[:, 0]].view(np.uint8)
    padded = np.concatenate([mask, np.zeros((1, mask.shape[1]), np.bool_)]).view(np.uint8)
    counts = padded[groups.members[:, 0]]
    for place in range(1, groups.size):
        counts += padded[groups.members[:, place]]
    return counts


def row_lengths(mask: BoolArray, rows: Groups, columns: Groups) -> npt.NDArray[np.int64]:
    """Kept blocks of every row group: int64 [row groups]."""
    some = merged(mask, rows) > 0
    if columns.size > 1:
        some = merged(np.ascontiguousarray(some.T), columns).T > 0
    lengths: npt.NDArray[np.int64] = np.count_nonzero(some, axis=1).astype(np.int64)
    return lengths


def kept_slots(lengths: npt.NDArray[np.int64]) -> float:
    """The cost where nothing is known of the target: kept blocks, and how far the longest row
    block is from the mean, which is what the last core to finish has left to do at worst.
    """
    if lengths.size == 0:
        return 0.0
    return float(lengths.sum()) + float(lengths.max()) - float(lengths.mean())
