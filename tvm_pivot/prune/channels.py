"""R x R blocks: the order of channels that all layers of a channel group share.

The rows of a layer are channels that other layers have as columns. Where blocks hold several
columns, these layers must agree on which channels lie together, and those that the compiler finds
tied (by residual additions, norms, depthwise convolutions, ...) must all follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..layout import BlockShape, IntArray
from ..relay_passes.channel_groups import ChannelGroup, find_channel_groups
from .blocks import Blocks, Grouping
from .grouping import Part, block_sums, group_rows, natural_groups
from .layers import PrunableLayer
from .network import Network

# Rounds over all groups: each one's best order depends on those of its neighbours.
ROUNDS = 2


@dataclass(frozen=True, eq=False)
class _Side:
    """Rows or columns of a pruned layer that follow the units of a group.

    Attributes:
        layer: the number of the layer.
        rows: whether they are its rows.
        index: int [units, width].
    """

    layer: int
    rows: bool
    index: npt.NDArray[np.intp]


class ChannelTies:
    """The free channel groups of a network as far as they reach pruned layers.

    Attributes:
        groups: the sides of each; no channel of a layer is in two of them.
    """

    def __init__(self, network: Network, layers: Sequence[PrunableLayer]) -> None:
        self._shapes = [layer.shape for layer in layers]
        numbers = {
            found.name: number
            for number, layer in enumerate(layers)
            # Steps of a recurrence share their weight, and so their order: one stands for all.
            for found in network.named[layer.name][:1]
            if layer.shape.groups == 1  # within convolution groups, rows keep their order
        }
        taken: set[tuple[int, bool, int]] = set()
        self.groups: list[list[_Side]] = []
        # Where a group lies within the units of another, the one of more units has more choice.
        for group in sorted(find_channel_groups(network.mod).free, key=lambda g: -g.size):
            sides = _sides(group, numbers)
            places = {(s.layer, s.rows, int(i)) for s in sides for i in s.index.flat}
            if sides and not places & taken:
                self.groups.append(sides)
                taken |= places

    def natural(self, number: int, block: BlockShape) -> Grouping:
        """Neighbours together, but for blocks that would span two groups."""
        shape = self._shapes[number]
        if shape.groups > 1:
            return shape.natural(block)
        rows = self._neighbours(number, True, shape.rows, block.rows)
        return Grouping(block, rows, self._neighbours(number, False, shape.channels, block.cols))

    def _neighbours(self, number: int, rows: bool, extent: int, size: int) -> IntArray:
        owner, used = np.full(extent, -1, np.int64), 0
        for side in (s for sides in self.groups for s in sides):
            if (side.layer, side.rows) == (number, rows):
                for index in side.index.T:
                    owner[index] = used + natural_groups(len(index), size)
                    used = int(owner.max()) + 1
        rest = np.flatnonzero(owner < 0)
        owner[rest] = used + natural_groups(rest.size, size)
        return owner.astype(np.int32)

    def regroup(
        self, layers: Sequence[Blocks], kept: Sequence[int], seed: int, adapted: bool
    ) -> list[Blocks]:
        """The channels of each group ordered so that the best blocks of its layers keep most.

        Args:
            layers: all of them, cut into R x R blocks that began as `natural`.
            kept: weights that each keeps.
            seed, adapted: see `group_rows`.
        """
        found, size = list(layers), layers[0].grouping.block.rows
        for turn in range(1 if adapted else ROUNDS):
            for sides in self.groups:
                first = found[sides[0].layer].grouping
                start = _units(first, sides[0])
                # An order made for the other side's neighbours would tie that side to them.
                fresh = (
                    turn == 0
                    and not adapted
                    and np.array_equal(start, natural_groups(start.size, size))
                )
                parts = [_part(found[s.layer], s, kept[s.layer], not fresh) for s in sides]
                chosen = group_rows(parts, size, start=start, adapted=adapted, seed=seed)
                for side in sides:
                    found[side.layer] = _regrouped(found[side.layer], side, chosen)
        return found


def _sides(group: ChannelGroup, numbers: dict[str, int]) -> list[_Side]:
    return [
        _Side(numbers[side.layer], side.side == "rows", np.asarray(side.index))
        for side in group.sides
        if side.layer in numbers
    ]


def _owner(grouping: Grouping, rows: bool) -> IntArray:
    owner = grouping.rows if rows else grouping.channels
    assert owner is not None
    return owner


def _units(grouping: Grouping, side: _Side) -> IntArray:
    """The block of each unit, counted from 0: int32 [units]."""
    owner = _owner(grouping, side.rows)[side.index[:, 0]]
    return np.unique(owner, return_inverse=True)[1].astype(np.int32)


def _regrouped(blocks: Blocks, side: _Side, chosen: IntArray) -> Blocks:
    """A layer whose units on one side lie in the `chosen` blocks."""
    owner = _owner(blocks.grouping, side.rows).copy()
    for index in side.index.T:
        owner[index] = np.unique(owner[index])[chosen]
    old = blocks.grouping
    new = replace(old, rows=owner) if side.rows else replace(old, channels=owner)
    return Blocks(blocks.shape, blocks.saliency, new)


def _part(blocks: Blocks, side: _Side, kept: int, in_blocks: bool) -> Part:
    """What a layer wants of the order of units, given its blocks on the other side, or without."""
    units, shape = len(side.index), blocks.shape
    if side.rows:
        matrix = blocks.by_channels(blocks.saliency) if in_blocks else blocks.saliency
        matrix = matrix[side.index].reshape(units, -1)
    else:
        sums = blocks.saliency
        if in_blocks:
            sums = block_sums(sums, blocks.grouping.rows)
        planes = sums.reshape(len(sums), shape.channels, shape.taps)[:, side.index]
        matrix = planes.transpose(1, 0, 2, 3).reshape(units, -1)
    all_blocks = (int(_units(blocks.grouping, side).max()) + 1) * matrix.shape[1]
    share = blocks.count(kept) / blocks.scores.size
    return Part(np.ascontiguousarray(matrix), max(1, round(share * all_blocks)))
