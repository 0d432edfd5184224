"""The blocks of one layer: what each is worth, and which of them stay. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import BlockShape, FloatArray, IntArray
from .grouping import Part, block_sums, group_rows, natural_groups, retained

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which rows, and which input channels, share the blocks of a layer.

    Attributes:
        block: R x C.
        rows: int32 [N], the row block of each row.
        channels: int32 [channels], the column block of each input channel; a block lies within
            one tap. None where C is 1.
    """

    block: BlockShape
    rows: IntArray
    channels: IntArray | None = None


@dataclass(frozen=True)
class LayerShape:
    """A weight as a matrix: N rows by (channel, tap) columns, in `groups` convolution groups."""

    rows: int
    channels: int
    taps: int = 1
    groups: int = 1

    @property
    def columns(self) -> int:
        return self.channels * self.taps

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    def natural(self, block: BlockShape) -> Grouping:
        """Neighbours together; no block spans two convolution groups."""
        per_group = self.rows // self.groups
        one = natural_groups(per_group, block.rows)
        step = int(one[-1]) + 1
        rows = np.concatenate([one + step * group for group in range(self.groups)])
        channels = natural_groups(self.channels, block.cols) if block.cols > 1 else None
        return Grouping(block, rows.astype(np.int32), channels)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A layer's saliency in blocks.

    Attributes:
        shape: the layer.
        saliency: float32 [N, columns], not negative.
        grouping: how it is cut.
    """

    shape: LayerShape
    saliency: FloatArray
    grouping: Grouping

    @cached_property
    def scores(self) -> FloatArray:
        """float32 [row blocks, columns], or [row blocks, column blocks * taps]."""
        return self.by_channels(block_sums(self.saliency, self.grouping.rows))

    def by_channels(self, matrix: FloatArray) -> FloatArray:
        """[rows, channels * taps] summed over each block of channels."""
        channels = self.grouping.channels
        if channels is None:
            return matrix
        planes = matrix.reshape(len(matrix), self.shape.channels, self.shape.taps)
        sums = block_sums(np.ascontiguousarray(planes.transpose(1, 0, 2)), channels)
        return np.ascontiguousarray(sums.transpose(1, 0, 2)).reshape(len(matrix), -1)

    @cached_property
    def sizes(self) -> IntArray:
        """Weights in each block, shaped like `scores`."""
        heights = np.bincount(self.grouping.rows)
        channels = self.grouping.channels
        widths = np.ones(self.shape.channels) if channels is None else np.bincount(channels)
        sizes: IntArray = np.outer(heights, np.repeat(widths, self.shape.taps)).astype(np.int32)
        return sizes

    @cached_property
    def order(self) -> npt.NDArray[np.intp]:
        """Blocks from the most salient to the least; equal ones in their own order."""
        return np.argsort(-self.scores.ravel(), kind="stable")

    def count(self, weights: int) -> int:
        """How many of the best blocks hold about so many weights: at least one."""
        held = np.cumsum(self.sizes.ravel()[self.order], dtype=np.int64)
        after = int(np.searchsorted(held, weights))  # the first that holds enough
        before = int(held[after - 1]) if after else 0
        near = after < held.size and held[after] - weights <= weights - before
        return max(1, after + int(near))

    def mask(self, weights: int) -> Mask:
        """The best blocks that hold about so many weights: bool [N, columns]."""
        flat = np.zeros(self.scores.size, bool)
        flat[self.order[: self.count(weights)]] = True
        mask: Mask = self._spread(flat.reshape(self.scores.shape))
        return mask

    def lack(self, weights: int) -> FloatArray:
        """What the block of each weight is short of to stay when about so many weights do.

        Returns:
            float32 [N, columns]: 0 in blocks that stay, 1 in those that are worth nothing.
        """
        least = self.scores.flat[self.order[self.count(weights) - 1]]
        short = 1 - self.scores / np.maximum(least, np.finfo(np.float32).tiny)
        lack: FloatArray = self._spread(np.maximum(short, 0).astype(np.float32))
        return lack

    def _spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One value per block, shaped like `scores`, for each weight: [N, columns]."""
        channels = self.grouping.channels
        if channels is not None:
            planes = values.reshape(len(values), -1, self.shape.taps)
            values = planes[:, channels].reshape(len(values), -1)
        return values[self.grouping.rows]

    def part(self, weights: int) -> Part:
        """What the layer wants of its row groups when it keeps so many weights."""
        return Part(self.by_channels(self.saliency), self.count(weights))

    def regrouped(self, weights: int, seed: int, adapted: bool = False) -> Blocks:
        """With the rows grouped so that the most saliency is kept; channels stay as they are."""
        size, per_group = self.grouping.block.rows, self.shape.rows // self.shape.groups
        part = self.part(weights)
        kept = max(1, round(part.kept / self.shape.groups))
        rows, first = [], 0
        for group in range(self.shape.groups):
            own = slice(group * per_group, (group + 1) * per_group)
            start = self.grouping.rows[own] - first
            parts = [Part(part.saliency[own], kept)]
            rows.append(group_rows(parts, size, start=start, adapted=adapted, seed=seed) + first)
            first += int(start.max()) + 1
        grouping = replace(self.grouping, rows=np.concatenate(rows).astype(np.int32))
        return Blocks(self.shape, self.saliency, grouping)

    def retained(self, weights: int) -> float:
        """The share of the saliency that `mask(weights)` keeps."""
        return retained([self.part(weights)], self.grouping.rows)
