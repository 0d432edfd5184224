"""Single layers with random blocks, and the kernels that compute them."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, tirx

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import planes_problem
from tvm_pivot.relay_passes.layers import Layer, Plan
from tvm_pivot.relay_passes.pack_layer import pack_planes_layer, tables_of
from tvm_pivot.schedules import tile_rule
from tvm_pivot.schedules.block_sparse import BEYOND, planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.targets import PivotTarget

SHAPES = ((192, 1024, 256), (192, 256, 1024), (768, 512, 128), (768, 128, 512))
"""Pixels, inputs K and outputs N of the layers that are measured."""


def block_mask(rng: np.random.Generator, n: int, k: int, rows: int, density: float) -> Any:
    """A random mask [n, k] of `rows` x 1 blocks with exactly round(density * blocks) kept."""
    blocks = n // rows * k
    kept = np.zeros(blocks, bool)
    kept[rng.permutation(blocks)[: round(density * blocks)]] = True
    return np.repeat(kept.reshape(n // rows, k), rows, axis=0)


def dense_layer(weight: Any, pixels: int) -> Layer:
    """A layer of weights [N, K] on planes [K, pixels]."""
    outputs, inputs = weight.shape
    geometry = ConvGeometry(1, inputs, outputs, AxisGeometry(1, 1), AxisGeometry(pixels, 1))
    return Layer(relax.Var("layer"), "dense", (inputs, outputs), weight, geometry)


def kernel_and_arguments(
    layer: Layer, plan: Plan, target: PivotTarget, x: Any
) -> tuple[tirx.PrimFunc, list[Any]]:
    """The kernel ``main`` that a target's rule chooses for a layer, and its arguments.

    Returns:
        The scheduled function, and arrays: planes `x` [K, pixels] and tables first, last the
        output [1, N, pixels], which it writes; their floats are of the target's precision.
    """
    problem = planes_problem(layer, plan, Epilogue())
    tile, _ = tile_rule(target).choose_planes(problem, plan.entries, target)
    func = schedule_planes(planes_kernel(problem, tile, target.precision), problem, tile)
    packed, more = pack_planes_layer(layer, plan, problem, tile)
    dtype = target.precision
    bias = np.zeros(packed.rows.size, dtype)
    out = np.zeros((1, problem.rows, problem.pixels), dtype)
    tables = tables_of(packed, more, dtype, BEYOND)(bias)
    return func.with_attr("global_symbol", "main"), [x.reshape(1, -1).astype(dtype), *tables, out]
