"""Layers as the CUDA kernels see them, and what they cost there."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CompileError
from ..schedules.cuda import LAUNCH_CYCLES, choose_planes, choose_rows
from ..schedules.cuda_planes import CudaPlanes, is_supported
from ..schedules.problems import Epilogue
from ..targets import PivotTarget
from .layers import Layer, Plan, PlannedLayer, rows_problem

# Kernels that take less than so many starts, on average, are recorded.
LAUNCH_BOUND = 10.0


def cuda_planes(layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> CudaPlanes:
    """The layer as the planes kernel sees it.

    Raises:
        CompileError: it has more taps along an axis than the kernel.
    """
    if not is_supported(layer.geometry):
        raise CompileError(f"layer {layer.name}: CUDA kernels have at most 15 taps along an axis")
    return CudaPlanes(layer.geometry, plan.block_rows, plan.row_blocks, epilogue, target.precision)


def cuda_cycles(layer: Layer, plan: Plan, target: PivotTarget) -> float:
    """Predicted cycles of one multiprocessor, from start to end."""
    if plan.form == "rows":
        return choose_rows(rows_problem(layer, plan, Epilogue()), plan.entries, target)[1]
    problem = cuda_planes(layer, plan, Epilogue(), target)
    return choose_planes(problem, plan.entries, target)[1]


def use_cuda_graphs(planned: Sequence[PlannedLayer], target: PivotTarget) -> bool:
    """Whether the network spends so much of its time on starting kernels that one start should do.

    Then they are recorded on the first run, and started together from then on.
    """
    if target.family != "cuda":
        return False
    return sum(p.plan.cycles for p in planned) < LAUNCH_BOUND * LAUNCH_CYCLES * len(planned)
