"""The CUDA schedule rule of the block-sparse kernels: which tile a layer gets before any tuning.

Costs are those of a roofline: multiply-adds, accesses of the load and store units, the level-2
cache and memory each take their time, and the longest counts; but a GPU that is not full, and a
warp that waits for one load after the other, take longer. Cycles are those of a multiprocessor,
without those of starting a kernel, which all of them need.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ..targets import WARP, Gpu, PivotTarget
from .cuda_code import BYTES, VECTOR_BYTES, widest
from .cuda_planes import SHARED_BYTES, CudaPlanes, CudaTile
from .cuda_rows import MOST_SUMS, CudaRowsTile
from .problems import RowsProblem

# Assumed, not measured: what starting a kernel costs, how long loads from level 2 take, and warps
# of a quarter of a multiprocessor that keep it busy.
LAUNCH_CYCLES = 3000.0
LOAD_CYCLES = 500.0
BUSY_WARPS = 4
# What of the shorter times the longest one does not hide.
EXPOSED = 0.2
# Instructions that check a masked input, and those around each entry.
MASK_CYCLES, ENTRY_CYCLES = 2.0, 2.0
# Four schedulers of a multiprocessor share one load and store unit of 32 lanes.
QUARTERS = 4
# Sums that leave registers for all else.
MOST_PLANES_SUMS = 64


def _gpu(target: PivotTarget) -> Gpu:
    assert target.gpu is not None
    return target.gpu


def _memory_cycles(bytes_moved: float, rate_gbs: float, gpu: Gpu) -> float:
    return bytes_moved / rate_gbs * gpu.clock_ghz


def planes_tiles(problem: CudaPlanes) -> Iterator[CudaTile]:
    """All tiles the rule considers."""
    rows = problem.block_rows
    vectors = {1}
    if problem.adjacent:
        vectors.add(
            min(widest(problem.pixels, problem.dtype), widest(problem.image, problem.dtype))
        )
    for vector in sorted(vectors):
        for pixels in (1, 2, 4, 8):
            if pixels % vector or (pixels > 1 and rows * pixels > MOST_PLANES_SUMS):
                continue
            unroll = 4 if rows * 4 <= MOST_PLANES_SUMS and pixels <= 4 else 2
            for splits in (1, 2, 4, 8):
                shared = 4 * splits * rows * pixels * WARP
                if splits > rows * pixels or (splits > 1 and shared > SHARED_BYTES):
                    continue
                yield CudaTile(pixels, vector, splits, max(splits, 4), unroll)


def _fits(problem: CudaPlanes, tile: CudaTile) -> bool:
    shared = 4 * tile.warps * problem.block_rows * tile.pixels * WARP
    return tile.splits == 1 or shared <= SHARED_BYTES


def tile_cycles(problem: CudaPlanes, tile: CudaTile, entries: float, target: PivotTarget) -> float:
    """Predicted cycles of a kernel that walks `entries` packed entries in all."""
    gpu, rows, total = _gpu(target), problem.block_rows, problem.geometry.batch * problem.pixels
    groups = -(-total // (WARP * tile.pixels))
    size = BYTES[problem.dtype]
    per_block = entries / problem.row_blocks
    steps = -(-per_block // (tile.unroll * tile.splits))
    walked = steps * tile.unroll * tile.splits * problem.row_blocks * groups
    loads = tile.pixels / tile.vector * max(1.0, tile.vector * size / 4)
    fetches = -(-rows * size // VECTOR_BYTES) + (2 if problem.masked else 1) / tile.unroll
    instructions = tile.pixels / tile.vector + fetches
    loads += fetches
    multiplies = rows * tile.pixels * QUARTERS * WARP / gpu.fp32_lanes
    checks = (MASK_CYCLES if problem.masked else 0.0) * tile.pixels
    entry = max(multiplies + checks + instructions + ENTRY_CYCLES, QUARTERS * loads)
    warps = problem.row_blocks * groups * tile.splits
    places = QUARTERS * gpu.multiprocessors
    busy = min(1.0, warps / (BUSY_WARPS * places))
    waves = -(-warps // (2 * BUSY_WARPS * places))
    compute = walked * entry / places / busy
    latency = waves * steps * (LOAD_CYCLES + tile.unroll * entry)
    image = problem.geometry.batch * (problem.image + problem.geometry.outputs * problem.pixels)
    memory = _memory_cycles(size * (image + entries * rows) + 4 * entries, gpu.memory_gbs, gpu)
    cache = _memory_cycles(size * entries * total, gpu.l2_gbs, gpu)
    parts = (compute, latency, memory, cache)
    return max(parts) + EXPOSED * (sum(parts) - max(parts))


@lru_cache(maxsize=4096)
def choose_planes(problem: CudaPlanes, entries: int, target: PivotTarget) -> tuple[CudaTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles."""
    tiles = [tile for tile in planes_tiles(problem) if _fits(problem, tile)]
    costs = [(tile_cycles(problem, tile, entries, target), n) for n, tile in enumerate(tiles)]
    cycles, best = min(costs)
    return tiles[best], cycles


def choose_rows(
    problem: RowsProblem, entries: int, target: PivotTarget
) -> tuple[CudaRowsTile, float]:
    """The rows kernel's tile for `entries` packed entries, and its predicted cycles."""
    per_block = entries / problem.row_blocks
    splits = 1
    while splits < 8 and per_block > 2 * WARP * splits:
        splits *= 2
    unroll = 2 if problem.block_rows * problem.inputs <= MOST_SUMS // 2 else 1
    tile = CudaRowsTile(splits, max(1, 4 // splits), unroll)
    return tile, rows_cycles(problem, tile, entries, target)


def rows_cycles(
    problem: RowsProblem, tile: CudaRowsTile, entries: float, target: PivotTarget
) -> float:
    """Predicted cycles of the rows kernel for `entries` packed entries."""
    gpu, size = _gpu(target), BYTES[target.storage]
    steps = -(-entries / problem.row_blocks // (WARP * tile.unroll * tile.splits))
    warps = problem.row_blocks * tile.splits
    busy = min(1.0, warps / (QUARTERS * gpu.multiprocessors * BUSY_WARPS))
    products = entries * problem.block_rows * problem.inputs / gpu.fp32_lanes
    compute = products / gpu.multiprocessors / busy
    memory = _memory_cycles(entries * (size * problem.block_rows + 4), gpu.memory_gbs, gpu)
    return max(compute, memory / busy, steps * LOAD_CYCLES)


def fits_rows(problem: RowsProblem) -> bool:
    """Whether the sums of one lane fit its registers."""
    return problem.block_rows * problem.inputs <= MOST_SUMS and not problem.own_columns
