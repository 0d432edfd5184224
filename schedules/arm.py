"""The ARM schedule rule of the block-sparse kernels: NEON's tiles, and what they should cost.

The candidates are those of every CPU (see `x86`). What differs: weights are loaded as vectors and
multiplied by lane (see `held_operands`), so that loads hardly count; and a core that issues in
order loads the operands of two entries together, and waits once for both.
"""

from __future__ import annotations

from dataclasses import replace

from ..targets import PivotTarget
from . import x86
from .cost import far_bytes, input_misses, rows_cycles
from .problems import Bands, PlanesProblem, PlanesTile, RowsProblem, RowsTile

# Fitted to model cycles (llvm-mca) of single layers. Around the sum of a register tile, and of
# each of its accumulators: from the bias to the store, and between two K tiles.
TILE_CYCLES, STORE_CYCLES, REST_CYCLES = 30.0, 3.5, 2.5
# Vector loads per cycle beside the multiply-adds, and what an entry's index and addresses take.
LOADS_PER_CYCLE, ENTRY_CYCLES = 2.0, 0.1
# What an in-order core waits for an entry's address and operands; and how much longer than others
# it takes for what surrounds the sums, where each instruction depends on the one before.
WAIT_CYCLES, IN_ORDER_SLOWER = 24.0, 2.5
# A vector that is copied: into a panel, or from a strip to its place.
COPY_CYCLES = 2.5
# Bytes per cycle from beyond level 2.
FAR_BYTES = 6.0
# Entries loaded together by an in-order core, where the registers suffice.
MOST_ENTRIES = 2


def choose_planes(
    problem: PlanesProblem, entries: int, target: PivotTarget
) -> tuple[PlanesTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles."""
    tile, cycles = x86.choose_planes(problem, entries, target, planes_cycles)
    together = _together(problem.block_rows, tile.vectors, target)
    return replace(tile, weight_lanes=target.lanes, entries=together), cycles


def choose_bands(problem: PlanesProblem, entries: int, target: PivotTarget) -> Bands | None:
    """The bands in which a layer lays out its planes; see `x86.choose_bands`."""
    return x86.choose_bands(problem, entries, target, planes_cycles)


def choose_rows(problem: RowsProblem, entries: int, target: PivotTarget) -> tuple[RowsTile, float]:
    """The rows kernel's tile for `entries` packed entries, and its predicted cycles."""
    tile, _ = x86.choose_rows(problem, entries, target)
    return replace(tile, ahead=0), rows_cycles(problem, entries, target)


def planes_cycles(
    problem: PlanesProblem, tile: PlanesTile, entries: int, target: PivotTarget
) -> float:
    """Cycles on one core for a layer with `entries` packed entries."""
    accumulators = problem.block_rows * tile.vectors
    span, total = tile.tiles * tile.width, problem.pixels
    if not problem.compact:
        span, total = tile.group_rows, problem.height
    groups = problem.batch * -(-total // span)
    around = tile.k_tiles * TILE_CYCLES + STORE_CYCLES * accumulators
    around += (tile.k_tiles - 1) * REST_CYCLES * accumulators
    if target.in_order:
        around *= IN_ORDER_SLOWER
    step = _step_cycles(problem, tile, target)
    cycles = groups * tile.tiles * (entries * step + problem.row_blocks * around)
    if tile.panel:
        vectors = problem.columns * -(-span // tile.lanes)
        cycles += COPY_CYCLES * groups * tile.stretches * vectors
    if not (problem.compact or tile.within_rows(problem)):
        vectors = tile.group_rows * -(-problem.width // tile.lanes)
        cycles += COPY_CYCLES * groups * problem.row_blocks * problem.block_rows * vectors
    group_floats = span if problem.compact else span * problem.pitch
    count = groups // problem.batch
    return cycles + far_bytes(problem, tile, entries, count, group_floats, target) / FAR_BYTES


def _step_cycles(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> float:
    """Cycles of one entry in one register tile."""
    rows, vectors = problem.block_rows, tile.vectors
    weights = -(-rows // target.lanes)
    misses = input_misses(problem, tile, target)
    near, far = target.load_cycles
    late = vectors * (near * (1.0 - misses) + far * misses)
    multiply = rows * vectors / target.fma_per_cycle
    if target.in_order:
        return multiply + WAIT_CYCLES / _together(rows, vectors, target) + late
    loads = (vectors + weights + 1) / LOADS_PER_CYCLE
    return max(multiply, loads, target.fma_latency) + ENTRY_CYCLES + late


def _together(rows: int, vectors: int, target: PivotTarget) -> int:
    """Entries whose operands fit the registers beside the accumulators."""
    if not target.in_order:
        return 1
    free = target.registers - 1 - rows * vectors
    return max(1, min(MOST_ENTRIES, free // (vectors + -(-rows // target.lanes))))
