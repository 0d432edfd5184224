"""Tiles of the block-sparse kernels on any CPU: which ones the rules choose.

What a tile costs is for the family's rule to say (see `x86` and `arm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from ..planes import SLACK
from ..targets import PivotTarget
from .core_costs import INPUTS_AHEAD, core_costs
from .cost import input_misses, packing_cycles, rows_cycles
from .problems import Bands, PlanesProblem, PlanesTile, RowsProblem, RowsTile
from .tile_space import RULE, Reach, planes_tiles

Cycles = Callable[[PlanesProblem, PlanesTile, int, PivotTarget, int], float]

# Waking the other cores costs about as much as this much work on one.
PARALLEL_CYCLES = 60_000.0
# The same for the rows form with blocks, which mostly reads weights: no core has written these.
PARALLEL_ROWS_CYCLES = 15_000.0
# Tasks per core that even out what they differ in; a task has at least so many row blocks.
EVEN_TASKS = 8
LEAST_ROW_BLOCKS = 16

# How far ahead the planes form prefetches its weights.
AHEAD_BYTES = 8 << 10
# The same with one row per block, once per row (see `row_sum`).
ROW_AHEAD_BYTES = 2 << 10
# Higher blocks from which on it does for every entry. With fewer rows, loads are what binds.
PREFETCHED_ROWS = 4
# How often weights may be walked for that to pay: from the second time on they are near.
TURNS = 8
# The rows form: entries per row block from which on weights from far are summed in steps twice as
# long.
LONG_ROWS = 512
# The share of vector loads that level 1 does not serve from which on inputs are prefetched.
FETCHED_MISSES = 0.15
# What of level 2 the planes of a band may take, together with the weights, and with what it writes.
BAND_SHARE, BAND_AND_WEIGHTS_SHARE, WRITTEN_SHARE = 0.36, 0.8, 0.9
# Fewer rows than so many times those that a band shares with its neighbour are copied too often.
LEAST_BAND = 2


@lru_cache(maxsize=4096)  # layers repeat within a network, and so do the variants of one
def choose_planes(
    problem: PlanesProblem,
    entries: int,
    target: PivotTarget,
    predict: Cycles,
    reach: Reach = RULE,
    bands: int = 1,
) -> tuple[PlanesTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles.

    The problem is the whole layer, or one of its `bands`.
    """
    tiles = planes_tiles(problem, target, reach)
    costs = ((predict(problem, tile, entries, target, bands), tile) for tile in tiles)
    cycles, best = min(costs, key=lambda pair: pair[0])
    return share_planes(problem, best, cycles, target), cycles


def ahead_of(block_rows: int, size: int = AHEAD_BYTES) -> int:
    """Entries of so many rows after which those lie that are fetched, `size` bytes further on."""
    return size // (4 * block_rows)


def prefetching(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget, bands: int = 1
) -> PlanesTile:
    """The tile with prefetches of its weights and inputs, where they pay.

    A network's weights are larger than level 2, so those of a layer have left it before each run;
    and what other cores and programs leave of level 3 nobody knows. Inputs that level 1 cannot hold
    are in level 2, in places that only the index tells.
    """
    near = bands * problem.batch * tile.groups(problem) > TURNS
    if problem.block_rows == 1:
        return tile if near else replace(tile, ahead=ahead_of(1, ROW_AHEAD_BYTES))
    if problem.block_rows < PREFETCHED_ROWS:
        return tile
    if not near:
        tile = replace(tile, ahead=ahead_of(problem.block_rows))
    if tile.k_tiles > 1 or input_misses(problem, tile, target) < FETCHED_MISSES:
        return tile
    return replace(tile, inputs_ahead=core_costs(target).inputs_ahead)


def prefetches(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget
) -> Iterator[PlanesTile]:
    """The tile with all prefetches that are worth a look, and with none; the rule's comes first."""
    rule = prefetching(problem, tile, target)
    found = [rule]
    if problem.block_rows >= PREFETCHED_ROWS:
        # How often weights are walked is not known here: a tile may be for one of many bands.
        distances = (ahead_of(problem.block_rows), 0)
        inputs = (0,) if tile.k_tiles > 1 else (rule.inputs_ahead, 0, INPUTS_AHEAD)
        found += [replace(tile, ahead=d, inputs_ahead=i) for d in distances for i in inputs]
    yield from dict.fromkeys((*found, tile))


def share_planes(
    problem: PlanesProblem, tile: PlanesTile, cycles: float, target: PivotTarget
) -> PlanesTile:
    """A tile for one core, made for all cores if a kernel of so many cycles is worth it."""
    if target.cores == 1 or cycles <= PARALLEL_CYCLES:
        return tile
    return replace(tile, parallel=True, stretches=_stretches(problem, tile, target))


@lru_cache(maxsize=4096)
def choose_bands(
    problem: PlanesProblem,
    entries: int,
    target: PivotTarget,
    predict: Cycles,
    reach: Reach = RULE,
) -> Bands | None:
    """The bands for a layer whose output rows have gaps; None where all planes are laid out first.

    Bands pay where the planes leave level 2, and a band and the weights do not: those are read
    again for every band.
    """
    weights = 4 * entries * (problem.block_rows + 1)
    room = BAND_AND_WEIGHTS_SHARE * target.l2_bytes - weights
    room = min(room, BAND_SHARE * target.l2_bytes)
    if problem.compact or 4 * problem.image_floats <= room:
        return None
    per_row = 4 * (problem.image_floats - SLACK) // (problem.height + problem.reach)
    most = min(problem.height, int(room - 4 * SLACK) // per_row - problem.reach)
    room = WRITTEN_SHARE * target.l2_bytes - weights - 4 * SLACK - per_row * problem.reach
    most = min(most, int(room) // (per_row + 4 * problem.rows * problem.width))
    least = max(1, LEAST_BAND * problem.reach)
    heights = list(range(-(-most // 2), most + 1)) if most >= least else []
    high, slides = reach.row_vectors, reach.slides and problem.shifts > 0
    if slides and problem.block_rows == 1 and max(most, least) < high <= problem.height:
        # Panels read their planes once, so that these may leave level 2 for higher register tiles.
        heights.append(high)
    # With fewer bands than cores some would have nothing to do.
    heights = [rows for rows in heights if band_count(problem, rows) >= target.cores]
    if not heights:
        return None
    one = replace(target, cores=1)

    def cycles(rows: int) -> float:
        count = band_count(problem, rows)
        kernel = choose_planes(problem.band(rows), entries, one, predict, reach, count)[1]
        return bands_cycles(problem, rows, kernel, target)

    best = min(heights, key=cycles)
    return share_bands(best, cycles(best), target)


def band_count(problem: PlanesProblem, rows: int) -> int:
    """Into how many bands of so many output rows the images are cut."""
    return problem.batch * -(-problem.height // rows)


def bands_cycles(problem: PlanesProblem, rows: int, kernel: float, target: PivotTarget) -> float:
    """Predicted cycles of a layer in bands of `rows`, each of which takes `kernel` beside copies.

    All cores share the bands.
    """
    count = band_count(problem, rows)
    copies = packing_cycles(problem.band(rows).image_floats, target)
    return -(-count // target.cores) * (kernel + copies)


def share_bands(rows: int, cycles: float, target: PivotTarget) -> Bands:
    """Bands of so many rows, on all cores if so many cycles on each of them are worth it."""
    parallel = target.cores > 1 and target.cores * cycles > PARALLEL_CYCLES
    return Bands(rows, parallel, target.cores if parallel else 1)


def _stretches(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> int:
    """Stretches of row blocks with which the tasks of a K-tiled kernel share the cores evenly."""
    if tile.k_tiles == 1 and not tile.panel:
        return tile.stretches
    tasks = problem.batch * tile.groups(problem)
    most = max(tile.stretches, problem.row_blocks // LEAST_ROW_BLOCKS)
    for stretches in range(tile.stretches, most + 1):
        if tasks * stretches % target.cores == 0 or tasks * stretches >= EVEN_TASKS * target.cores:
            return stretches
    return most


def choose_rows(problem: RowsProblem, entries: int, target: PivotTarget) -> tuple[RowsTile, float]:
    """The rows kernel's tile for `entries` packed entries, and its predicted cycles."""
    cycles = rows_cycles(problem, entries, target)
    vectors = -(-problem.block_rows // target.lanes) * problem.inputs
    unroll = max(1, int(target.fma_per_cycle * target.fma_latency) // vectors)
    costs = core_costs(target)
    far = 4 * problem.block_rows * entries > costs.far_weights * target.l2_bytes
    # A lookup takes so long that two sums hide the latency of the multiply-add.
    most = 2 if problem.window else 4
    if far and entries >= LONG_ROWS * problem.row_blocks:
        most *= 2
    unroll = 1 << (min(unroll, most).bit_length() - 1)
    ahead = ahead_of(problem.block_rows, costs.stream_ahead) if far else 0
    return share_rows(problem, RowsTile(unroll, False, ahead), cycles, target), cycles


def share_rows(
    problem: RowsProblem, tile: RowsTile, cycles: float, target: PivotTarget
) -> RowsTile:
    """The tile, with row blocks on all cores if a kernel of so many cycles is worth it."""
    least = PARALLEL_CYCLES if problem.own_columns else PARALLEL_ROWS_CYCLES
    return replace(tile, parallel=target.cores > 1 and cycles > least)
