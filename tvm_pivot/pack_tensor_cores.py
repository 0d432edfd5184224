"""Packing for the tensor-core kernels: kept blocks as matrix fragments, and the tables of them.

A *team* of row blocks is what one thread block computes; each of its *warp rows* owns the same
number of them. The teams of a *crew* share the columns of the input that they bring to shared
memory, *slab* by slab. A *step* is 16 kept columns of one row block in one slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .fragments import READ_TOGETHER, STEP, Bits, OperandType, fragment_order, from_bits, to_bits
from .layout import FloatArray, IntArray
from .pack import kept_blocks
from .pivot import natural_rows


@dataclass(frozen=True)
class TeamShape:
    """How row blocks and columns are dealt out.

    Attributes:
        block_rows: R, 8, 16 or 32.
        blocks: row blocks of a warp row.
        warp_rows: warp rows of a team.
        crew: teams of a crew.
        slab: columns of a slab.
        pitch: bytes from one column to the next in shared memory.
        ahead: steps that a warp may read beyond its last one.
    """

    block_rows: int
    blocks: int
    warp_rows: int
    crew: int
    slab: int
    pitch: int
    ahead: int

    @property
    def team_blocks(self) -> int:
        """Row blocks of a team."""
        return self.blocks * self.warp_rows

    def teams(self, row_blocks: int) -> int:
        """Teams for so many row blocks: whole crews of them."""
        crew_blocks = self.team_blocks * self.crew
        return -(-row_blocks // crew_blocks) * self.crew


@dataclass(frozen=True, eq=False)
class PackedFragments:
    """A weight matrix [N, K] for the tensor-core kernels.

    Attributes:
        shape: (N, K).
        dtype: of the weights.
        team: how it was dealt out.
        slab_begin: int32 [crews + 1], a crew's first slab.
        columns: int32 [slabs, slab, 2]: the offset of a column in the input, and a bit for each
            team that reads it, plus 256 times its tap. No team reads the filling of a last slab.
        taken: int32 [slabs, crew], columns of the slab that a team reads.
        counts: uint8 [slabs, crew, warp rows, blocks], steps of each row block in the slab.
        first: int32 [teams, warp rows], the first step of a warp row; its steps follow each
            other, by slab and then by row block.
        places: int32 [steps + ahead, 16], where a step's columns lie in the slab, in bytes. A
            place that is not used repeats the one before it, with weights of zero.
        weights: uint16 (tf32: uint32) [steps + ahead, 16 R], bit patterns, in the order in which
            the lanes of a warp hold them (see `fragment_order`).
        rows: int32 [teams, warp rows, blocks, R], output rows; -1 where there is none.
    """

    shape: tuple[int, int]
    dtype: OperandType
    team: TeamShape
    slab_begin: IntArray
    columns: IntArray
    taken: IntArray
    counts: npt.NDArray[np.uint8]
    first: IntArray
    places: IntArray
    weights: Bits
    rows: IntArray

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """The kernel's tables, in the order of its arguments."""
        return (
            self.slab_begin,
            self.columns,
            self.taken,
            self.counts,
            self.first,
            self.places,
            self.weights,
            self.rows,
        )

    @property
    def steps(self) -> int:
        return int(self.places.shape[0]) - self.team.ahead

    def slot_bias(self, bias: FloatArray) -> FloatArray:
        """`bias` float32 [N] as the kernel reads it: like `rows`, zero where there is no row."""
        return np.where(self.rows >= 0, bias[self.rows], np.float32(0)).astype(np.float32)


def deal(counts: npt.NDArray[np.int64], team: TeamShape) -> IntArray:
    """Row blocks dealt to warp rows by length: int32 [teams, warp rows, blocks], -1 for none.

    The longest go round first, and back again: every warp row gets about the same work.
    """
    teams = team.teams(counts.size)
    hands = teams * team.warp_rows
    order = np.full(hands * team.blocks, -1, np.int32)
    order[: counts.size] = np.argsort(-counts, kind="stable")
    rounds = order.reshape(team.blocks, hands)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    # Hand h is warp row h // teams of team h % teams.
    return np.ascontiguousarray(
        rounds.reshape(team.blocks, team.warp_rows, teams).transpose(2, 1, 0)
    )


@dataclass(frozen=True, eq=False)
class _Slabs:
    """The columns of each crew, cut into slabs; `slab` and `position` are [crews, K]."""

    begin: IntArray
    columns: IntArray
    taken: IntArray
    slab: IntArray
    position: IntArray


def _cut_slabs(
    owned: npt.NDArray[np.bool_], offsets: IntArray, taps: IntArray, team: TeamShape, together: int
) -> _Slabs:
    """Slabs for the columns that row blocks keep: `owned` [teams, warp rows, blocks, K]."""
    k = owned.shape[3]
    needed = owned.any(axis=(1, 2)).reshape(-1, team.crew, k)
    any_team = np.asarray(needed.any(axis=1))
    slabs = np.maximum(1, -(-any_team.sum(axis=1) // team.slab))
    begin = np.concatenate([[0], np.cumsum(slabs)]).astype(np.int32)
    slab = (begin[:-1, None] + (np.cumsum(any_team, axis=1) - 1) // team.slab).astype(np.int32)
    position = np.zeros_like(slab)
    crew, column = np.nonzero(any_team)
    kept = owned.reshape(any_team.shape[0], -1, k)
    for c, s in {*zip(crew.tolist(), slab[crew, column].tolist(), strict=True)}:
        mine = np.flatnonzero(any_team[c] & (slab[c] == s))
        position[c, mine] = place_in_slab(kept[c][:, mine], team.slab, together)
    at = (slab[crew, column], position[crew, column])
    bits = (needed << np.arange(team.crew)[None, :, None]).sum(axis=1)
    columns = np.zeros((int(begin[-1]), team.slab, 2), np.int32)
    columns[..., 0] = offsets[0] if k else 0
    columns[(*at, 0)] = offsets[column]
    columns[(*at, 1)] = bits[crew, column] + 256 * taps[column]
    taken = (columns[:, :, 1, None] >> np.arange(team.crew) & 1).sum(axis=1).astype(np.int32)
    return _Slabs(begin, columns, taken, slab, position)


def place_in_slab(kept: npt.NDArray[np.bool_], slab: int, banks: int = 8) -> IntArray:
    """Positions of columns in a slab: int32 [columns], for `kept` [row blocks, columns].

    Positions that are a multiple of `banks` apart lie in the same banks. Each column goes where the
    row blocks that keep it have the fewest columns so far.
    """
    held = np.zeros((kept.shape[0], banks), np.int64)
    room = np.full(banks, slab // banks)
    position = np.empty(kept.shape[1], np.int32)
    for column, blocks in enumerate(kept.T):
        crowd = held[blocks].sum(axis=0)
        crowd[room == 0] = np.iinfo(np.int64).max
        bank = int(np.argmin(crowd))
        position[column] = bank + banks * (slab // banks - room[bank])
        room[bank] -= 1
        held[blocks, bank] += 1
    return position


def pack_tensor_cores(
    weight: FloatArray,
    team: TeamShape,
    *,
    dtype: OperandType = "float16",
    slots: IntArray | None = None,
    offsets: IntArray | None = None,
    taps: IntArray | None = None,
    keep_all: bool = False,
) -> PackedFragments:
    """Pack `weight` float32 [N, K], rounded to `dtype`; only blocks with a non-zero are kept.

    Args:
        weight: the matrix.
        team: how row blocks and columns are dealt out.
        dtype: of the packed weights.
        slots: int32 [blocks * R], the row in each slot (see `pivot`). Default: their own order.
        offsets: int32 [K], where each column begins in the input.
        taps: int32 [K], the tap of each column, below 64. Default: 0.
        keep_all: keep blocks of zeros too: the dense form of the same layer.

    Raises:
        ValueError: `weight` is not a matrix, or R is not 8, 16 or 32.
    """
    if weight.ndim != 2 or team.block_rows not in (8, 16, 32):
        raise ValueError(f"a matrix in blocks of 8, 16 or 32 rows, not {weight.shape} in {team}")
    n, k = weight.shape
    r = team.block_rows
    slots = natural_rows(n, r) if slots is None else slots
    offsets = np.arange(k, dtype=np.int32) if offsets is None else offsets
    taps = np.zeros(k, np.int32) if taps is None else taps
    mask = np.ones((slots.size // r, k), bool) if keep_all else kept_blocks(weight != 0, slots, r)
    hands = deal(mask.sum(axis=1), team)
    owned = np.where(hands[..., None] >= 0, mask[hands], False)
    together = READ_TOGETHER[dtype]
    slabs = _cut_slabs(owned, offsets, taps, team, together)
    at, column, position, cell, place = _kept_entries(owned, slabs, team, together)
    shape = (int(slabs.begin[-1]), team.crew, team.warp_rows, team.blocks)
    entries = np.bincount(cell, minlength=int(np.prod(shape)))
    counts = (-(-entries // STEP)).reshape(shape)
    first, start = _first_steps(counts, slabs.begin, team)
    step, lane = start[cell] + place // STEP, place % STEP
    if dtype == "tf32":  # lanes that read at once hold columns that are four apart
        lane = lane % 4 * 4 + lane // 4
    steps = int(counts.sum()) + team.ahead
    tiles = np.zeros((steps, r, STEP), np.float32)
    block_slots = slots.reshape(-1, r)
    tiles[step, :, lane] = weight[block_slots[hands.ravel()[at]], column[:, None]]
    row_of, column_of = fragment_order(r, dtype)
    return PackedFragments(
        (n, k),
        dtype,
        team,
        slabs.begin,
        slabs.columns,
        slabs.taken,
        counts.astype(np.uint8),
        first,
        _places(steps, step, lane, position) * team.pitch,
        to_bits(tiles[:, row_of, column_of], dtype),
        np.where(hands[..., None] >= 0, block_slots[hands], -1).astype(np.int32),
    )


def _kept_entries(
    owned: npt.NDArray[np.bool_], slabs: _Slabs, team: TeamShape, together: int
) -> tuple[np.ndarray, ...]:
    """The kept columns of all row blocks, by cell (slab, team of the crew, warp row, block).

    Returns:
        For each: its row block's place in `owned` [teams, warp rows, blocks, K], its column,
        position in the slab, cell, and place among the steps of the cell.
    """
    teams, warp_row, q, column = np.nonzero(owned)
    crew = teams // team.crew
    slab, position = slabs.slab[crew, column], slabs.position[crew, column]
    at = (teams * team.warp_rows + warp_row) * team.blocks + q
    cell = ((slab * team.crew + teams % team.crew) * team.warp_rows + warp_row) * team.blocks + q
    order, place = spread_over_banks(cell, position, together)
    return at[order], column[order], position[order], cell[order], place


def _places(steps: int, step: IntArray, lane: IntArray, position: IntArray) -> IntArray:
    """The position in its slab of every column of every step: int32 [steps, 16]."""
    places = np.full((steps, STEP), -1, np.int32)
    places[step, lane] = position
    # Steps beyond the last one are read, but not used.
    places[:, 0] = np.maximum(places[:, 0], 0)
    for i in range(1, STEP):
        places[:, i] = np.where(places[:, i] < 0, places[:, i - 1], places[:, i])
    return places


def spread_over_banks(
    cell: npt.NDArray[np.int64], position: IntArray, together: int = 8
) -> tuple[IntArray, IntArray]:
    """An order of entries by cell, and each one's place among the steps of its cell.

    The tensor cores' loads read `together` columns at once, eight of 16 bytes or four of 32;
    columns that are a multiple of that apart lie in the same banks and wait for each other. Which
    columns go together is free: those of each residue are dealt out to all the eights (or fours)
    of the cell.
    """
    order = np.lexsort((position, position % together, cell)).astype(np.int32)
    sorted_cell = cell[order]
    begins = np.flatnonzero(np.append(True, sorted_cell[1:] != sorted_cell[:-1]))[: cell.size]
    sizes = np.diff(np.append(begins, cell.size))
    number = np.arange(cell.size) - np.repeat(begins, sizes)
    groups = np.repeat(-(-sizes // together), sizes)
    place = (number % groups * together + number // groups).astype(np.int32)
    return order, place


def _first_steps(
    counts: npt.NDArray[np.int64], slab_begin: IntArray, team: TeamShape
) -> tuple[IntArray, npt.NDArray[np.int64]]:
    """The first step of each warp row [teams, warp rows], and of each cell of `counts`, flat."""
    crews = slab_begin.size - 1
    crew_of = np.repeat(np.arange(crews), np.diff(slab_begin))
    # Cells in the order in which their steps follow each other: by warp row, then by slab.
    team_of = crew_of[:, None, None, None] * team.crew + np.arange(team.crew)[:, None, None]
    hand = team_of * team.warp_rows + np.arange(team.warp_rows)[:, None]
    hand = np.broadcast_to(hand, counts.shape).ravel()
    walk = np.argsort(hand, kind="stable")
    lengths = counts.ravel()[walk]
    start = np.empty(counts.size, np.int64)
    start[walk] = np.cumsum(lengths) - lengths
    per_hand = np.bincount(hand, counts.ravel(), crews * team.crew * team.warp_rows)
    first = (np.cumsum(per_hand) - per_hand).astype(np.int32)
    return first.reshape(-1, team.warp_rows), start


def walk(packed: PackedFragments) -> Iterator[tuple[int, int, int, IntArray]]:
    """What the kernel does, in its order: (crew, slab, step, output rows) of every step."""
    team = packed.team
    for at in range(packed.first.shape[0]):
        crew, member = divmod(at, team.crew)
        for warp_row in range(team.warp_rows):
            step = int(packed.first[at, warp_row])
            for slab in range(packed.slab_begin[crew], packed.slab_begin[crew + 1]):
                for q, count in enumerate(packed.counts[slab, member, warp_row]):
                    for _ in range(count):
                        yield crew, slab, step, packed.rows[at, warp_row, q]
                        step += 1


def unpack_tensor_cores(packed: PackedFragments, offsets: IntArray | None = None) -> FloatArray:
    """The matrix float32 [N, K] that was packed, as rounded; `offsets` as given, distinct."""
    n, k = packed.shape
    offsets = np.arange(k, dtype=np.int32) if offsets is None else offsets
    column_at = np.argsort(offsets, kind="stable")
    values = from_bits(packed.weights, packed.dtype)
    row_of, column_of = fragment_order(packed.team.block_rows, packed.dtype)
    weight = np.zeros((n, k), np.float32)
    tile = np.empty((packed.team.block_rows, STEP), np.float32)
    for _, slab, step, rows in walk(packed):
        tile[row_of, column_of] = values[step]
        read = packed.columns[slab, packed.places[step] // packed.team.pitch, 0]
        column = column_at[np.searchsorted(offsets, read, sorter=column_at)]
        # Places that are not used repeat a column, with zeros.
        used = tile.any(axis=0)
        there = rows >= 0
        weight[rows[there, None], column[used]] = tile[np.ix_(there, used)]
    return weight
