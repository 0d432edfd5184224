"""Predicted cycles of the block-sparse kernels: what the schedule rules minimise.

Counts what one core must issue per step of the ragged loop (multiply-adds, loads, the latency of
the accumulators), plus what each register tile pays once, plus bytes that miss level 2. It ranks
candidates; it does not promise times.
"""

from __future__ import annotations

from ..targets import PivotTarget
from .block_sparse import PlanesProblem, PlanesTile, RowsProblem

# Cycles around one ragged loop (its bounds, one mispredicted exit), and per stored vector.
LOOP_CYCLES = 20.0
STORE_CYCLES = 1.5
# Cycles of one squeezed vector: an unaligned load, the epilogue, a store that may be partial.
SQUEEZE_CYCLES = 2.5
# Bytes per cycle from beyond level 2, and the share of a cache that one operand may count on.
FAR_BYTES = 8.0
CACHE_SHARE = 0.7
# Scalar gathers per cycle: what one entry costs when every row has columns of its own.
GATHERS_PER_CYCLE = 1.0


def planes_cycles(
    problem: PlanesProblem, tile: PlanesTile, entries: int, target: PivotTarget
) -> float:
    """Cycles on one core for a layer with `entries` packed entries."""
    r_, p_ = problem.block_rows, tile.vectors
    width = tile.width
    span = tile.tiles * width if problem.compact else tile.group_rows
    groups = -(-(problem.pixels if problem.compact else problem.height) // span)
    tiles = problem.batch * groups * tile.tiles
    floats_per_column = problem.image_floats / problem.columns
    group_floats = width * tile.tiles if problem.compact else span * problem.pitch
    panel = 4.0 * problem.columns * min(width, floats_per_column)
    near = panel <= CACHE_SHARE * target.l1_bytes
    load = target.load_cycles[0 if near else 1]
    step = max(
        r_ * p_ / target.fma_per_cycle,
        p_ * load + r_ * target.load_cycles[0],
        target.fma_latency,
    )
    per_tile = LOOP_CYCLES + STORE_CYCLES * r_ * p_
    cycles = tiles * (entries * step + problem.row_blocks * per_tile)
    if not problem.compact:
        lanes = min(tile.lanes, 1 << (problem.width.bit_length() - 1))
        pieces = -(-problem.width // lanes) * tile.group_rows
        cycles += SQUEEZE_CYCLES * problem.batch * groups * problem.row_blocks * r_ * pieces
    return cycles + _far_bytes(problem, entries, groups, group_floats, target) / FAR_BYTES


def _far_bytes(
    problem: PlanesProblem, entries: int, groups: int, group_floats: float, target: PivotTarget
) -> float:
    """Bytes from beyond level 2: the weights per group, and the input per row block."""
    keep = CACHE_SHARE * target.l2_bytes
    weights = 4.0 * entries * (problem.block_rows + 1)
    taps = problem.columns * problem.pixels / max(problem.image_floats, 1)
    panel = 4.0 * problem.columns * group_floats / max(taps, 1.0)
    far = problem.batch * groups * weights if weights > keep else weights
    rereads = problem.row_blocks if panel > keep else 1
    return far + problem.batch * groups * panel * rereads


def rows_cycles(problem: RowsProblem, entries: int, target: PivotTarget) -> float:
    """Cycles on one core for a matrix-vector layer with `entries` packed entries (or steps)."""
    vectors = -(-problem.block_rows // target.lanes)
    if problem.own_columns:
        data = 8.0 * problem.block_rows
        step = max(problem.block_rows * problem.inputs / GATHERS_PER_CYCLE, 1.0)
    else:
        data = 4.0 * (problem.block_rows + 1)
        step = max(problem.inputs * vectors / target.fma_per_cycle, 1.0)
    far = data * entries > CACHE_SHARE * target.l2_bytes
    per_step = max(step, data / FAR_BYTES) if far else step
    return entries * per_step + problem.row_blocks * (LOOP_CYCLES + 2.0 * problem.block_rows)
