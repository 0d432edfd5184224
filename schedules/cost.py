"""Predicted cycles of the block-sparse kernels: what the schedule rules minimise.

Counts what one core must issue per step of the ragged loop (multiply-adds, loads, the latency of
the accumulators), plus what each register tile pays once, plus bytes that miss level 2. It ranks
candidates; it does not promise times.
"""

from __future__ import annotations

import math

from ..targets import PivotTarget
from .core_costs import CoreCosts, core_costs
from .problems import Panel, PlanesProblem, PlanesTile, RowsProblem

# The constants below were fitted to layers of many shapes and densities, measured on one AVX-512
# machine; those in which cores differ most are in `core_costs`.
# Cycles around one ragged loop.
LOOP_CYCLES = 4.0
# A weight that the only multiply-add which it serves broadcasts by itself; a load that is an
# instruction of its own.
FOLDED_BROADCAST = 0.5
SEPARATE_LOAD = 1.25
# A single pixel's sum, stored by itself.
SINGLE_STORE = 2.0
# How sharply the busier of two units hides the other: the exponent of their norm.
OVERLAP = 4.0
# What a squeezed vector takes more where it straddles two vectors of the strip.
STRADDLING_SQUEEZE = 1.0
# One row per block, fitted to kernels of their own (see `row_sum`): cycles of a vector load from
# level 1, aligned and not, and of one that misses, with the shares of level 1 from which some miss,
# and more; what an entry takes beside, and the latency that shows; a run of entries, with a jump
# that was not foreseen, and each further run of the same sums, with their slide by a column; a
# vector that is stored at the end.
ROW_ALIGNED, ROW_STRADDLING, ROW_MISSING = 0.54, 1.24, 1.53
ROW_FREE_SHARE, ROW_MISSES_PER_SHARE, ROW_MISSES_BEYOND = 0.22, 0.21, 0.12
ROW_ENTRY, ROW_LATENCY = 1.02, 1.3
ROW_VISIT, ROW_RUN, SLIDE_CYCLES = 16.2, 5.1, 0.43
ROW_STORE = 2.4
# A part of a vector, stored under a mask.
MASKED_CYCLES = 3.8
# Bytes per cycle from beyond level 2 (prefetched), and how much of a cache one operand can use.
FAR_BYTES = 80.0
CACHE_SHARE = 0.7
# With K tiles or a panel: the share of vector loads that miss level 1 grows with the part of it
# that a tile's inputs take.
FREE_SHARE, MISSES_PER_SHARE = 0.17, 0.23
# There the row blocks' short sums overlap, so only a part of a multiply-add's latency shows.
LATENCY_SHOWN = 0.42
# Bytes between two lines that share a set of level 1, and of level 2, and of a line.
SET_BYTES, FAR_SET_BYTES, LINE_BYTES = 4096, 65536, 64
# The rows form, per step: alone and for every input row. With columns of its own in every row,
# scalar gathers per cycle; with windows, what a step costs by itself, and for every input row the
# multiply-add with what feeds it, and a vector of the window.
ROWS_STEP, ROWS_INPUT = 0.7, 0.75
GATHERS_PER_CYCLE = 1.2
LOOKUP_STEP, LOOKUP_INPUT, LOOKUP_VECTOR = 2.0, 0.4, 0.52
# Bytes per cycle from beyond level 2, where every byte is read once and little else is done.
STREAMED_BYTES = 26.0


def planes_cycles(
    problem: PlanesProblem, tile: PlanesTile, entries: int, target: PivotTarget, bands: int = 1
) -> float:
    """Cycles on one core for a layer with `entries` packed entries, or for one of its `bands`."""
    costs = core_costs(target)
    r_, p_ = problem.block_rows, tile.vectors
    groups = tile.groups(problem)
    batch_groups = problem.batch * groups
    tiles = batch_groups * tile.tiles
    if r_ == 1:
        cycles = tiles * _one_row_cycles(problem, tile, entries, target)
    elif tile.k_tiles > 1 or tile.panel:
        cycles = tiles * _k_tiled_cycles(problem, tile, entries, target)
    else:
        last = tile.last(problem)
        cycles = _tile_cycles(problem, tile, p_, entries, target) * (tiles - batch_groups)
        cycles += _tile_cycles(problem, tile, last, entries, target) * batch_groups
    if tile.masked(problem) and not problem.compact:
        cycles += MASKED_CYCLES * problem.batch * groups * problem.row_blocks * r_ * tile.group_rows
    elif not (problem.compact or tile.within_rows(problem)):
        lanes = min(tile.lanes, 1 << (problem.width.bit_length() - 1))
        columns = tile.columns(problem)
        pieces = -(-columns // lanes) * tile.group_rows
        whole = tile.panel_pitch == columns and columns % tile.lanes == 0
        squeeze = costs.squeeze
        squeeze += 0.0 if tile.group_rows == 1 or whole else STRADDLING_SQUEEZE
        cycles += squeeze * problem.batch * groups * problem.row_blocks * r_ * pieces
    # What was fitted to one row per block with K tiles or a panel has this in it.
    if r_ > 1 or not (tile.k_tiles > 1 or tile.panel):
        cycles += costs.reread * entries * problem.batch * (groups - 1)
    far = far_bytes(problem, tile, entries, target, _far_sets(problem, tile))
    return cycles + far / FAR_BYTES + _strip_cycles(problem, tile, target, bands)


def _strip_cycles(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget, bands: int
) -> float:
    """Cycles in which inputs and outputs come from beyond level 2, and go there, strip by strip."""
    strips = core_costs(target).strips
    if strips is None:
        return 0.0
    outputs = 4.0 * problem.batch * problem.rows * problem.pixels
    residual = outputs if problem.epilogue.residual else 0.0
    inputs = 4.0 * problem.batch * problem.image_floats
    filled = bands * (inputs + outputs + residual) / target.l2_bytes
    far = min(1.0, max(0.0, (filled - strips.resident) / strips.spread))
    columns = tile.tiles * tile.width if problem.compact else tile.columns(problem)
    whole_rows = not problem.compact and columns >= problem.width
    size = 4.0 * min(columns, problem.width) * (tile.group_rows if whole_rows else 1)
    long = strips.whole if tile.groups(problem) == bands == 1 else strips.long
    ahead = min(1.0, max(0.0, (size - strips.begins) / (strips.ends - strips.begins)))
    # A line is read before it is written; padded planes are read where the copy to them left them.
    moved, read = 2.0 * outputs + residual, inputs if problem.compact else 0.0
    each = (1.0 - ahead) / strips.short + ahead / long
    own = min(each, 1.0 / strips.read) if problem.block_rows == 1 else each
    return far * (moved * each + read * own)


def packing_cycles(floats: int, target: PivotTarget) -> float:
    """Cycles of a copy to padded planes of so many floats."""
    return core_costs(target).pack * floats / target.lanes


def reading_cycles(floats: int, target: PivotTarget) -> float:
    """Cycles to read so many floats that were written before, where they have left level 2."""
    strips = core_costs(target).strips
    if strips is None:
        return 0.0
    filled = 4.0 * floats / target.l2_bytes
    far = min(1.0, max(0.0, (filled - strips.resident) / strips.spread))
    return far * 4.0 * floats / strips.long


def input_misses(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> float:
    """The share of vector loads that level 1 does not serve, with all columns walked at once."""
    planes = max(1.0, problem.image_floats / (problem.height * problem.pitch))
    taps = problem.columns / planes
    panel = 4.0 * planes * tile.width * min(max(taps, 1.0), 3.0) / tile.k_tiles
    return min(1.0, max(0.0, panel / target.l1_bytes - 0.4))


def _tile_cycles(
    problem: PlanesProblem, tile: PlanesTile, vectors: int, entries: int, target: PivotTarget
) -> float:
    """Cycles of a register tile of so many vectors, which walks all columns at once."""
    stores = core_costs(target).store * vectors + SINGLE_STORE * tile.singles
    per_block = LOOP_CYCLES + stores * problem.block_rows
    step = _step_cycles(problem, tile, vectors, target)
    return entries * step + problem.row_blocks * per_block


def _step_cycles(
    problem: PlanesProblem, tile: PlanesTile, vectors: int, target: PivotTarget
) -> float:
    """Cycles of one entry in such a register tile: multiply-adds, loads and latency overlap."""
    r_, p_ = problem.block_rows, vectors
    misses = input_misses(problem, tile, target)
    costs = core_costs(target)
    near, far = costs.near, costs.far
    if not problem.compact or problem.pixels % tile.lanes:
        straddling = _straddling(tile)
        near += max(0.0, costs.straddling_near - near) * straddling
        far *= 1.0 + (costs.straddling_far - 1.0) * straddling
    load = SEPARATE_LOAD * (near * (1.0 - misses) + far * misses)
    fma = (r_ * p_ + tile.singles) / target.fma_per_cycle
    loads = p_ * load + _broadcasts(r_, p_, costs)
    if tile.singles:
        loads += load + FOLDED_BROADCAST * tile.singles
    return _overlapped(fma, loads, target.fma_latency)


def _broadcasts(rows: int, vectors: int, costs: CoreCosts) -> float:
    """Cycles of the weights' loads in one entry."""
    return rows * (FOLDED_BROADCAST if vectors == 1 else costs.broadcast)


def _k_tiled_cycles(
    problem: PlanesProblem, tile: PlanesTile, entries: int, target: PivotTarget
) -> float:
    """Cycles of a register tile whose columns are walked tile by tile, out of level 1."""
    costs = core_costs(target)
    r_, p_, s_ = problem.block_rows, tile.vectors, tile.k_tiles
    share = _tile_bytes(problem, tile) / target.l1_bytes
    misses = min(1.0, max(0.0, (share - FREE_SHARE) * MISSES_PER_SHARE))
    straddling = 1.0 - _aligned(problem, tile)
    straddling *= _straddling(tile)
    near = costs.aligned_load + (costs.straddling_load - costs.aligned_load) * straddling
    load = SEPARATE_LOAD * (near * (1.0 - misses) + costs.missing_load * misses)
    latency = LATENCY_SHOWN * target.fma_latency
    step = _overlapped(
        r_ * p_ / target.fma_per_cycle, p_ * load + _broadcasts(r_, p_, costs), latency
    )
    rest = costs.store + costs.rest * (s_ - 1)
    visit = costs.visit + tile.slides * (ROW_RUN + SLIDE_CYCLES * r_ * p_)
    visits = problem.row_blocks * (s_ * visit + rest * r_ * p_)
    return entries * step + visits + _panel_cycles(problem, tile, costs)


def _one_row_cycles(
    problem: PlanesProblem, tile: PlanesTile, entries: int, target: PivotTarget
) -> float:
    """Cycles of a register tile with one row per block."""
    costs = core_costs(target)
    p_, s_ = tile.vectors, tile.k_tiles
    share = _tile_bytes(problem, tile) / target.l1_bytes
    misses = max(0.0, (share - ROW_FREE_SHARE) * ROW_MISSES_PER_SHARE)
    misses = min(1.0, misses + ROW_MISSES_BEYOND * max(0.0, share - 1.0))
    aligned = _aligned(problem, tile)
    near = ROW_ALIGNED * aligned + ROW_STRADDLING * (1.0 - aligned)
    load = near * (1.0 - misses) + ROW_MISSING * misses
    step = _overlapped(p_ / target.fma_per_cycle, p_ * load + ROW_ENTRY, ROW_LATENCY)
    visit = ROW_VISIT + tile.slides * (ROW_RUN + SLIDE_CYCLES * p_)
    rest = ROW_STORE + costs.row_rest * (s_ - 1)
    visits = problem.row_blocks * (s_ * visit + rest * p_)
    return entries * step + visits + _panel_cycles(problem, tile, costs)


def _panel_cycles(problem: PlanesProblem, tile: PlanesTile, costs: CoreCosts) -> float:
    """Cycles of a group's copies to panels, shared by its register tiles."""
    if not tile.panel:
        return 0.0
    panel = Panel(problem, tile)
    rows = problem.channels * panel.lines * panel.height / tile.tiles
    return costs.copy * rows * -(-tile.panel_pitch // tile.lanes) * tile.stretches


def _aligned(problem: PlanesProblem, tile: PlanesTile) -> float:
    """The share of vector loads that touch one cache line only."""
    if not tile.panel:
        return float(problem.compact and problem.pixels % tile.lanes == 0)
    return 1.0 if tile.panel_pitch % tile.lanes == 0 or tile.slides else 0.5


def _straddling(tile: PlanesTile) -> float:
    """The share of vectors that touch two cache lines where they may begin anywhere."""
    return min(1.0, 4.0 * tile.lanes / LINE_BYTES)


def _tile_bytes(problem: PlanesProblem, tile: PlanesTile) -> float:
    """Bytes of level 1 that the inputs of one K tile keep busy."""
    width = tile.tiles * tile.width
    if tile.panel:
        return 4.0 * Panel(problem, tile).rows * tile.panel_pitch
    channels = problem.channels
    channel = problem.image_floats / (channels * problem.groups)
    # Phases and borders of a channel, and the rows that the lowest taps reach.
    read = 4.0 * channel / (problem.height * problem.pitch) * width
    if problem.taps > 1 and not problem.compact:
        read += 8.0 * problem.pitch
    used = 1.0
    if 4 * channel % LINE_BYTES == 0:
        # Channels this far apart begin in few sets, and what they read covers some of them only.
        used = min(1.0, read / math.gcd(int(4 * channel), SET_BYTES))
    return read * -(-channels // tile.k_tiles) / used


def _far_sets(problem: PlanesProblem, tile: PlanesTile) -> float:
    """The share of level 2's sets that hold what a group reads of all planes.

    Planes a power of two apart begin in few sets, and a group's pixels reach some more.
    """
    if not problem.compact:
        return 1.0
    apart = math.gcd(4 * problem.pixels, FAR_SET_BYTES)
    return min(1.0, 4.0 * tile.group_floats(problem) / apart)


def _overlapped(*units: float) -> float:
    """Cycles of units that work at the same time: the busiest one, and a part of the others."""
    return float(sum(u**OVERLAP for u in units) ** (1.0 / OVERLAP))


def far_bytes(
    problem: PlanesProblem,
    tile: PlanesTile,
    entries: int,
    target: PivotTarget,
    usable: float = 1.0,
) -> float:
    """Bytes from beyond level 2: the weights per group, and the input per row block.

    Of level 2 the input can use a share, `usable`.
    """
    groups, group_floats = tile.groups(problem), tile.group_floats(problem)
    keep = CACHE_SHARE * target.l2_bytes
    weights = 4.0 * entries * (problem.block_rows + 1)
    taps = problem.columns * problem.pixels / max(problem.image_floats, 1)
    panel = 4.0 * problem.columns * group_floats / max(taps, 1.0)
    far = problem.batch * groups * weights if weights > keep else weights
    once = panel <= keep * usable or tile.k_tiles > 1 or tile.panel
    rereads = 1 if once else problem.row_blocks
    return far + problem.batch * groups * panel * rereads


def rows_cycles(problem: RowsProblem, entries: int, target: PivotTarget) -> float:
    """Cycles on one core for a matrix-vector layer with `entries` packed entries (or steps)."""
    r_, m_ = problem.block_rows, problem.inputs
    if problem.window:
        data = 5.0 * r_ + 4.0
        step = LOOKUP_STEP + m_ * (LOOKUP_INPUT + LOOKUP_VECTOR * problem.window)
    elif problem.own_columns:
        data = 8.0 * r_
        step = r_ * m_ / GATHERS_PER_CYCLE
    else:
        data = 4.0 * (r_ + 1)
        step = ROWS_STEP + ROWS_INPUT * m_ * -(-r_ // target.lanes)
    far = data * entries > CACHE_SHARE * target.l2_bytes
    per_step = _overlapped(step, data / STREAMED_BYTES) if far else step
    return entries * per_step + problem.row_blocks * (LOOP_CYCLES + 2.0 * r_)
