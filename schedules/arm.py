"""The ARM schedule rule of the block-sparse kernels: NEON's tiles, and what they should cost.

The candidates are those of every CPU (see `cpu_tiles`). What differs: weights are loaded as
vectors and multiplied by lane (see `held_operands`), so that loads hardly count; and a core that
issues in order, and no load beside a multiply-add, loads the operands of several entries together
(see `neon_sum`), and waits once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..targets import PivotTarget
from . import cpu_tiles
from .cost import far_bytes, input_misses, rows_cycles
from .neon_sum import LANES, REGISTERS, NeonSum
from .problems import Bands, PlanesProblem, PlanesTile, RowsProblem, RowsTile
from .tile_space import RULE


@dataclass(frozen=True)
class _Around:
    """Cycles around the sum of a register tile, and of each of its accumulators: from the bias to
    the store, and between two K tiles.
    """

    tile: float
    store: float
    rest: float


# All of these are fitted to model cycles (llvm-mca) of single layers.
OUT_OF_ORDER, IN_ORDER = _Around(30.0, 3.5, 2.5), _Around(15.5, 3.0, 8.5)
GROUPED = _Around(17.5, 3.3, 1.3)
# Vector loads per cycle beside the multiply-adds, and what an entry's index and addresses take.
LOADS_PER_CYCLE, ENTRY_CYCLES = 2.0, 0.1
# What an in-order core waits for an entry's address and operands, and how much longer a load takes.
WAIT_CYCLES, LATE_CYCLES = 7.0, 1.3
# With grouped loads: what a group waits, and an entry's index and address.
GROUP_CYCLES, GROUPED_ENTRY_CYCLES = 10.0, 1.0
# A vector that is copied: into a panel, or from a strip to its place.
COPY_CYCLES = 2.5
# Bytes per cycle from beyond level 2.
FAR_BYTES = 6.0
# Blocks of 8 rows have their columns cut, too: their register tiles are no wider than two vectors.
REACH = replace(
    RULE,
    k_tiled_rows=8,
    narrow_panels=False,
    slides=False,
    singles=False,
    row_vectors=8,
    sums_share=1.0,
)
# Entries whose loads stand together, where the registers suffice.
MOST_ENTRIES = 4


def choose_planes(
    problem: PlanesProblem, entries: int, target: PivotTarget, bands: int = 1
) -> tuple[PlanesTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles."""
    target = _stored(target)
    tile, cycles = cpu_tiles.choose_planes(problem, entries, target, planes_cycles, REACH, bands)
    return with_operands(problem, tile, target), cycles


def with_operands(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> PlanesTile:
    """A tile that loads its operands as the core likes it."""
    entries = _together(problem, tile, target)
    return replace(tile, weight_lanes=target.lanes, entries=entries)


def choose_bands(problem: PlanesProblem, entries: int, target: PivotTarget) -> Bands | None:
    """The bands in which a layer lays out its planes; see `cpu_tiles.choose_bands`."""
    return cpu_tiles.choose_bands(problem, entries, _stored(target), planes_cycles, REACH)


def choose_rows(problem: RowsProblem, entries: int, target: PivotTarget) -> tuple[RowsTile, float]:
    """The rows kernel's tile for `entries` packed entries, and its predicted cycles."""
    tile, _ = cpu_tiles.choose_rows(problem, entries, target)
    return replace(tile, ahead=0), rows_cycles(problem, entries, target)


def planes_cycles(
    problem: PlanesProblem, tile: PlanesTile, entries: int, target: PivotTarget, bands: int = 1
) -> float:
    """Cycles on one core for a layer with `entries` packed entries, or for one of its `bands`."""
    target = _stored(target)
    accumulators = problem.block_rows * tile.vectors
    span = tile.tiles * tile.width if problem.compact else tile.group_rows
    groups = problem.batch * tile.groups(problem)
    blocks = problem.row_blocks * tile.k_tiles
    together = _together(problem, tile, target)
    if together > 1:
        step = _grouped_cycles(problem, tile, entries / blocks, together, target)
        around = GROUPED
    else:
        step = _step_cycles(problem, tile, target) * entries / blocks
        around = IN_ORDER if target.in_order else OUT_OF_ORDER
    resting = around.store + (tile.k_tiles - 1) * around.rest
    each = tile.k_tiles * (around.tile + step) + resting * accumulators
    cycles = groups * tile.tiles * problem.row_blocks * each
    if tile.panel:
        vectors = problem.columns * -(-span // tile.lanes)
        cycles += COPY_CYCLES * groups * tile.stretches * vectors
    if not (problem.compact or tile.within_rows(problem)):
        vectors = tile.group_rows * -(-tile.columns(problem) // tile.lanes)
        cycles += COPY_CYCLES * groups * problem.row_blocks * problem.block_rows * vectors
    return cycles + far_bytes(problem, tile, entries, target) / FAR_BYTES


def _stored(target: PivotTarget) -> PivotTarget:
    """The target with the lanes of the planes kernels: twice as many where these are float16."""
    return replace(target, lanes=target.stored_lanes, precision="float32")


def _step_cycles(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> float:
    """Cycles of one entry in one register tile."""
    rows, vectors = problem.block_rows, tile.vectors
    weights = -(-rows // target.lanes)
    misses = input_misses(problem, tile, target)
    near, far = target.load_cycles
    late = vectors * (near * (1.0 - misses) + far * misses)
    multiply = rows * vectors / target.fma_per_cycle
    if target.in_order:
        return multiply + WAIT_CYCLES + late + LATE_CYCLES * vectors
    loads = (vectors + weights + 1) / LOADS_PER_CYCLE
    return max(multiply, loads, target.fma_latency) + ENTRY_CYCLES + late


def _grouped_cycles(
    problem: PlanesProblem, tile: PlanesTile, count: float, together: int, target: PivotTarget
) -> float:
    """Cycles of the ragged sum of about `count` entries in assembly, in one register tile."""
    rows, vectors = problem.block_rows, tile.vectors
    misses = input_misses(problem, tile, target)
    near, far = target.load_cycles
    loads = vectors * (near * (1.0 - misses) + far * misses) + rows / target.lanes
    multiply = max(rows * vectors / target.fma_per_cycle, target.fma_latency)
    # What is left over is cut into groups of powers of two.
    left = sum(entries.bit_count() for entries in range(together)) / together
    waits = count / together + left - (together - 1) / 2 / together
    return count * (multiply + loads + GROUPED_ENTRY_CYCLES) + waits * GROUP_CYCLES


def _together(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> int:
    """Entries whose loads stand together in assembly; 1: LLVM orders them.

    Where no load is issued beside a multiply-add, order costs nothing but what is waited for.
    """
    if not target.in_order or target.load_cycles[0] < 1.0 or target.registers < REGISTERS:
        return 1
    if tile.lanes < target.lanes or target.lanes != LANES:
        return 1
    sums = (NeonSum(problem.block_rows, tile.vectors, e) for e in range(MOST_ENTRIES, 1, -1))
    return next((one.entries for one in sums if one.fits), 1)
