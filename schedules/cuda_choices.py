"""The spaces of the CUDA kernels that tuning searches, with predicted cycles.

The rule's tile is a point of each. Predictions of GPUs have not been measured yet, so more is kept
than for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..targets import WARP, PivotTarget
from .cuda import MOST_PLANES_SUMS, planes_tiles, rows_cycles, tile_cycles
from .cuda_planes import SHARED_BYTES, CudaPlanes, CudaTile
from .cuda_rows import CudaRowsTile
from .problems import Epilogue, RowsProblem
from .tensor_core_rule import LAUNCH_SECONDS, candidates, resized
from .tensor_cores import TensorCoreProblem, TensorCoreTile

# Predicted cycles, over the fewest, of a tile that is worth a look.
WORST = 4.0
# Tiles of one plan, at most, and of each kernel, sparse and dense, whatever is predicted.
MOST, FEW = 128, 4
# Registers of a thread that sums and loaded operands may take.
_MOST_OPERANDS = 160
_MOST_WARPS = 16
_POWERS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class GpuTask:
    """A layer as a tuning record names it, whichever kernel computes it.

    Attributes:
        op: ``"dense"`` or ``"conv2d"``.
        batch, channels, rows, groups: of the convolution that it is.
        columns: of the weight matrix.
        row_blocks, block_rows: of the rule's plan.
        height, width: output pixels.
        input_height, input_width, taps_y, taps_x, stride_y, stride_x, dilation_y, dilation_x,
        before_y, before_x: of its axes.
        dtype: how weights are kept.
        epilogue: what is fused behind the sum.
    """

    op: str
    batch: int
    channels: int
    rows: int
    groups: int
    columns: int
    row_blocks: int
    block_rows: int
    height: int
    width: int
    input_height: int
    input_width: int
    taps_y: int
    taps_x: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    before_y: int
    before_x: int
    dtype: str
    epilogue: Epilogue


def planes_space(problem: CudaPlanes) -> Iterator[CudaTile]:
    """The tiles of the planes kernel, each once: those of the rule, and more."""
    seen = set[CudaTile]()
    for tile in (*planes_tiles(problem), *_wide(problem)):
        shared = 4 * tile.warps * problem.block_rows * tile.pixels * WARP
        if tile not in seen and (tile.splits == 1 or shared <= SHARED_BYTES):
            seen.add(tile)
            yield tile


def _wide(problem: CudaPlanes) -> Iterator[CudaTile]:
    """Beyond the rule's reach: every vector, more and fewer warps, and entries per step."""
    rows = problem.block_rows
    widest = max(tile.vector for tile in planes_tiles(problem))
    vectors = [vector for vector in _POWERS if vector <= widest]
    for vector in vectors:
        for pixels in (1, 2, 4, 8):
            if pixels % vector or (pixels > 1 and rows * pixels > MOST_PLANES_SUMS):
                continue
            unrolls = [u for u in _POWERS if rows * pixels + u * (rows + pixels) <= _MOST_OPERANDS]
            for unroll in unrolls[:4]:
                for splits in (s for s in (1, 2, 4, 8) if s <= rows * pixels):
                    for warps in (w for w in _POWERS if splits <= w <= _MOST_WARPS):
                        yield CudaTile(pixels, vector, splits, warps, unroll)


def rows_space(problem: RowsProblem) -> Iterator[CudaRowsTile]:
    """The tiles of the rows kernel."""
    values = problem.block_rows * problem.inputs
    for splits in _POWERS:
        for blocks in _POWERS[:4]:
            fits = splits * blocks <= _MOST_WARPS and 4 * splits * blocks * values <= SHARED_BYTES
            for unroll in (1, 2, 4):
                if fits and values + unroll * problem.block_rows <= _MOST_OPERANDS:
                    yield CudaRowsTile(splits, blocks, unroll)


def planes_points(
    problem: CudaPlanes, entries: int, target: PivotTarget
) -> Iterator[tuple[float, CudaTile]]:
    """`planes_space` with the predicted cycles of each tile."""
    for tile in planes_space(problem):
        yield tile_cycles(problem, tile, entries, target), tile


def rows_points(
    problem: RowsProblem, entries: int, target: PivotTarget
) -> Iterator[tuple[float, CudaRowsTile]]:
    """`rows_space` with the predicted cycles of each tile."""
    for tile in rows_space(problem):
        yield rows_cycles(problem, tile, entries, target), tile


def tensor_core_points(
    problem: TensorCoreProblem, density: float, target: PivotTarget
) -> Iterator[tuple[float, TensorCoreTile]]:
    """Every tile that fits the GPU, also with half as many slabs in flight, and its cycles."""
    assert target.gpu is not None
    clock = target.gpu.clock_ghz * 1e9
    for tile, roofline in candidates(problem, density, target.gpu):
        yield (roofline.seconds - LAUNCH_SECONDS) * clock, tile
        if tile.slots >= 4:
            fewer = replace(tile, slots=tile.slots // 2)
            tile, roofline = resized(problem, fewer, density, target.gpu)
            yield (roofline.seconds - LAUNCH_SECONDS) * clock, tile
