"""Operands of the tensor cores' matrix instructions: which lane holds what, and in which bits."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from .layout import FloatArray, IntArray

STEP = 16  # columns that one tensor-core instruction sums over, or two of tf32
OperandType = Literal["float16", "bfloat16", "tf32"]
# Columns that a warp reads from shared memory at once.
READ_TOGETHER: dict[OperandType, int] = {"float16": 8, "bfloat16": 8, "tf32": 4}
# Bit patterns of floats: uint16, or uint32 of tf32.
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


def fragment_order(block_rows: int, dtype: OperandType) -> tuple[IntArray, IntArray]:
    """(row, column) in a step's R x 16 weights of each stored value: int32 [16 R] each.

    Lane l = 4 g + t of a warp holds, for each 16 rows, the pairs of columns (2 t, 2 t + 1) of rows
    g and g + 8, then the same 8 columns further on; with R = 8, of row g alone. In tf32 its columns
    are 4 t to 4 t + 3, and two of them make a fragment.
    """
    if dtype == "tf32":
        return _tf32_order(block_rows)
    lane = np.arange(32)[:, None, None]
    group, pair = lane // 4, 2 * (lane % 4)
    low = np.arange(2)[None, None, :]
    if block_rows == 8:
        register = np.arange(2)[None, :, None]
        row, column = group + 0 * register + 0 * low, pair + 8 * register + low
        return row.ravel().astype(np.int32), column.ravel().astype(np.int32)
    register = np.arange(4)[None, :, None]
    row = group + 8 * (register % 2) + 0 * low
    column = pair + 8 * (register // 2) + low
    halves = np.arange(block_rows // 16)[:, None] * 16
    rows = (halves + row.ravel()).ravel()
    return rows.astype(np.int32), np.tile(column.ravel(), block_rows // 16).astype(np.int32)


def _tf32_order(block_rows: int) -> tuple[IntArray, IntArray]:
    lane, register = np.arange(32)[:, None], np.arange(4)
    group, column = lane // 4 + 0 * register, 4 * (lane % 4)
    if block_rows == 8:
        return group.ravel().astype(np.int32), (column + register).ravel().astype(np.int32)
    # Of each 16 rows a fragment of columns 4 t and 4 t + 1, and one of the other two.
    rows, columns = [], []
    for half in range(block_rows // 16):
        for part in range(2):
            rows.append(16 * half + group + 8 * (register % 2))
            columns.append(column + 2 * part + register // 2)
    return np.ravel(rows).astype(np.int32), np.ravel(columns).astype(np.int32)


def to_bits(values: FloatArray, dtype: OperandType) -> Bits:
    """`values` rounded to nearest in `dtype`, as bit patterns: uint16, of tf32 uint32.

    Ties go to even, with tf32 away from zero, as the GPU's instruction has it.
    """
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    if dtype == "tf32":
        return (bits + 0x1000) & np.uint32(0xFFFFE000)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: Bits, dtype: OperandType) -> FloatArray:
    """The float32 values of bit patterns."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "tf32":
        return bits.view(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)
