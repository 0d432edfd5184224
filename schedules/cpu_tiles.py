"""Tiles of the block-sparse kernels on any CPU: which there are, and which the rules choose.

What a tile costs is for the family's rule to say (see `x86` and `arm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from ..planes import SLACK
from ..targets import PivotTarget
from .cost import packing_cycles, rows_cycles
from .problems import (
    MASKED_LANES,
    Bands,
    Panel,
    PlanesProblem,
    PlanesTile,
    RowsProblem,
    RowsTile,
)

Cycles = Callable[[PlanesProblem, PlanesTile, int, PivotTarget, int], float]

# Waking the other cores costs about as much as this much work on one.
PARALLEL_CYCLES = 60_000.0
MOST_VECTORS = 8
# With one row per block, where an entry's index and weight cost as much as two vectors.
MOST_VECTORS_OF_A_ROW = 14
# Accumulators of a row block's strip stay in level 1 until they are squeezed.
STRIP_BYTES = 16 << 10
# Higher blocks read a panel of all columns, where whole register tiles cover its rows exactly.
MOST_WHOLE_PANEL_TILES = 8
# Tasks per core that even out what they differ in; a task has at least so many row blocks.
EVEN_TASKS = 8
LEAST_ROW_BLOCKS = 16

# How far ahead weights are prefetched.
AHEAD_BYTES = 8 << 10
# How many level-2 caches the weights of the rows form must fill to come from memory in each run:
# there, from level 3 a prefetch costs a twelfth, from memory it saves a third.
FAR_WEIGHTS = 4.0
# Block rows from which on the planes form prefetches its weights. With fewer, loads are what binds.
PREFETCHED_ROWS = 4
# What of level 2 the planes of a band may take, and together with the weights.
BAND_SHARE, BAND_AND_WEIGHTS_SHARE = 0.36, 0.8
# Fewer rows than so many times those that a band shares with its neighbour are copied too often.
LEAST_BAND = 2


@dataclass(frozen=True)
class Reach:
    """Which tiles are looked at.

    Attributes:
        k_tiled_rows: block rows up to which columns are cut: higher blocks multiply more than
            they load.
        k_tiled_tiles, panel_tiles: register tiles of such a group, and of one with a panel: more do
            not fit level 1 together.
        l1_shares: what the inputs of a column tile may take of level 1.
        narrow_panels: panels whose rows are shorter than the output's.
        slides: panels whose lines are shared by the taps of a row, and some that are padded.
        row_vectors: vectors P with one row per block.
        sums_share: what the sums of a stretch may take of level 2 while they rest.
    """

    k_tiled_rows: int
    k_tiled_tiles: int
    panel_tiles: int
    l1_shares: tuple[float, ...]
    narrow_panels: bool = True
    slides: bool = True
    row_vectors: int = MOST_VECTORS_OF_A_ROW
    sums_share: float = 0.5


RULE = Reach(4, 4, 2, (0.35, 0.5, 0.7, 1.0, 1.4))


def _vectors(block_rows: int, target: PivotTarget, reach: Reach) -> int:
    """How many vectors P fit the registers with their R x P accumulators and a weight."""
    if block_rows == 1:
        return min(reach.row_vectors, target.registers - 2)
    fit = (target.registers - 1) // (block_rows + 1)
    return max(1, min(MOST_VECTORS, fit))


def planes_tiles(
    problem: PlanesProblem, target: PivotTarget, reach: Reach = RULE
) -> Iterator[PlanesTile]:
    """All tiles within reach, by default those that the rule considers; for one core."""
    for tile in _register_tiles(problem, target, reach):
        yield tile
        yield from _k_tiled(problem, tile, target, reach)
    if problem.compact:
        yield from _padded_tiles(problem, target, reach)
    else:
        for tile in _panel_tiles(problem, target, reach):
            yield from _with_panel(problem, tile, target, reach)
        for tile in _sliding_tiles(problem, target, reach):
            yield from _with_panel(problem, tile, target, reach)


def _register_tiles(
    problem: PlanesProblem, target: PivotTarget, reach: Reach
) -> Iterator[PlanesTile]:
    """Tiles over pixels and rows; every row block walks all its columns at once."""
    lanes = target.lanes
    narrowest = problem.pixels if problem.compact else target.lanes
    while lanes > max(narrowest, 1):
        lanes //= 2
    for vectors in range(1, _vectors(problem.block_rows, target, reach) + 1):
        width = lanes * vectors
        if problem.compact:
            most = problem.pixels // width
            for tiles in sorted({t for t in (1, 2, 4, 8, most) if 1 <= t <= most}):
                yield PlanesTile(lanes, vectors, tiles, 1, False)
            continue
        for rows in range(1, problem.height + 1):
            tiles = -(-((rows - 1) * problem.pitch + problem.width) // width)
            if rows > 1 and 4 * tiles * width * problem.block_rows > STRIP_BYTES:
                break
            yield PlanesTile(lanes, vectors, tiles, rows, False)


def _padded_tiles(
    problem: PlanesProblem, target: PivotTarget, reach: Reach
) -> Iterator[PlanesTile]:
    """One register tile for all pixels, where whole vectors have no place for their last ones."""
    lanes, vectors = target.lanes, -(-problem.pixels // target.lanes)
    if lanes != MASKED_LANES or problem.pixels % lanes == 0 or not reach.slides:
        return
    if 1 < vectors <= _vectors(problem.block_rows, target, reach):
        tile = PlanesTile(lanes, vectors, 1, 1, False, panel_pitch=lanes * vectors)
        yield from _with_panel(problem, tile, target, reach)


def _panel_tiles(problem: PlanesProblem, target: PivotTarget, reach: Reach) -> Iterator[PlanesTile]:
    """Register tiles over rows that begin at a vector, or at half of one where that is shorter."""
    units = (target.lanes, target.lanes // 2)
    pitches = {-(-problem.width // unit) * unit for unit in units}
    if reach.narrow_panels:
        pitches |= {unit for unit in (target.lanes, 2 * target.lanes) if unit <= problem.width}
    for pitch in sorted(pitches):
        for vectors in range(1, _vectors(problem.block_rows, target, reach) + 1):
            width = target.lanes * vectors
            for rows in range(1, problem.height + 1):
                columns = min(problem.width, pitch)
                tiles = -(-((rows - 1) * pitch + columns) // width)
                if pitch < problem.width and tiles * width != rows * pitch:
                    continue
                if problem.block_rows > reach.k_tiled_rows:
                    if tiles > MOST_WHOLE_PANEL_TILES:
                        break
                    if tiles * width != rows * pitch:
                        continue
                elif tiles > reach.panel_tiles:
                    break
                # What the last register tile reads behind the last row must lie in the slack.
                beyond = -(-tiles * width // pitch) - rows
                if beyond * problem.pitch + pitch - columns <= SLACK:
                    yield PlanesTile(target.lanes, vectors, tiles, rows, False, panel_pitch=pitch)


def _sliding_tiles(
    problem: PlanesProblem, target: PivotTarget, reach: Reach
) -> Iterator[PlanesTile]:
    """Register tiles of whole rows of a panel whose lines the taps of a row share."""
    shifts, width = problem.shifts, problem.width
    if not reach.slides or shifts == 0 or problem.block_rows > reach.k_tiled_rows:
        return
    lanes = target.lanes
    whole = -(-(width + shifts) // lanes) * lanes
    short = (lanes,) if lanes == MASKED_LANES else (lanes, 2 * lanes)
    pitches = {pitch for pitch in short if shifts < pitch <= width + shifts} | {whole}
    if lanes % problem.pitch == 0:
        pitches.add(problem.pitch)
    for pitch in sorted(pitches):
        for vectors in range(1, _vectors(problem.block_rows, target, reach) + 1):
            rows, left = divmod(lanes * vectors, pitch)
            if rows == 0 or left:
                continue
            for tiles in range(1, reach.panel_tiles + 1):
                high = min(tiles * rows, problem.height)
                tile = PlanesTile(
                    lanes, vectors, tiles, high, False, panel_pitch=pitch, slides=shifts
                )
                spare = tiles * rows - high
                if spare >= rows or (spare and tile.across(problem) > 1):
                    continue
                # What is read behind the last row must lie in the slack.
                beyond = spare + Panel(problem, tile).copies - 1
                if beyond * problem.pitch + pitch <= SLACK:
                    yield tile


def _k_tiled(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget, reach: Reach
) -> Iterator[PlanesTile]:
    """`tile` with its columns cut into tiles that fit level 1, with and without a panel."""
    if problem.compact and tile.tiles == 1 and problem.block_rows > reach.k_tiled_rows:
        yield from _with_panel(problem, replace(tile, panel_pitch=tile.width), target, reach)
    if problem.block_rows > reach.k_tiled_rows or tile.tiles > reach.k_tiled_tiles:
        return
    tile = _fitted(problem, tile, target, reach)
    bytes_per_channel = 4 * tile.tiles * tile.width
    if problem.channels > 1:
        for k_tiles in _k_tiles(problem.channels, bytes_per_channel, target, reach):
            if k_tiles > 1:
                yield replace(tile, k_tiles=k_tiles)
    if problem.compact and tile.tiles == 1:
        yield from _with_panel(problem, replace(tile, panel_pitch=tile.width), target, reach)


def _with_panel(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget, reach: Reach
) -> Iterator[PlanesTile]:
    """`tile`, which has a panel, with its columns cut into tiles whose panels fit level 1."""
    if problem.groups > 1:
        return
    if problem.block_rows > reach.k_tiled_rows:
        # Where a layer has several taps, they had better share lines if these leave level 1.
        room = target.l2_bytes // 2 if problem.taps == 1 else target.l1_bytes
        if 4 * problem.columns * tile.width <= room:
            yield tile
        return
    tile, panel = _fitted(problem, tile, target, reach), Panel(problem, tile)
    bytes_per_channel = 4 * panel.lines * panel.height * tile.panel_pitch
    for k_tiles in _k_tiles(problem.channels, bytes_per_channel, target, reach):
        yield replace(tile, k_tiles=k_tiles)


def _fitted(
    problem: PlanesProblem, tile: PlanesTile, target: PivotTarget, reach: Reach
) -> PlanesTile:
    """`tile` with so few row blocks per stretch that their resting sums fit level 2."""
    sums = 4 * problem.row_blocks * problem.block_rows * tile.tiles * tile.width
    room = int(reach.sums_share * target.l2_bytes)
    stretches = max(1, min(-(-sums // room), problem.row_blocks))
    return replace(tile, stretches=stretches)


def _k_tiles(channels: int, bytes_per_channel: int, target: PivotTarget, reach: Reach) -> list[int]:
    """Numbers of column tiles that take some share of level 1, none of them empty."""
    counts = set()
    for share in reach.l1_shares:
        length = max(1, min(channels, int(share * target.l1_bytes) // bytes_per_channel))
        counts.add(-(-channels // -(-channels // -(-channels // length))))
    return sorted(counts)


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


def ahead_of(block_rows: int) -> int:
    """Entries of so many rows after which those lie that are prefetched."""
    return AHEAD_BYTES // (4 * block_rows)


def prefetching(problem: PlanesProblem, tile: PlanesTile) -> PlanesTile:
    """The tile with prefetches of its weights, where they pay.

    A network's weights are larger than level 2, so those of a layer have left it before each run;
    and what other cores and programs leave of level 3 nobody knows.
    """
    if problem.block_rows < PREFETCHED_ROWS:
        return tile
    return replace(tile, ahead=ahead_of(problem.block_rows))


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
    least = max(1, LEAST_BAND * problem.reach)
    heights = list(range(-(-most // 2), most + 1)) if most >= least else []
    high, slides = reach.row_vectors, reach.slides and problem.shifts > 0
    if slides and problem.block_rows == 1 and max(most, least) < high <= problem.height:
        # Panels read their planes once, so that these may leave level 2 for higher register tiles.
        heights.append(high)
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
    return Bands(rows, target.cores > 1 and target.cores * cycles > PARALLEL_CYCLES)


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
    # A lookup takes so long that two sums hide the latency of the multiply-add.
    unroll = 1 << (min(unroll, 2 if problem.window else 4).bit_length() - 1)
    far = 4 * problem.block_rows * entries > FAR_WEIGHTS * target.l2_bytes
    ahead = ahead_of(problem.block_rows) if far else 0
    return share_rows(RowsTile(unroll, False, ahead), cycles, target), cycles


def share_rows(tile: RowsTile, cycles: float, target: PivotTarget) -> RowsTile:
    """The tile, with row blocks on all cores if a kernel of so many cycles is worth it."""
    return replace(tile, parallel=target.cores > 1 and cycles > PARALLEL_CYCLES)
