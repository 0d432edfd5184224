"""Packing for lookups: steps whose columns all lie in a window of the input.

Rows take their non-zeros in order of the columns, and those of a slice go on together: every step
begins its window at the least column that is left, and each row whose next column lies in the
window takes it along. Rows that are ahead wait, so the wider the window, the fewer zeros are
stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .layout import FloatArray, IntArray, SlicedWeight
from .pack import even_stretches, longest_first, padded_steps

BoolArray = npt.NDArray[np.bool_]
WIDEST = 256  # what an index of one byte tells apart


@dataclass(frozen=True)
class _Step:
    """One step, of every slice that has it.

    Attributes:
        slices: int [S], these slices.
        starts: int [S], where their windows begin.
        taken: bool [S, lanes], rows that take a non-zero along.
        nonzero: int [S, lanes], its place among all non-zeros.
        index: int [S, lanes], its column, counted from the start of the window.
    """

    slices: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    taken: BoolArray
    nonzero: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]


def _steps(mask: BoolArray, slots: IntArray, lanes: int, vectors: int) -> Iterator[_Step]:
    """The steps of slices whose rows are `slots` [slices, lanes]."""
    width = lanes * vectors
    if not 0 < width <= min(WIDEST, mask.shape[1]):
        raise ValueError(f"no window of {width} columns in a matrix of {mask.shape[1]}")
    never = np.int32(np.iinfo(np.int32).max)
    column = np.append(np.nonzero(mask)[1].astype(np.int32), never)
    end = np.cumsum(np.count_nonzero(mask, axis=1))
    last = end[slots]
    at = np.append(0, end)[slots]
    slices = np.arange(slots.shape[0])
    while True:
        ahead = np.where(at < last, column[at], never)
        live = ahead.min(axis=1) < never
        if not live.any():
            return
        slices, at, last, ahead = (table[live] for table in (slices, at, last, ahead))
        # Aligned vectors load twice as fast as those that straddle cache lines.
        starts = np.minimum(ahead.min(axis=1) // lanes * lanes, mask.shape[1] - width)
        index = ahead - starts[:, None]
        taken = index < width
        yield _Step(slices, starts, taken, at, index)
        at = at + taken


def count_steps(mask: BoolArray, lanes: int, vectors: int) -> int:
    """How many steps `pack_windows` makes of non-zeros [N, K].

    Raises:
        ValueError: as `pack_windows`.
    """
    slots = longest_first(mask, lanes)
    return sum(step.slices.size for step in _steps(mask, slots, lanes, vectors))


def pack_windows(weight: FloatArray, lanes: int, vectors: int, *, unroll: int = 1) -> SlicedWeight:
    """Pack `weight` float32 [N, K] in slices of `lanes` rows with windows of `vectors` * `lanes`
    columns; see `SlicedWeight`.

    Raises:
        ValueError: a window is wider than the matrix, or than one byte can count.
    """
    mask = weight != 0
    slots = longest_first(mask, lanes)
    counts = np.zeros(slots.shape[0], np.int64)
    for step in _steps(mask, slots, lanes, vectors):
        counts[step.slices] += 1
    walk = even_stretches(counts)
    slots = slots[walk]
    indptr = padded_steps(counts[walk], unroll)
    total = int(indptr[-1]) * unroll
    starts = np.zeros(total, np.int32)
    index = np.zeros((total, lanes), np.uint8)
    data = np.zeros((total, lanes), np.float32)
    values = np.append(weight[mask], np.float32(0))
    for number, step in enumerate(_steps(mask, slots, lanes, vectors)):
        place = indptr[step.slices] * unroll + number
        starts[place] = step.starts
        index[place] = np.where(step.taken, step.index, 0)
        data[place] = np.where(step.taken, values[step.nonzero], 0)
    n, k = weight.shape
    return SlicedWeight((n, k), lanes, unroll, indptr, index, data, slots.ravel(), starts)
