"""The x86 schedule rule of the block-sparse kernels: which tile a layer gets before any tuning."""

from __future__ import annotations

from collections.abc import Iterator

from ..targets import PivotTarget
from .block_sparse import PlanesProblem, PlanesTile, RowsProblem, RowsTile
from .cost import planes_cycles, rows_cycles

# Waking the other cores costs about as much as this much work on one.
PARALLEL_CYCLES = 60_000.0
MOST_VECTORS = 8
# Accumulators of a row block's strip stay in level 1 until they are squeezed.
STRIP_BYTES = 16 << 10


def _vectors(block_rows: int, target: PivotTarget) -> int:
    """How many vectors P fit the registers beside R x P accumulators."""
    if block_rows == 1:
        return min(MOST_VECTORS, target.registers - 2)
    fit = (target.registers - 2) // (block_rows + 1)
    return max(1, min(MOST_VECTORS, fit))


def planes_tiles(problem: PlanesProblem, target: PivotTarget) -> Iterator[PlanesTile]:
    """All tiles the rule considers, single-core."""
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
            tiles = -(-((rows - 1) * problem.pitch + problem.width) // width)
            if rows > 1 and 4 * tiles * width * problem.block_rows > STRIP_BYTES:
                break
            yield PlanesTile(lanes, vectors, tiles, rows, False)


def choose_planes(
    problem: PlanesProblem, entries: int, target: PivotTarget
) -> tuple[PlanesTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles."""
    best = min(
        planes_tiles(problem, target), key=lambda t: planes_cycles(problem, t, entries, target)
    )
    cycles = planes_cycles(problem, best, entries, target)
    parallel = target.cores > 1 and cycles > PARALLEL_CYCLES
    return PlanesTile(best.lanes, best.vectors, best.tiles, best.group_rows, parallel), cycles


def choose_rows(problem: RowsProblem, entries: int, target: PivotTarget) -> tuple[RowsTile, float]:
    """The rows kernel's tile for `entries` packed entries, and its predicted cycles."""
    cycles = rows_cycles(problem, entries, target)
    vectors = -(-problem.block_rows // target.lanes) * problem.inputs
    unroll = max(1, int(target.fma_per_cycle * target.fma_latency) // (2 * vectors))
    unroll = 1 << (min(unroll, 4).bit_length() - 1)
    return RowsTile(unroll, target.cores > 1 and cycles > PARALLEL_CYCLES), cycles
