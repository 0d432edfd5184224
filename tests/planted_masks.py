"""Masks with a structure that is known, and what shuffles and hides it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def labels_of(count: int, parts: int) -> npt.NDArray[np.int64]:
    """`count` neighbours in `parts` parts of about the same size."""
    return np.arange(count) * parts // count


def diagonal(n: int, k: int, parts: int) -> Mask:
    """Dense blocks on a diagonal."""
    mask: Mask = labels_of(n, parts)[:, None] == labels_of(k, parts)
    return mask


def blocks(shape: tuple[int, int], block: tuple[int, int], density: float, seed: int) -> Mask:
    """Random blocks of R x C; those at the lower and right edge may be cut off."""
    n, k = shape
    rng = np.random.default_rng(seed)
    kept = rng.random((-(-n // block[0]), -(-k // block[1]))) < density
    mask: Mask = kept.repeat(block[0], 0).repeat(block[1], 1)[:n, :k]
    return mask


def cells(n: int, grid: int, share: float, seed: int) -> Mask:
    """Block-column-row: each cell of a grid keeps a share of its rows, and of its columns."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((n, n), np.bool_)
    side = n // grid
    for i in range(grid):
        for j in range(grid):
            cell = np.outer(rng.random(side) < share, rng.random(side) < share)
            mask[i * side : (i + 1) * side, j * side : (j + 1) * side] = cell
    return mask


def strips(count: int, parts: int, seed: int) -> npt.NDArray[np.int64]:
    """`count` neighbours in parts of very different sizes, but none of less than 12."""
    rng = np.random.default_rng(seed)
    sizes = 12 + np.floor(rng.dirichlet(np.ones(parts)) * (count - 12 * parts)).astype(np.int64)
    sizes[0] += count - sizes.sum()
    return np.repeat(np.arange(parts), sizes)


def grid(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], share: float, seed: int
) -> Mask:
    """Block-column-row: cells of strips, given for each row and column, keep a share of theirs."""
    rng = np.random.default_rng(seed)
    parts = rows.max() + 1, columns.max() + 1
    kept_rows = rng.random((rows.size, parts[1])) < share
    kept_columns = rng.random((parts[0], columns.size)) < share
    mask: Mask = kept_rows[:, columns] & kept_columns[rows]
    return mask


def with_noise(mask: Mask, rows: int, columns: int, density: float, seed: int) -> Mask:
    """More rows and columns, at the end, with non-zeros anywhere."""
    rng = np.random.default_rng(seed)
    n, k = mask.shape
    noisy = rng.random((n + rows, k + columns)) < density
    noisy[:n, :k] = mask
    return noisy


def shuffled(mask: Mask, seed: int) -> Mask:
    """In random orders of the rows and columns."""
    rng = np.random.default_rng([seed, 1])
    rows, columns = (rng.permutation(extent) for extent in mask.shape)
    return mask[np.ix_(rows, columns)]
