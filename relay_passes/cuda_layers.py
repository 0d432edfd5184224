"""Layers as the CUDA kernels see them, and what they cost there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..errors import CompileError
from ..fragments import OperandType
from ..schedules.cuda import LAUNCH_CYCLES, choose_planes, choose_rows
from ..schedules.cuda_planes import CudaPlanes, is_supported
from ..schedules.problems import Epilogue
from ..schedules.tensor_core_rule import LAUNCH_SECONDS, choose_tensor_core_tile
from ..schedules.tensor_cores import TensorCoreProblem, TensorCoreTile
from ..targets import WARP, PivotTarget
from .layers import Layer, Plan, PlannedLayer, rows_problem

# Heights of blocks that the tensor-core kernel has.
TENSOR_CORE_ROWS = (8, 16, 32)
TENSOR_CORE_TYPES: tuple[OperandType, ...] = ("float16", "bfloat16", "tf32")
# Kernels that take less than so many starts, on average, are recorded.
LAUNCH_BOUND = 10.0


def cuda_planes(layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> CudaPlanes:
    """The layer as the planes kernel sees it.

    Raises:
        CompileError: it has more taps along an axis than the kernel.
    """
    if not is_supported(layer.geometry):
        raise CompileError(f"layer {layer.name}: CUDA kernels have at most 15 taps along an axis")
    return CudaPlanes(layer.geometry, plan.block_rows, plan.row_blocks, epilogue, target.storage)


def fits_tensor_cores(layer: Layer, rows: int, target: PivotTarget) -> bool:
    """Whether the tensor-core kernel can compute the layer in blocks of `rows`."""
    g, gpu = layer.geometry, target.gpu
    if gpu is None or target.precision not in TENSOR_CORE_TYPES or gpu.capability < 80:
        return False
    taps = g.y.kernel * g.x.kernel
    return rows in TENSOR_CORE_ROWS and g.groups == 1 and taps <= 64 and layer.pixels >= WARP


def tensor_core_problem(
    layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> TensorCoreProblem:
    """The layer as the tensor-core kernel sees it."""
    g = layer.geometry
    dtype = next(name for name in TENSOR_CORE_TYPES if name == target.precision)
    return TensorCoreProblem(
        images=g.batch,
        outputs=g.outputs,
        columns=layer.matrix.shape[1],
        pixels=g.y.output * g.x.output,
        image_halves=g.channels * g.y.size * g.x.size,
        block_rows=plan.block_rows,
        row_blocks=plan.row_blocks,
        dtype=dtype,
        out_dtype=target.storage,
        epilogue=epilogue,
        window=None if g.direct else (g.y, g.x),
    )


def tensor_core_tile(
    problem: TensorCoreProblem, plan: Plan, target: PivotTarget
) -> tuple[TensorCoreTile, float]:
    """The tile for a layer that `fits_tensor_cores`, and its predicted cycles."""
    assert target.gpu is not None
    density = plan.entries / (plan.row_blocks * problem.columns)
    chosen = _tensor_core_tile(problem, max(0.001, round(density, 3)), target.gpu)
    assert chosen is not None
    tile, roofline = chosen
    return tile, (roofline.seconds - LAUNCH_SECONDS) * target.gpu.clock_ghz * 1e9


# It compares a thousand tiles, and layers repeat.
_tensor_core_tile = lru_cache(maxsize=4096)(choose_tensor_core_tile)


def cuda_cycles(layer: Layer, plan: Plan, target: PivotTarget) -> float:
    """Predicted cycles of one multiprocessor, from start to end."""
    if plan.form == "tensor_cores":
        problem = tensor_core_problem(layer, plan, Epilogue(), target)
        return tensor_core_tile(problem, plan, target)[1]
    if plan.form == "rows":
        return choose_rows(rows_problem(layer, plan, Epilogue()), plan.entries, target)[1]
    planes = cuda_planes(layer, plan, Epilogue(), target)
    return choose_planes(planes, plan.entries, target)[1]


def use_cuda_graphs(planned: Sequence[PlannedLayer], target: PivotTarget) -> bool:
    """Whether the network spends so much of its time on starting kernels that one start should do.

    Then they are recorded on the first run, and started together from then on.
    """
    if target.family != "cuda":
        return False
    return sum(p.plan.cycles for p in planned) < LAUNCH_BOUND * LAUNCH_CYCLES * len(planned)
