"""The x86 schedule rule of the block-sparse kernels: which tile a layer gets before any tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from ..planes import SLACK
from ..targets import PivotTarget
from .cost import PACK_CYCLES, planes_cycles, rows_cycles
from .problems import Bands, Panel, PlanesProblem, PlanesTile, RowsProblem, RowsTile

Cycles = Callable[[PlanesProblem, PlanesTile, int, PivotTarget], float]

# Waking the other cores costs about as much as this much work on one.
PARALLEL_CYCLES = 60_000.0
MOST_VECTORS = 8
# Accumulators of a row block's strip stay in level 1 until they are squeezed.
STRIP_BYTES = 16 << 10
# What the inputs of a column tile may take of level 1.
L1_SHARES = (0.35, 0.5, 0.7, 1.0, 1.4)
# Higher blocks multiply more than they load: they need no K tiles. Nor do many register tiles
# fit level 1 together.
MOST_K_TILED_ROWS = 4
MOST_K_TILED_TILES = 4
MOST_PANEL_TILES = 2
# Higher blocks read a panel of all columns, where whole register tiles cover its rows exactly.
MOST_WHOLE_PANEL_TILES = 8
# Tasks per core that even out what they differ in; a task has at least so many row blocks.
EVEN_TASKS = 8
LEAST_ROW_BLOCKS = 16

# How far ahead weights are prefetched, and how many level-2 caches those must fill that come from
# memory in each run: from level 3 a prefetch costs a twelfth, from memory it saves a third.
AHEAD_BYTES, FAR_WEIGHTS = 8 << 10, 4.0
# What of level 2 the planes of a band may take, and together with the weights.
BAND_SHARE, BAND_AND_WEIGHTS_SHARE = 0.36, 0.8
# Fewer rows than so many times those that a band shares with its neighbour are copied too often.
LEAST_BAND = 2


def _vectors(block_rows: int, target: PivotTarget) -> int:
    """How many vectors P fit the registers with their R x P accumulators and a weight."""
    if block_rows == 1:
        return min(MOST_VECTORS, target.registers - 2)
    fit = (target.registers - 1) // (block_rows + 1)
    return max(1, min(MOST_VECTORS, fit))


def planes_tiles(problem: PlanesProblem, target: PivotTarget) -> Iterator[PlanesTile]:
    """All tiles the rule considers, single-core."""
    for tile in _register_tiles(problem, target):
        yield tile
        yield from _k_tiled(problem, tile, target)
    if not problem.compact:
        for tile in _panel_tiles(problem, target):
            yield from _with_panel(problem, tile, target)


def _register_tiles(problem: PlanesProblem, target: PivotTarget) -> Iterator[PlanesTile]:
    """Tiles over pixels and rows; every row block walks all its columns at once."""
    lanes = target.lanes
    narrowest = problem.pixels if problem.compact else target.lanes
    while lanes > max(narrowest, 1):
        lanes //= 2
    for vectors in range(1, _vectors(problem.block_rows, target) + 1):
        width = lanes * vectors
        if problem.compact:
            most = problem.pixels // width
            for tiles in sorted({t for t in (1, 2, 4, 8, most) if 1 <= t <= most}):
                yield PlanesTile(lanes, vectors, tiles, 1, False)
            continue
        for rows in range(1, problem.height + 1):
            tiles = _strip_tiles(problem, rows, problem.pitch, width)
            if rows > 1 and 4 * tiles * width * problem.block_rows > STRIP_BYTES:
                break
            yield PlanesTile(lanes, vectors, tiles, rows, False)


def _strip_tiles(problem: PlanesProblem, rows: int, pitch: int, width: int) -> int:
    """Register tiles of `width` floats that cover `rows` output rows."""
    return -(-((rows - 1) * pitch + problem.width) // width)


def _panel_tiles(problem: PlanesProblem, target: PivotTarget) -> Iterator[PlanesTile]:
    """Register tiles over rows that begin at a vector, or at half of one where that is shorter."""
    units = (target.lanes, target.lanes // 2)
    for pitch in sorted({-(-problem.width // unit) * unit for unit in units}):
        for vectors in range(1, _vectors(problem.block_rows, target) + 1):
            width = target.lanes * vectors
            for rows in range(1, problem.height + 1):
                tiles = _strip_tiles(problem, rows, pitch, width)
                if problem.block_rows > MOST_K_TILED_ROWS:
                    if tiles > MOST_WHOLE_PANEL_TILES:
                        break
                    if tiles * width != rows * pitch:
                        continue
                elif tiles > MOST_PANEL_TILES:
                    break
                # What the last register tile reads behind the last row must lie in the slack.
                beyond = -(-tiles * width // pitch) - rows
                if beyond * problem.pitch + pitch - problem.width <= SLACK:
                    yield PlanesTile(target.lanes, vectors, tiles, rows, False, panel_pitch=pitch)


def _k_tiled(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> Iterator[PlanesTile]:
    """`tile` with its columns cut into tiles that fit level 1, with and without a panel."""
    if problem.block_rows > MOST_K_TILED_ROWS or tile.tiles > MOST_K_TILED_TILES:
        return
    tile = _fitted(problem, tile, target)
    bytes_per_channel = 4 * tile.tiles * tile.width
    if problem.channels > 1:
        for k_tiles in _k_tiles(problem.channels, bytes_per_channel, target):
            if k_tiles > 1:
                yield replace(tile, k_tiles=k_tiles)
    if problem.compact and tile.tiles == 1:
        yield from _with_panel(problem, replace(tile, panel_pitch=tile.width), target)


def _with_panel(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget
) -> Iterator[PlanesTile]:
    """`tile`, which has a panel, with its columns cut into tiles whose panels fit level 1."""
    if problem.groups > 1:
        return
    if problem.block_rows > MOST_K_TILED_ROWS:
        if 4 * problem.columns * tile.width <= target.l1_bytes:  # else taps had better share lines
            yield tile
        return
    tile, panel = _fitted(problem, tile, target), Panel(problem, tile)
    bytes_per_channel = 4 * panel.lines * panel.height * tile.panel_pitch
    for k_tiles in _k_tiles(problem.channels, bytes_per_channel, target):
        yield replace(tile, k_tiles=k_tiles)


def _fitted(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> PlanesTile:
    """`tile` with so few row blocks per stretch that their resting sums fit level 2."""
    sums = 4 * problem.row_blocks * problem.block_rows * tile.tiles * tile.width
    stretches = max(1, min(-(-sums // target.l2_bytes), problem.row_blocks))
    return replace(tile, stretches=stretches)


def _k_tiles(channels: int, bytes_per_channel: int, target: PivotTarget) -> list[int]:
    """Numbers of column tiles that take some share of level 1, none of them empty."""
    counts = set()
    for share in L1_SHARES:
        length = max(1, min(channels, int(share * target.l1_bytes) // bytes_per_channel))
        counts.add(-(-channels // -(-channels // -(-channels // length))))
    return sorted(counts)


@lru_cache(maxsize=4096)  # layers repeat within a network, and so do the variants of one
def choose_planes(
    problem: PlanesProblem, entries: int, target: PivotTarget, predict: Cycles = planes_cycles
) -> tuple[PlanesTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles."""
    costs = ((predict(problem, t, entries, target), t) for t in planes_tiles(problem, target))
    cycles, best = min(costs, key=lambda pair: pair[0])
    if target.cores > 1 and cycles > PARALLEL_CYCLES:
        best = replace(best, parallel=True, stretches=_stretches(problem, best, target))
    return best, cycles


@lru_cache(maxsize=4096)
def choose_bands(
    problem: PlanesProblem, entries: int, target: PivotTarget, predict: Cycles = planes_cycles
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
    if most < max(1, LEAST_BAND * problem.reach):
        return None
    one = replace(target, cores=1)

    def cycles(rows: int) -> float:
        band, count = problem.band(rows), problem.batch * -(-problem.height // rows)
        copies = PACK_CYCLES * band.image_floats / target.lanes
        share = -(-count // target.cores)
        return share * (choose_planes(band, entries, one, predict)[1] + copies)

    best = min(range(-(-most // 2), most + 1), key=cycles)
    return Bands(best, target.cores > 1 and target.cores * cycles(best) > PARALLEL_CYCLES)


def _stretches(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> int:
    """Stretches of row blocks with which the tasks of a K-tiled kernel share the cores evenly."""
    if tile.k_tiles == 1 and not tile.panel:
        return tile.stretches
    span, total = tile.tiles * tile.width, problem.pixels
    if not problem.compact:
        span, total = tile.group_rows, problem.height
    tasks = problem.batch * -(-total // span)
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
    # A lookup takes so long that two sums hide the latency of the multiply-add.
    unroll = 1 << (min(unroll, 2 if problem.window else 4).bit_length() - 1)
    far = 4 * problem.block_rows * entries > FAR_WEIGHTS * target.l2_bytes
    ahead = AHEAD_BYTES // (4 * problem.block_rows) if far else 0
    return RowsTile(unroll, target.cores > 1 and cycles > PARALLEL_CYCLES, ahead), cycles
