"""Packing: a weight matrix into the tables a kernel walks, and back. Exactly invertible."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import BlockShape, FloatArray, IntArray, PackedWeight, SlicedWeight
from .pivot import natural_rows

# Row blocks of the shortest stretches that are made even.
LEAST_STRETCH = 4


def kept_blocks(mask: npt.NDArray[np.bool_], slots: IntArray, rows: int) -> npt.NDArray[np.bool_]:
    """Which R x 1 blocks hold a non-zero: [blocks, K] for `mask` [N, K] and slots [blocks * R]."""
    n, k = mask.shape
    natural = n == slots.size and np.array_equal(slots, np.arange(n))
    in_slots = mask if natural else mask[slots]
    kept: npt.NDArray[np.bool_] = np.any(in_slots.reshape(-1, rows, k), axis=1)
    return kept


def even_stretches(counts: npt.NDArray[Any]) -> IntArray:
    """An order of row blocks, nearly their own, in which every stretch holds about the same work.

    Threads take contiguous stretches. What neighbouring blocks write shares cache lines, so only as
    many change places as it takes to make halves even, and halves of these.
    """

    def even(blocks: IntArray) -> IntArray:
        half = blocks.size // 2
        if half < LEAST_STRETCH:
            return blocks
        first, second = blocks[:half], blocks[half:]
        surplus = counts[first].sum() - counts[blocks].sum() * half / blocks.size
        sign = 1 if surplus > 0 else -1
        give = first[np.argsort(-sign * counts[first], kind="stable")]
        take = second[np.argsort(sign * counts[second], kind="stable")]
        most = min(give.size, take.size)
        moved = np.cumsum(np.maximum(sign * (counts[give[:most]] - counts[take[:most]]), 0))
        swaps = int(np.argmin(np.abs(abs(surplus) - np.append(0, moved))))
        first = np.sort(np.append(give[swaps:], take[:swaps]))
        second = np.sort(np.append(take[swaps:], give[:swaps]))
        return np.concatenate([even(first), even(second)])

    return even(np.arange(counts.size, dtype=np.int32))


def column_tiles(columns: int, tiles: int, taps: int) -> IntArray:
    """The tile of each column: int32 [columns]; the `taps` columns of a channel stay together."""
    channels = -(-columns // taps)
    per_tile = max(1, -(-channels // tiles))
    tile: IntArray = (np.arange(columns) // taps // per_tile).astype(np.int32)
    return tile


def padded_steps(counts: np.ndarray, unroll: int) -> IntArray:
    """Where the row blocks of `counts` entries begin, in steps of `unroll`: int32 [blocks + 1]."""
    steps = -(-counts // unroll)
    return np.concatenate([[0], np.cumsum(steps)]).astype(np.int32)


def pack(
    weight: FloatArray,
    block: BlockShape,
    *,
    unroll: int = 1,
    slots: IntArray | None = None,
    columns: IntArray | None = None,
    keep_all: bool = False,
    tiles: int = 1,
    tile_of: IntArray | None = None,
    runs: int = 1,
    run_of: IntArray | None = None,
    longest_first: bool = False,
) -> PackedWeight:
    """Pack `weight` float32 [N, K] as R x 1 blocks; only blocks with a non-zero are kept.

    Args:
        weight: the matrix; zeros inside a kept block are stored as zeros (the fill).
        block: R x 1.
        unroll: entries per kernel step.
        slots: int32 [blocks * R], the row in each slot: every row at least once, any order (see
            `pivot`). Default: their own order.
        columns: int32 [K], what to store in place of each column number, e.g. its offset in
            the planes that the kernel reads. Must be distinct for `unpack` to invert.
        keep_all: keep blocks of zeros too: the dense form of the same layer.
        tiles: tiles of columns.
        tile_of: int32 [K], the tile of each column (see `column_tiles`), needed for several.
            With them, `columns` must be distinct within a tile only.
        runs: runs of a row block's entries in a tile.
        run_of: int32 [K], the run of each column, needed for several. With them, `columns` must be
            distinct within a run of a tile only.
        longest_first: let the row blocks begin with the longest, for workers that each take the
            next one, rather than keep their order where stretches of them are even.

    Raises:
        ValueError: the block has more than one column, `weight` is not a matrix, or there is
            not a tile, or not a run, for every column.
    """
    for count, of, what in ((tiles, tile_of, "tile"), (runs, run_of, "run")):
        if count < 1 or (count > 1 and of is None):
            raise ValueError(f"{count} {what}s of columns, and no {what} for each column")
    if block.cols != 1 or weight.ndim != 2:
        raise ValueError(f"pack takes a matrix and R x 1 blocks, not {weight.shape} and {block}")
    n, k = weight.shape
    slots = natural_rows(n, block.rows) if slots is None else slots
    mask = kept_blocks(weight != 0, slots, block.rows)
    if keep_all:
        mask = np.ones_like(mask)
    counts = mask.sum(axis=1)
    walk = np.argsort(-counts, kind="stable") if longest_first else even_stretches(counts)
    mask = mask[walk]
    slots = slots.reshape(-1, block.rows)[walk]
    block_of, column = np.nonzero(mask)
    segment = block_of
    if tile_of is not None or run_of is not None:
        in_tile = 0 if tile_of is None else tile_of[column] * mask.shape[0]
        in_run = 0 if run_of is None else run_of[column]
        segment = (in_tile + block_of) * runs + in_run
        order = np.argsort(segment, kind="stable")
        segment, block_of, column = segment[order], block_of[order], column[order]
    counts = np.bincount(segment, minlength=tiles * mask.shape[0] * runs)
    indptr = padded_steps(counts, unroll)
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    place = indptr[segment] * unroll + np.arange(column.size) - first[segment]
    table = np.arange(k, dtype=np.int32) if columns is None else columns
    entries = int(indptr[-1]) * unroll
    index = np.full(entries, table[0] if k else 0, np.int32)
    index[place] = table[column]
    data = np.zeros((entries, block.rows), np.float32)
    data[place] = weight[slots[block_of], column[:, None]]
    return PackedWeight((n, k), block, unroll, indptr, index, data, slots.ravel(), tiles, runs)


def unpack(
    packed: PackedWeight,
    columns: IntArray | None = None,
    tile_of: IntArray | None = None,
    run_of: IntArray | None = None,
) -> FloatArray:
    """The matrix float32 [N, K] that was packed, bit for bit; arguments as given to `pack`."""
    n, k = packed.shape
    counts = np.diff(packed.indptr) * packed.unroll
    column = packed.index
    if columns is not None:
        # Stored columns are distinct within their run of their tile: all three identify one.
        step = int(columns.max(initial=0)) + 1
        own = np.zeros(k, np.int64) if tile_of is None else tile_of.astype(np.int64) * packed.runs
        own = own if run_of is None else own + run_of
        tile = np.repeat(np.arange(packed.tiles), packed.row_blocks * packed.runs)
        run = np.tile(np.arange(packed.runs), packed.tiles * packed.row_blocks)
        keys = own * step + columns
        sorter = np.argsort(keys, kind="stable")
        stored = np.repeat(tile * packed.runs + run, counts) * step + packed.index
        found = np.searchsorted(keys, stored, sorter=sorter)
        # Padding may name a column that its run does not have.
        column = sorter[np.minimum(found, k - 1)].astype(np.int32)
    weight = np.zeros((n, k), np.float32)
    blocks = np.tile(np.repeat(np.arange(packed.row_blocks), packed.runs), packed.tiles)
    rows = packed.rows.reshape(-1, packed.block.rows)[np.repeat(blocks, counts)]
    # Padding entries hold zeros everywhere; they must not overwrite a real column.
    real = (packed.data != 0).any(axis=1)
    weight[rows[real], column[real, None]] = packed.data[real]
    return weight


def longest_first(mask: npt.NDArray[np.bool_], lanes: int) -> IntArray:
    """The rows of `mask` [N, K] by their number of non-zeros: int32 [slices, lanes]."""
    counts = np.count_nonzero(mask, axis=1)
    order = np.argsort(-counts, kind="stable").astype(np.int32)
    slots: IntArray = order[natural_rows(counts.size, lanes)].reshape(-1, lanes)
    return slots


def pack_sliced(weight: FloatArray, lanes: int, *, unroll: int = 1) -> SlicedWeight:
    """Pack `weight` float32 [N, K] as sliced ELLPACK; see `SlicedWeight`."""
    n, k = weight.shape
    slots = longest_first(weight != 0, lanes)
    steps = np.count_nonzero(weight, axis=1)[slots].max(axis=1)
    walk = even_stretches(steps)
    slots, steps = slots[walk], steps[walk]
    indptr = padded_steps(steps, unroll)
    total = int(indptr[-1]) * unroll
    index = np.zeros((total, lanes), np.int32)
    data = np.zeros((total, lanes), np.float32)
    for b, rows in enumerate(slots):
        for lane, row in enumerate(rows):
            column = np.flatnonzero(weight[row])
            stretch = slice(indptr[b] * unroll, indptr[b] * unroll + column.size)
            index[stretch, lane] = column
            data[stretch, lane] = weight[row, column]
    return SlicedWeight((n, k), lanes, unroll, indptr, index, data, slots.ravel())


def unpack_sliced(packed: SlicedWeight) -> FloatArray:
    """The matrix float32 [N, K] that was packed, with windows or without, bit for bit."""
    weight = np.zeros(packed.shape, np.float32)
    owner = np.repeat(np.arange(packed.indptr.size - 1), np.diff(packed.indptr) * packed.unroll)
    rows = packed.rows.reshape(-1, packed.lanes)[owner]
    real = packed.data != 0
    columns = packed.index.astype(np.int32)
    if packed.starts is not None:
        columns += packed.starts[:, None]
    weight[rows[real], columns[real]] = packed.data[real]
    return weight


def join(parts: list[PackedWeight]) -> PackedWeight:
    """The packed weights of consecutive channel groups as one; rows count on from part to part.

    Raises:
        ValueError: the parts differ in block shape, unroll, tiles, runs or columns.
    """
    alike = {(part.block, part.unroll, part.tiles, part.runs, part.shape[1]) for part in parts}
    if len(alike) != 1:
        raise ValueError("only parts of one block shape, walk and width can be joined")
    first, tiles, unroll = parts[0], parts[0].tiles, parts[0].unroll
    first_row = np.cumsum([0, *(part.shape[0] for part in parts)])
    # Tile by tile: in each, the row blocks of all parts in turn.
    steps = [np.diff(part.indptr).reshape(tiles, -1) for part in parts]
    cuts = [part.indptr[:: part.row_blocks * part.runs] * unroll for part in parts]
    spans = [
        (p, slice(c[t], c[t + 1])) for t in range(tiles) for p, c in zip(parts, cuts, strict=True)
    ]
    return PackedWeight(
        (int(first_row[-1]), first.shape[1]),
        first.block,
        unroll,
        np.concatenate([[0], np.cumsum(np.concatenate(steps, axis=1))]).astype(np.int32),
        np.concatenate([part.index[span] for part, span in spans]),
        np.concatenate([part.data[span] for part, span in spans]),
        np.concatenate(
            [part.rows + start for part, start in zip(parts, first_row[:-1], strict=True)]
        ).astype(np.int32),
        tiles,
        first.runs,
    )
