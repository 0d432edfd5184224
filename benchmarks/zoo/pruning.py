"""Which weights a pruned variant keeps, and how the kept ones are rescaled.

A convolution weight [O, I, kh, kw] is pruned as the matrix its kernel multiplies by: one row per
output channel, one column per (input channel, tap).  Two column orders are in use:

* ``"taps"``: (kh, kw, I), input channel fastest.  A 1 x C block is C input channels of one tap.
* ``"channels"``: (I, kh, kw), torch's own order.  A 1 x C block runs along a channel's taps.

The order makes no difference to R x 1 blocks, single weights and dense layers [O, I].
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Weight = NDArray[np.float32]
ColumnOrder = Literal["taps", "channels"]
VariantKind = Literal["dense", "block", "dlmc", "diag", "hidden-diag"]

_NAMED_KINDS: tuple[VariantKind, ...] = ("dlmc", "diag", "hidden-diag")
_VARIANT = re.compile(r"(\w[\w-]*)@(\d*\.?\d+)")
_BLOCK = re.compile(r"(\d+)x(\d+)")


@dataclass(frozen=True)
class Variant:
    """How a network is pruned.

    ``kind`` is "dense", "block" (magnitude, in ``block`` = rows x columns; 1x1 is unstructured),
    "dlmc" (a published mask), "diag" (block-diagonal) or "hidden-diag" (block-diagonal under a
    random order of output and of input channels, which a pivot should find again).
    """

    kind: VariantKind = "dense"
    density: float = 1.0
    block: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads "dense", "8x1@0.1", "1x1@0.1", "dlmc@0.1", "diag@0.125" or "hidden-diag@0.125".

        Raises ValueError if ``text`` is none of these, or its block or density is out of range.
        """
        if text == "dense":
            return cls()
        match = _VARIANT.fullmatch(text)
        if match is not None:
            pattern, density = match[1], float(match[2])
            for kind in _NAMED_KINDS:
                if pattern == kind:
                    return cls(kind, density)
            sides = _BLOCK.fullmatch(pattern)
            if sides is not None:
                return cls("block", density, (int(sides[1]), int(sides[2])))
        raise ValueError(
            f"unknown variant {text!r}: use 'dense', '<rows>x<columns>@<density>', "
            "'dlmc@<density>', 'diag@<density>' or 'hidden-diag@<density>'"
        )

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], not {self.density}")
        if min(self.block) < 1:
            raise ValueError(f"block sides must be positive, not {self.block}")
        if self.kind.endswith("diag") and not math.isclose(self.density, 1 / self.groups):
            raise ValueError(f"a block-diagonal density is 1/n for a whole n, not {self.density}")

    @property
    def groups(self) -> int:
        """Blocks on the diagonal of a "diag" or "hidden-diag" variant."""
        return round(1 / self.density)

    def __str__(self) -> str:
        if self.kind == "dense":
            return "dense"
        prefix = f"{self.block[0]}x{self.block[1]}" if self.kind == "block" else self.kind
        return f"{prefix}@{self.density:g}"


def as_matrix(weight: NDArray[np.generic], order: ColumnOrder = "taps") -> NDArray[np.generic]:
    """Views a weight [O, I] or [O, I, kh, kw] as a matrix [O, columns] in the given order."""
    if weight.ndim == 4 and order == "taps":
        weight = weight.transpose(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def from_matrix(
    matrix: NDArray[np.generic], shape: tuple[int, ...], order: ColumnOrder = "taps"
) -> NDArray[np.generic]:
    """Inverse of :func:`as_matrix`: the array of ``shape`` (OI or OIHW) behind ``matrix``."""
    if len(shape) == 4 and order == "taps":
        outputs, inputs, height, width = shape
        return matrix.reshape(outputs, height, width, inputs).transpose(0, 3, 1, 2)
    return matrix.reshape(shape)


def block_scores(matrix: NDArray[np.generic], block: tuple[int, int]) -> NDArray[np.float64]:
    """Mean square of each block, [ceil(rows / R), ceil(columns / C)], from a 2-D matrix.

    The mean (not the sum) keeps ragged blocks at the lower and right edge comparable.
    """
    padding = [(0, -extent % side) for extent, side in zip(matrix.shape, block, strict=True)]
    padded = np.pad(matrix, padding) if np.any(padding) else matrix
    rows, columns = padded.shape[0] // block[0], padded.shape[1] // block[1]
    blocks = padded.reshape(rows, block[0], columns, block[1])
    # One row of blocks at a time: VGG-16's largest weight in float64 would be 800 MB.
    sums = np.empty((rows, columns))
    for row in range(rows):
        exact = blocks[row].astype(np.float64)
        sums[row] = np.einsum("rkc,rkc->k", exact, exact)
    heights, widths = (
        np.minimum(side, extent - np.arange(0, extent, side))
        for extent, side in zip(matrix.shape, block, strict=True)
    )
    return sums / np.outer(heights, widths)


def magnitude_mask(
    weight: Weight, block: tuple[int, int], density: float, order: ColumnOrder = "taps"
) -> Mask:
    """Keeps the largest blocks of a weight [O, I] or [O, I, kh, kw].

    Exactly ``round(density * blocks)`` blocks (one at least) are kept, ties in favour of the
    earlier block.  Returns a mask of the weight's shape, True where kept.
    """
    matrix = as_matrix(weight, order)
    scores = np.abs(matrix) if block == (1, 1) else block_scores(matrix, block)
    kept = _largest(scores.ravel(), max(1, round(scores.size * density)))
    expanded = kept.reshape(scores.shape).repeat(block[0], 0).repeat(block[1], 1)
    mask = from_matrix(expanded[: matrix.shape[0], : matrix.shape[1]], weight.shape, order)
    return np.ascontiguousarray(mask, np.bool_)


def _largest(scores: NDArray[np.generic], count: int) -> Mask:
    """Marks exactly ``count`` of ``scores`` [n], none smaller than an unmarked one."""
    least = np.partition(scores, scores.size - count)[scores.size - count]
    marked = np.asarray(scores > least)
    marked[np.flatnonzero(scores == least)[: count - np.count_nonzero(marked)]] = True
    return marked


def block_diagonal_mask(
    shape: tuple[int, ...], groups: int, shuffle: np.random.Generator | None = None
) -> Mask:
    """Output group g sees input group g only, at every tap; groups differ by one channel at most.

    ``shape`` is OI or OIHW.  With ``shuffle`` both channel orders are permuted, which hides the
    structure without changing its density.  Raises ValueError if a side is below ``groups``.
    """
    if groups > min(shape[:2]):
        raise ValueError(f"{groups} diagonal groups do not fit a weight of shape {shape}")
    rows, columns = (np.arange(extent) * groups // extent for extent in shape[:2])
    if shuffle is not None:
        rows, columns = shuffle.permutation(rows), shuffle.permutation(columns)
    square = rows[:, None] == columns[None, :]
    spread = square.reshape(*shape[:2], *(1 for _ in shape[2:]))
    return np.ascontiguousarray(np.broadcast_to(spread, shape), np.bool_)


def apply_mask(weight: Weight, mask: Mask) -> Weight:
    """Zeroes what the mask drops and scales the rest so that the Frobenius norm stays.

    Keeping the norm keeps the activations of a random network at their dense scale.  Raises
    ValueError if the shapes differ or nothing of the weight is left.
    """
    if weight.shape != mask.shape:
        raise ValueError(f"mask {mask.shape} does not fit weight {weight.shape}")
    pruned = np.where(mask, weight, np.float32(0))
    left = float(np.linalg.norm(pruned))
    if left == 0.0:
        raise ValueError(f"the mask drops every non-zero of a weight of shape {weight.shape}")
    return (pruned * np.float32(float(np.linalg.norm(weight)) / left)).astype(np.float32)
