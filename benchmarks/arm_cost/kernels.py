"""Block-sparse kernels against the limit that a core's multiply-adds set."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from benchmarks.layer_kernels import SHAPES, block_mask, dense_layer, kernel_and_arguments
from tvm_pivot.linking import linker
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.targets import resolve

from . import compiled
from .cores import ArmCostError, Core
from .cost import Cost
from .mca import multiply_adds_per_cycle
from .results import KernelCost

ROWS = (4, 8)
DENSITY = 0.1
_FUNCTION = "main"
_LANES = 4  # of the vectors that `multiply_adds_per_cycle` counts


def measure(
    cores: Sequence[Core],
    done: Callable[[KernelCost], None],
    *,
    precision: str = "float32",
    caches: bool = False,
) -> None:
    """Measure the four shapes with 4x1 and 8x1 blocks of a tenth of the weights.

    Args:
        cores: what they are compiled for and run on.
        done: called with each cost as it is known.
        precision: of `tvm_pivot.build`.
        caches: count misses too.

    Raises:
        ArmCostError: a tool is missing, or a kernel is wrong.
        UnsupportedTargetError: a core does not have the precision.
    """
    for core in cores:
        for rows in ROWS:
            for shape in SHAPES:
                done(measure_one(shape, rows, DENSITY, core, precision, caches=caches))


def measure_one(
    shape: tuple[int, int, int],
    rows: int,
    density: float,
    core: Core,
    precision: str = "float32",
    *,
    caches: bool = False,
) -> KernelCost:
    """The cost of one layer's kernel.

    Args:
        shape: pixels, inputs K, outputs N.
        rows: R of its R x 1 blocks.
        density: of the blocks that are kept.
        core: what runs it.
        precision: of the kernel. The limit counts vectors of 128 bits.
        caches: count misses too.

    Raises:
        ArmCostError: a tool is missing, or the kernel is wrong.
        UnsupportedTargetError: the core does not have the precision.
        ArtifactError: there is no cross compiler.
    """
    pixels, inputs, outputs = shape
    rng = np.random.default_rng([*shape, rows, round(1000 * density)])
    mask = block_mask(rng, outputs, inputs, rows, density)
    weight = np.where(mask, rng.standard_normal((outputs, inputs)), 0).astype(np.float32)
    x = rng.standard_normal((inputs, pixels)).astype(np.float32)
    functions, found = _execute(weight, x, core, precision, caches)
    want = weight.astype(np.float64) @ x
    sums = np.abs(weight).astype(np.float64) @ np.abs(x)
    eps = float(np.finfo(precision).eps)
    error = float((np.abs(found - want) / (inputs * eps * sums.max())).max())
    if not error <= 1:
        raise ArmCostError(f"the kernel of {shape} is wrong on {core.name}: {error:.1f} x bound")
    lanes = _LANES * 4 // np.dtype(precision).itemsize
    vectors = int(np.count_nonzero(mask)) * pixels / lanes
    limit = vectors / multiply_adds_per_cycle(core.model)
    cost = sum(functions.values(), Cost())
    kept = float(mask.mean())
    return KernelCost(pixels, inputs, outputs, rows, kept, core.name, cost, limit, error)


def _execute(
    weight: Any, x: Any, core: Core, precision: str, caches: bool
) -> tuple[dict[str, Cost], Any]:
    """The cost of the kernel by functions, and its output [N, pixels]."""
    target = replace(resolve(core.name).with_precision(precision), cores=1)
    layer = dense_layer(weight, x.shape[1])
    plan = plan_layer(layer, target, True).plan
    func, arguments = kernel_and_arguments(layer, plan, target, x)
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        library = Path(scratch, "kernel.so")
        made = tvm.compile(tvm.IRModule({_FUNCTION: func}), target=target.to_tvm())
        made.export_library(str(library), fcompile=linker(target))
        functions, after = compiled.execute(library, _FUNCTION, arguments, core, caches=caches)
    return functions, after[-1][0]
