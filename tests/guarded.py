"""Arrays with memory behind and before them that may not be touched: whoever does dies of it."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import numpy as np

ALIGNMENT = 64  # of the tensors that kernels take
_PAGE = mmap.PAGESIZE
_NO_ACCESS, _READ_WRITE, _PRIVATE_ANONYMOUS = 0, 3, 0x22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def guarded(array: np.ndarray[Any, Any], at_start: bool) -> np.ndarray[Any, Any]:
    """A copy of an array at the start of memory that begins there, or at the end of memory that
    ends with it (or less than `ALIGNMENT` bytes behind it)."""
    size = -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    room = -(-max(size, 1) // _PAGE) * _PAGE
    whole = room + 2 * _PAGE
    pages = _libc.mmap(None, whole, _READ_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
    assert pages not in (None, ctypes.c_void_p(-1).value)
    for guard in (pages, pages + _PAGE + room):
        assert not _libc.mprotect(guard, _PAGE, _NO_ACCESS)
    start = pages + _PAGE + (0 if at_start else room - size)
    memory = (ctypes.c_uint8 * array.nbytes).from_address(start)
    weakref.finalize(memory, _libc.munmap, pages, whole)
    copy = np.frombuffer(memory, array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
