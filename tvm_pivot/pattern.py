"""Where the non-zeros of a weight matrix lie: density, block fill, and the pattern's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .layout import BlockShape, FloatArray

# A mask is called block-pruned when this share of its kept block slots is non-zero: training
# sets a weight to exactly zero now and then.
FULL = 0.98
# Twice a block shape that is full may be full too; one that is not never is.
SIZES = (2, 4, 8, 16, 32, 64)
# The blocks whose fill is told to the user.
TOLD = tuple(BlockShape(*s) for s in ((2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 8), (16, 16)))


@dataclass(frozen=True)
class Pattern:
    """What a weight matrix [N, K] looks like.

    Attributes:
        name: ``"dense"``, ``"zero"``, ``"unstructured"``, or e.g. ``"8x1 blocks"``.
        density: non-zeros / all weights.
        block: the largest block shape that is full; 1 x 1 where nothing larger is.
    """

    name: str
    density: float
    block: BlockShape


class BlockMasks:
    """Which blocks of a mask bool [N, K] hold a non-zero, for blocks of any shape.

    Larger blocks are merged from smaller ones that are known already: matrices have 10^8 weights.
    """

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self._known = {BlockShape(1): mask}
        self.nonzeros = int(np.count_nonzero(mask))

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self._known[BlockShape(1)].shape
        return n, k

    def kept(self, block: BlockShape) -> npt.NDArray[np.bool_]:
        """Which blocks hold a non-zero: bool [ceil(N / R), ceil(K / C)]."""
        if block not in self._known:
            parts = [b for b in self._known if not (block.rows % b.rows or block.cols % b.cols)]
            part = min(parts, key=lambda b: self._known[b].size)
            merged = _merged(self._known[part], block.rows // part.rows, 0)
            self._known[block] = _merged(merged, block.cols // part.cols, 1)
        return self._known[block]

    def fill(self, block: BlockShape) -> float:
        """Non-zeros per slot of the kept blocks; 1.0 where nothing is kept."""
        kept, (n, k) = self.kept(block), self.shape
        per_row = kept.sum(axis=1) * block.cols
        if k % block.cols:  # the last block column is narrower
            per_row -= kept[:, -1] * (block.cols - k % block.cols)
        slots = int(per_row.sum()) * block.rows
        if n % block.rows:
            slots -= int(per_row[-1]) * (block.rows - n % block.rows)
        return self.nonzeros / slots if slots else 1.0


def _merged(mask: npt.NDArray[np.bool_], count: int, axis: int) -> npt.NDArray[np.bool_]:
    """`count` neighbours along an axis as one, which is set where any of them is."""
    length = mask.shape[axis]
    if count == 1:
        return mask
    pieces = [slice(i, length, count) for i in range(min(count, length))]
    first, *others = (mask[piece] if axis == 0 else mask[:, piece] for piece in pieces)
    merged = first.copy()
    for other in others:  # shorter by one where the last block is not whole
        part = merged[: other.shape[0]] if axis == 0 else merged[:, : other.shape[1]]
        np.logical_or(part, other, out=part)
    return merged


def classify(weight: FloatArray, masks: BlockMasks | None = None) -> Pattern:
    """The pattern of a weight matrix [N, K], columns in (channel, tap) order.

    Args:
        weight: the matrix.
        masks: those of ``weight != 0``, where they are needed again.
    """
    masks = masks or BlockMasks(weight != 0)
    density = masks.nonzeros / max(weight.size, 1)
    if masks.nonzeros == 0:
        return Pattern("zero", 0.0, BlockShape(1))
    if density >= FULL:
        return Pattern("dense", density, BlockShape(1))
    rows = _largest(weight.shape[0], lambda r: masks.fill(BlockShape(r)))
    cols = _largest(weight.shape[1], lambda c: masks.fill(BlockShape(rows, c)))
    block = BlockShape(rows, cols)
    name = "unstructured" if rows == cols == 1 else f"{block} blocks"
    return Pattern(name, density, block)


def _largest(extent: int, fill: Callable[[int], float]) -> int:
    """The largest of `SIZES` up to `extent` whose blocks are full, or 1."""
    largest = 1
    for size in SIZES:
        if size > extent or fill(size) < FULL:
            break
        largest = size
    return largest
