"""The vocabulary of packed weights: block shapes, and the packed weight itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class BlockShape:
    """A block of `rows` output rows by `cols` input columns, kept or dropped together."""

    rows: int
    cols: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a block has at least one row and one column, not {self}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


@dataclass(frozen=True, eq=False)
class Permutation:
    """An order of the rows, columns or channels of something: position i holds what was `order[i]`.

    Raises:
        ValueError: if `order` does not hold each of 0 .. n - 1 once.
    """

    order: IntArray

    def __post_init__(self) -> None:
        order = np.asarray(self.order, np.int32)
        if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError("a permutation holds each of 0 .. n - 1 once")
        object.__setattr__(self, "order", order)

    @staticmethod
    def identity(size: int) -> Permutation:
        """The order in which nothing moves."""
        return Permutation(np.arange(size, dtype=np.int32))

    @property
    def size(self) -> int:
        return self.order.size

    @property
    def is_identity(self) -> bool:
        return np.array_equal(self.order, np.arange(self.size))

    def inverse(self) -> Permutation:
        """The one that undoes this one."""
        order = np.empty_like(self.order)
        order[self.order] = np.arange(self.size, dtype=np.int32)
        return Permutation(order)

    def then(self, other: Permutation) -> Permutation:
        """This one, and `other` on what it gives."""
        return Permutation(self.order[other.order])

    def apply(self, array: npt.NDArray[Scalar], axis: int = 0) -> npt.NDArray[Scalar]:
        """The array with its entries along `axis` in this order."""
        return np.take(array, self.order, axis=axis)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight matrix [N, K] held as R x 1 blocks, in the order the kernel walks them.

    Columns may be cut into tiles, which the kernel walks one after the other, and a row block's
    entries of a tile into runs. Row block b owns the entries
    ``indptr[s] * unroll .. indptr[s + 1] * unroll`` of run i of tile t,
    s = (t * blocks + b) * runs + i; entry e multiplies input column ``index[e]`` into R outputs
    with ``data[e]``. Slot r of row block b writes output row ``rows[b * R + r]``. A block that is
    not full repeats its last row, with the same weights, so that every slot is defined and nothing
    is written beyond N.

    Attributes:
        shape: (N, K) of the matrix.
        block: the R x 1 block shape.
        unroll: entries per step of the kernel; each run is padded with zeros to it.
        indptr: int32 [tiles * blocks * runs + 1], in steps of `unroll` entries.
        index: int32 [entries], input columns.
        data: float32 [entries, R].
        rows: int32 [blocks * R], output rows.
        tiles: tiles of columns.
        runs: runs of a row block in a tile.
    """

    shape: tuple[int, int]
    block: BlockShape
    unroll: int
    indptr: IntArray
    index: IntArray
    data: FloatArray
    rows: IntArray
    tiles: int = 1
    runs: int = 1

    @property
    def row_blocks(self) -> int:
        return self.rows.size // self.block.rows

    @property
    def entries(self) -> int:
        return self.index.size

    @property
    def nbytes(self) -> int:
        """Bytes of all tables and weights."""
        return sum(a.nbytes for a in (self.indptr, self.index, self.data, self.rows))


@dataclass(frozen=True, eq=False)
class SlicedWeight:
    """A weight matrix [N, K] as slices of `lanes` rows, each lane with its own columns.

    The sliced ELLPACK format (SELL-C-sigma, Kreutzer et al. 2014) with C = `lanes` and rows
    sorted by their number of non-zeros. Step s of slice b, ``indptr[b] <= s < indptr[b + 1]``,
    multiplies column ``index[s, l]`` by ``data[s, l]`` into output row ``rows[b * lanes + l]``.
    With windows (see `pack_windows`), the column is ``starts[s] + index[s, l]``.

    Attributes:
        shape: (N, K) of the matrix.
        lanes: rows per slice.
        unroll: steps are padded to a multiple of this, and `indptr` counts such groups.
        indptr: int32 [slices + 1].
        index: int32 [steps, lanes]; uint8 with windows.
        data: float32 [steps, lanes].
        rows: int32 [slices * lanes].
        starts: int32 [steps], with windows; else None.
    """

    shape: tuple[int, int]
    lanes: int
    unroll: int
    indptr: IntArray
    index: IntArray | npt.NDArray[np.uint8]
    data: FloatArray
    rows: IntArray
    starts: IntArray | None = None
