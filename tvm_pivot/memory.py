"""The memory of a compiled network: what it needs, and where it lies.

A network's function `BIND` takes its weights and buffers, in the order of `Memory`, and returns
what runs the network in them. All weights are one piece of memory, and so are all buffers of one
thread: each item begins at the next multiple of `ALIGNMENT` bytes behind the one before.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from .tensors import TensorSpec

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

BIND = "bind"
ALIGNMENT = 64  # compiled code uses vector loads that fault on less aligned data
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Memory:
    """What a network needs besides its inputs.

    Attributes:
        weights: its weights and tables of indices.
        buffers: sizes in bytes of the memory that holds what it computes on the way.
    """

    weights: tuple[TensorSpec, ...]
    buffers: tuple[int, ...]

    def __post_init__(self) -> None:
        if (
            any(size < 0 for spec in self.weights for size in spec.shape)
            or min(self.buffers, default=0) < 0
        ):
            raise ValueError("a size is negative")
        for spec in self.weights:
            spec.numpy_dtype()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, in one piece."""
        return _end(map(_bytes, self.weights))

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers, in one piece."""
        return _end(self.buffers)

    def weights_in(self, data: Bytes) -> list[Array]:
        """The weights that lie in `weight_bytes` bytes."""
        parts = _parts(data, map(_bytes, self.weights))
        return [
            part.view(spec.numpy_dtype()).reshape(spec.shape)
            for part, spec in zip(parts, self.weights, strict=True)
        ]

    def buffers_in(self, data: Bytes) -> list[Bytes]:
        """The buffers that lie in `buffer_bytes` bytes."""
        return list(_parts(data, self.buffers))


def pack(arrays: Sequence[Array]) -> tuple[tuple[TensorSpec, ...], Bytes]:
    """Arrays in one piece of memory, and what they are, named w0, w1, ..."""
    specs = tuple(TensorSpec(f"w{i}", a.shape, str(a.dtype)) for i, a in enumerate(arrays))
    memory = Memory(specs, ())
    data = new_pages(memory.weight_bytes)
    for place, array in zip(memory.weights_in(data), arrays, strict=True):
        place[...] = array
    return specs, data


def new_pages(size: int) -> Bytes:
    """Memory of zeros: `size` bytes from the start of a page, which are huge where it pays.

    A network reads weights faster than the processor finds their small pages.
    """
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(_pages(max(size, 1)), np.uint8)[:size]
    pages = _pages(size + _HUGE_PAGE)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(pages, np.uint8)
    start = -data.__array_interface__["data"][0] % _HUGE_PAGE
    return data[start : start + size]


def _pages(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _bytes(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=object)) * spec.numpy_dtype().itemsize


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _end(sizes: Iterable[int]) -> int:
    return sum(map(_padded, sizes))


def _parts(data: Bytes, sizes: Iterable[int]) -> Iterator[Bytes]:
    sizes = list(sizes)
    starts = accumulate(map(_padded, sizes), initial=0)
    return (data[start : start + size] for start, size in zip(starts, sizes))  # noqa: B905
