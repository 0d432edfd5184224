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


def block_mask(mask: npt.NDArray[np.bool_], block: BlockShape) -> npt.NDArray[np.bool_]:
    """Which blocks of `mask` [N, K] hold a non-zero: [ceil(N / R), ceil(K / C)]."""
    n, k = mask.shape
    rows = np.add.reduceat(mask, np.arange(0, n, block.rows), axis=0, dtype=np.int32)
    both = np.add.reduceat(rows, np.arange(0, k, block.cols), axis=1)
    return np.asarray(both > 0)


def block_fill(mask: npt.NDArray[np.bool_], block: BlockShape) -> float:
    """Non-zeros per slot of the kept blocks of `mask` [N, K]; 1.0 where nothing is kept."""
    kept = block_mask(mask, block)
    n, k = mask.shape
    heights = np.full(kept.shape[0], block.rows)
    heights[-1] = n - block.rows * (kept.shape[0] - 1)
    widths = np.full(kept.shape[1], block.cols)
    widths[-1] = k - block.cols * (kept.shape[1] - 1)
    slots = int(heights @ kept.astype(np.int64) @ widths)
    return int(np.count_nonzero(mask)) / slots if slots else 1.0


def classify(weight: FloatArray) -> Pattern:
    """The pattern of a weight matrix [N, K], columns in (channel, tap) order."""
    mask = weight != 0
    kept = int(np.count_nonzero(mask))
    density = kept / max(weight.size, 1)
    if kept == 0:
        return Pattern("zero", 0.0, BlockShape(1))
    if density >= FULL:
        return Pattern("dense", density, BlockShape(1))
    rows = _largest(weight.shape[0], lambda r: block_fill(mask, BlockShape(r)))
    cols = _largest(weight.shape[1], lambda c: block_fill(mask, BlockShape(rows, c)))
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
