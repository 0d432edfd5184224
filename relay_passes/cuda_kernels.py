"""The CUDA kernel of a layer and its tables, and what can be chosen about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx

from ..layout import BlockShape, IntArray, PackedWeight
from ..pack import join, pack
from ..pack_tensor_cores import pack_tensor_cores
from ..schedules.choices import Choice, Form, Tile
from ..schedules.cuda import choose_planes, choose_rows
from ..schedules.cuda_choices import (
    FEW,
    MOST,
    WORST,
    GpuTask,
    planes_points,
    rows_points,
    tensor_core_points,
)
from ..schedules.cuda_planes import CudaPlanes, CudaTile, planes_kernel, tap_tables
from ..schedules.cuda_rows import CudaRowsTile, rows_kernel
from ..schedules.problems import Epilogue
from ..schedules.tensor_cores import TensorCoreTile, tensor_core_kernel, window_columns
from ..targets import PivotTarget
from .cuda_layers import cuda_planes, tensor_core_problem, tensor_core_tile
from .graph import stored
from .layers import Layer, Plan, rows_problem
from .pack_layer import LayerKernel, Tables, tables_of

OPAQUE = 8  # TVM's number for a function that nothing is fused with
_FORMS: dict[str, Form] = {
    "planes": "cuda_planes",
    "rows": "cuda_rows",
    "tensor_cores": "tensor_cores",
}


def gpu_task(layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> GpuTask:
    """The layer as tuning records name it; `plan` is the rule's."""
    g = layer.geometry
    return GpuTask(
        op=layer.op,
        batch=g.batch,
        channels=g.channels,
        rows=g.outputs,
        groups=g.groups,
        columns=layer.matrix.shape[1],
        row_blocks=plan.row_blocks,
        block_rows=plan.block_rows,
        height=g.y.output,
        width=g.x.output,
        input_height=g.y.size,
        input_width=g.x.size,
        taps_y=g.y.kernel,
        taps_x=g.x.kernel,
        stride_y=g.y.stride,
        stride_x=g.x.stride,
        dilation_y=g.y.dilation,
        dilation_x=g.x.dilation,
        before_y=g.y.before,
        before_x=g.x.before,
        dtype=target.precision,
        epilogue=epilogue,
    )


def cuda_rule_choice(layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> Choice:
    """What the rule chooses for a plan."""
    tile: Tile
    if plan.form == "tensor_cores":
        tile, _ = tensor_core_tile(tensor_core_problem(layer, plan, epilogue, target), plan, target)
    elif plan.form == "rows":
        tile, _ = choose_rows(rows_problem(layer, plan, epilogue), plan.entries, target)
    else:
        tile, _ = choose_planes(cuda_planes(layer, plan, epilogue, target), plan.entries, target)
    return _choice(plan, tile)


def _choice(plan: Plan, tile: Tile) -> Choice:
    return Choice(_FORMS[plan.form], plan.block_rows, tile, plan.keep_all)


def cuda_points(
    layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> dict[Choice, float]:
    """Every choice for one plan, with its predicted cycles."""
    points: Iterator[tuple[float, Any]]
    if plan.form == "tensor_cores":
        problem = tensor_core_problem(layer, plan, epilogue, target)
        density = plan.entries / (plan.row_blocks * problem.columns)
        points = tensor_core_points(problem, max(0.001, density), target)
    elif plan.form == "rows":
        points = rows_points(rows_problem(layer, plan, epilogue), plan.entries, target)
    else:
        points = planes_points(cuda_planes(layer, plan, epilogue, target), plan.entries, target)
    return {_choice(plan, tile): cycles for cycles, tile in points}


def cuda_choices(
    layer: Layer, plans: Sequence[Plan], epilogue: Epilogue, target: PivotTarget
) -> dict[Choice, float]:
    """The space of a layer: of each plan the choices that are predicted to be fastest.

    Those that are predicted to be much slower than the best of all are left out, but for a few of
    each kernel, sparse and dense: how kernels compare is what predictions know least about.
    """
    kinds: dict[tuple[str, bool], Plan] = {}
    for plan in sorted(plans, key=lambda plan: plan.cycles):
        kinds.setdefault((plan.form, plan.keep_all), plan)
    hopeless = WORST * min(plan.cycles for plan in plans)
    found, always = dict[Choice, float](), set[Choice]()
    for plan in plans:
        first = plan in kinds.values()
        if first or plan.cycles <= hopeless:
            points = cuda_points(layer, plan, epilogue, target)
            best = sorted(points, key=points.__getitem__)[:MOST]
            found.update((choice, points[choice]) for choice in best)
            always.update(best[:FEW] if first else ())
    limit = WORST * min(found.values())
    return {c: cycles for c, cycles in found.items() if cycles <= limit or c in always}


def cuda_kernel(
    layer: Layer, plan: Plan, epilogue: Epilogue, choice: Choice, target: PivotTarget
) -> LayerKernel:
    """The kernel of `choice`. Its input, output and residual are as its form has them."""
    tile, dtype = choice.tile, target.storage
    if isinstance(tile, TensorCoreTile):
        return _tensor_cores(layer, plan, epilogue, tile, target)
    if isinstance(tile, CudaRowsTile):
        problem = rows_problem(layer, plan, epilogue)
        packed = pack(
            layer.matrix,
            BlockShape(plan.block_rows),
            slots=plan.slots[0],
            keep_all=plan.keep_all,
            longest_first=True,
        )
        key = (problem, tile, dtype)
        tables = _stored(tables_of(packed), dtype)
        make = lambda: rows_kernel(problem, tile, dtype)  # noqa: E731
        return LayerKernel(key, make, problem.output, tables, dtype)
    assert isinstance(tile, CudaTile)
    planes = cuda_planes(layer, plan, epilogue, target)
    packed, taps = _pack_planes(layer, plan, planes, tile)
    tables = _stored(tables_of(packed, taps), dtype)
    make = lambda: planes_kernel(planes, tile)  # noqa: E731
    return LayerKernel((planes, tile), make, planes.output, tables, dtype)


def _stored(tables: Tables, dtype: str) -> Tables:
    """The tables with weights of `dtype`."""

    def changed(bias: Any) -> tuple[Any, ...]:
        indptr, index, weights, *more = tables(bias)
        return (indptr, index, stored(weights, dtype), *more)

    return changed


def _pack_planes(
    layer: Layer, plan: Plan, problem: CudaPlanes, tile: CudaTile
) -> tuple[PackedWeight, tuple[IntArray, ...]]:
    """The packed weight of all channel groups, offsets in its index, and the table of taps."""
    parts, taps = [], []
    for group, matrix in enumerate(layer.group_matrices()):
        offsets, bits = tap_tables(layer.geometry, group)
        part = pack(
            matrix,
            BlockShape(plan.block_rows),
            unroll=tile.unroll,
            slots=plan.slots[group],
            keep_all=plan.keep_all,
            longest_first=True,
        )
        taps.append(bits[part.index])
        parts.append(replace(part, index=offsets[part.index] // tile.vector))
    return join(parts), (np.concatenate(taps),) if problem.masked else ()


def _tensor_cores(
    layer: Layer, plan: Plan, epilogue: Epilogue, tile: TensorCoreTile, target: PivotTarget
) -> LayerKernel:
    problem = tensor_core_problem(layer, plan, epilogue, target)
    if problem.window is None:
        offsets, taps = np.arange(problem.columns, dtype=np.int32) * problem.pixels, None
    else:
        offsets, taps = window_columns(layer.geometry.channels, problem.window)
    packed = pack_tensor_cores(
        layer.matrix,
        tile.team(plan.block_rows),
        slots=plan.slots[0],
        offsets=offsets.astype(np.int32),
        taps=taps,
        keep_all=plan.keep_all,
        dtype=problem.dtype,
    )

    def make() -> tirx.PrimFunc:
        # A call of CUDA text looks like an elementwise function to TVM, which would fuse it.
        return tensor_core_kernel(problem, tile).with_attr("op_pattern", OPAQUE)

    tables: Tables = lambda bias: (*packed.tables, packed.slot_bias(bias))  # noqa: E731
    return LayerKernel((problem, tile), make, problem.output, tables, target.storage)
