"""Pivoting: orders of rows that gather the non-zeros of a weight matrix into blocks.

A kernel writes its output rows through a table, so a row order that serves one layer only (a
local pivot) costs nothing at run time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layout import IntArray


def gather_rows(mask: npt.NDArray[np.bool_], block_rows: int) -> IntArray:
    """Slots of row blocks that hold rows with the same non-zero columns together.

    Rows of equal support fill blocks of their own; what is left of them too, if it fills half a
    block, with its last row repeated. All other rows follow in their own order. So aligned
    blocks stay as they are, and blocks whose rows were shuffled, or lost some, are found again.

    Args:
        mask: [N, K], where the weights are non-zero.
        block_rows: R.

    Returns:
        int32 [blocks * R]: the row in each slot; every row at least once.
    """
    if block_rows == 1:
        return np.arange(mask.shape[0], dtype=np.int32)
    alike: dict[bytes, list[int]] = {}
    for row, support in enumerate(np.packbits(mask, axis=1)):
        alike.setdefault(support.tobytes(), []).append(row)
    blocks: list[int] = []
    others: list[int] = []
    for rows in alike.values():
        full = len(rows) // block_rows * block_rows
        blocks += rows[:full]
        rest = rows[full:]
        if 2 * len(rest) >= block_rows:
            blocks += _repeat_last(rest, block_rows)
        else:
            others += rest
    return np.array([*blocks, *_repeat_last(sorted(others), block_rows)], np.int32)


def natural_rows(count: int, block_rows: int) -> IntArray:
    """Slots of row blocks in the matrix's own order, the last row repeated to fill the last."""
    return np.array(_repeat_last(list(range(count)), block_rows), np.int32)


def _repeat_last(rows: list[int], block_rows: int) -> list[int]:
    return rows + rows[-1:] * (-len(rows) % block_rows)
