"""Input arrays in memory that runtimes can read in place."""

from __future__ import annotations

import numpy as np

from .protocol import Array

_ALIGNMENT = 64  # a cache line, and the widest vector register


def aligned_copy(array: Array) -> Array:
    """A writeable, contiguous copy of `array` that begins at a multiple of 64 bytes."""
    buffer = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
