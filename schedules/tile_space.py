"""The schedule space of the planes kernels on CPUs: which tiles there are for a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..planes import SLACK
from ..targets import PivotTarget
from .problems import MASKED_LANES, Panel, PlanesProblem, PlanesTile

MOST_VECTORS = 8
# Pixels of a register tile beside its vectors.
MOST_SINGLES = 4
# With one row per block, where an entry's index and weight cost as much as two vectors.
MOST_VECTORS_OF_A_ROW = 14
# Accumulators of a row block's strip stay in level 1 until they are squeezed.
STRIP_BYTES = 16 << 10
# Higher blocks read a panel of all columns, where whole register tiles cover its rows exactly.
MOST_WHOLE_PANEL_TILES = 8


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
        singles: pixels beside the vectors of register tiles.
        row_vectors: vectors P with one row per block.
        sums_share: what the sums of a stretch may take of level 2 while they rest.
    """

    k_tiled_rows: int
    k_tiled_tiles: int
    panel_tiles: int
    l1_shares: tuple[float, ...]
    narrow_panels: bool = True
    slides: bool = True
    singles: bool = True
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
            yield from _with_singles(problem, lanes, vectors, target, reach)
            continue
        for rows in range(1, problem.height + 1):
            tiles = -(-((rows - 1) * problem.pitch + problem.width) // width)
            if rows > 1 and 4 * tiles * width * problem.block_rows > STRIP_BYTES:
                break
            yield PlanesTile(lanes, vectors, tiles, rows, False)


def _with_singles(
    problem: PlanesProblem, lanes: int, vectors: int, target: PivotTarget, reach: Reach
) -> Iterator[PlanesTile]:
    """Register tiles with as few single pixels each as cover all of them."""
    rows, width = problem.block_rows, lanes * vectors
    if rows == 1 or not reach.singles:
        return
    for singles in range(1, MOST_SINGLES + 1):
        used = rows * vectors + vectors + 1 + singles * -(-rows // lanes)
        count = -(-problem.pixels // (width + singles))
        if used <= target.registers and count * width < problem.pixels:
            for tiles in sorted({t for t in (1, 2, 4, 8, count) if count % t == 0}):
                yield PlanesTile(lanes, vectors, tiles, 1, False, singles=singles)
            return


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
    if tile.singles:
        return
    if problem.compact and problem.block_rows > reach.k_tiled_rows:
        # Several register tiles fetch a row block's weights once.
        panel = replace(tile, panel_pitch=tile.tiles * tile.width)
        yield from _with_panel(problem, panel, target, reach)
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
        width = tile.panel_pitch if problem.compact else tile.width
        if 4 * problem.columns * width <= room:
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
