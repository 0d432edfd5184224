"""The CUDA-core kernels: numerics on the emulated device against float64, resources from nvcc."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from cuda_emulation import compiled, emulated_gpu, nvcc

from benchmarks.gpu import rooflines
from tvm_pivot import cuda_compiler
from tvm_pivot.cuda_compiler import KernelResources
from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import join, pack
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.cuda import choose_planes, choose_rows, planes_tiles
from tvm_pivot.schedules.cuda_planes import (
    SHARED_BYTES,
    CudaPlanes,
    CudaTile,
    planes_kernel,
    tap_tables,
)
from tvm_pivot.schedules.cuda_rows import CudaRowsTile, rows_kernel
from tvm_pivot.schedules.problems import Epilogue, RowsProblem
from tvm_pivot.targets import PRESETS, resolve

__all__ = ["compiled", "emulated_gpu", "nvcc"]

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


NONE = Epilogue()


@dataclass(frozen=True)
class Case:
    """A layer and a tile for it."""

    geometry: ConvGeometry
    rows: int
    tile: CudaTile
    epilogue: Epilogue = NONE
    dtype: str = "float32"


def square(size: int, kernel: int = 1, stride: int = 1, dilation: int = 1, pad: int = 0) -> Any:
    """Both axes of an image alike."""
    axis = AxisGeometry(size, kernel, stride, dilation, pad, pad)
    return axis, axis


ALL = Epilogue(residual=True, low=-0.25, high=0.75)
CASES = {
    "1x1": Case(ConvGeometry(1, 24, 16, *square(8)), 8, CudaTile(4, 4, 1, 4, 4), ALL),
    "1x1 of many images": Case(ConvGeometry(3, 24, 32, *square(6)), 16, CudaTile(4, 4, 2, 4, 4)),
    "1x1 half": Case(
        ConvGeometry(2, 24, 16, *square(8)), 8, CudaTile(8, 8, 2, 4, 2), ALL, "float16"
    ),
    "3x3": Case(ConvGeometry(1, 6, 16, *square(9, 3, pad=1)), 8, CudaTile(2, 1, 4, 4, 4), ALL),
    "3x3 half": Case(
        ConvGeometry(2, 6, 32, *square(7, 3, pad=1)), 32, CudaTile(2, 1, 1, 4, 4), ALL, "float16"
    ),
    "1x1 bfloat": Case(
        ConvGeometry(2, 24, 16, *square(8)), 16, CudaTile(4, 4, 2, 4, 4), ALL, "bfloat16"
    ),
    "3x3 bfloat": Case(
        ConvGeometry(2, 6, 32, *square(7, 3, pad=1)), 8, CudaTile(2, 1, 4, 4, 4), ALL, "bfloat16"
    ),
    "strided, blocks left over": Case(
        ConvGeometry(2, 5, 20, *square(11, 3, 2, pad=1)), 4, CudaTile(4, 1, 1, 4, 4)
    ),
    "dilated, unpadded": Case(
        ConvGeometry(1, 5, 8, *square(12, 3, 1, 2)), 8, CudaTile(1, 1, 8, 8, 4)
    ),
    "uneven axes": Case(
        ConvGeometry(2, 4, 8, AxisGeometry(9, 1, 2, 1, 0, 1), AxisGeometry(10, 5, 1, 1, 3, 1)),
        2,
        CudaTile(2, 1, 2, 4, 4),
        Epilogue(low=0.0),
    ),
    "groups": Case(ConvGeometry(1, 8, 16, *square(7, 3, pad=1), 2), 8, CudaTile(1, 1, 2, 4, 4)),
    "depthwise": Case(
        ConvGeometry(2, 9, 9, *square(8, 3, 2, pad=1), 9), 1, CudaTile(2, 1, 1, 4, 4)
    ),
    "depthwise half": Case(
        ConvGeometry(1, 9, 9, *square(8, 5, pad=2), 9), 1, CudaTile(4, 1, 4, 4, 4), ALL, "float16"
    ),
}


def pruned(rng: np.random.Generator, rows: int, columns: int, block: int) -> np.ndarray:
    """A matrix that keeps a third of its blocks, and no row block in one case of eight."""
    blocks = -(-rows // block)
    kept = rng.random((blocks, columns)) < 0.33
    kept[rng.random(blocks) < 0.125] = False
    mask = np.repeat(kept, block, axis=0)[:rows]
    return (rng.standard_normal((rows, columns)) * mask).astype(np.float32)


def on_device(func: tvm.tirx.PrimFunc, *arrays: np.ndarray) -> np.ndarray:
    """The last argument, which comes in as NaN, after `func` has run on the emulated device."""
    cuda_compiler.prepare()
    machine = resolve("cuda").to_tvm()
    with machine:
        built = tvm.compile(
            tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), machine
        )
    tensors = [tvm.runtime.tensor(array, tvm.cuda(0)) for array in arrays]
    built["main"](*tensors)
    result: np.ndarray = tensors[-1].numpy()
    return result


def finish(sums: np.ndarray, bias: np.ndarray, other: np.ndarray, epilogue: Epilogue) -> np.ndarray:
    """The epilogue, in float64; `bias` broadcasts over what follows the rows."""
    done = sums + bias + (other if epilogue.residual else 0.0)
    low = -np.inf if epilogue.low is None else epilogue.low
    high = np.inf if epilogue.high is None else epilogue.high
    return np.asarray(np.clip(done, low, high))


@pytest.mark.parametrize("name", CASES)
def test_planes_kernel(name: str, emulated_gpu: None) -> None:
    case, rng = CASES[name], np.random.default_rng(sum(name.encode()))
    g, dtype = case.geometry, case.dtype
    taps = g.y.kernel * g.x.kernel
    weight = pruned(rng, g.outputs, g.channels // g.groups * taps, case.rows).astype(dtype)
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(dtype)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    parts, bits = [], []
    for group, matrix in enumerate(np.split(weight.astype(np.float32), g.groups)):
        offsets, masks = tap_tables(g, group)
        part = pack(matrix, BlockShape(case.rows), unroll=case.tile.unroll, longest_first=True)
        bits.append(masks[part.index])
        parts.append(replace(part, index=offsets[part.index] // case.tile.vector))
    packed = join(parts)
    problem = CudaPlanes(g, case.rows, packed.row_blocks, case.epilogue, dtype)
    other = rng.standard_normal(problem.output).astype(dtype)
    args = [x.reshape(g.batch, -1), packed.indptr, packed.index, packed.data.astype(dtype)]
    args += [packed.rows, bias[packed.rows]]
    args += [np.concatenate(bits)] if problem.masked else []
    args += [other] if case.epilogue.residual else []
    got = on_device(planes_kernel(problem, case.tile), *args, np.full_like(other, np.nan))
    padding = (g.x.before, g.x.after, g.y.before, g.y.after)
    padded = torch.nn.functional.pad(torch.from_numpy(x.astype(np.float64)), padding)
    shape = (g.outputs, g.channels // g.groups, g.y.kernel, g.x.kernel)
    kernel = torch.from_numpy(weight.astype(np.float64).reshape(shape))
    more = ((g.y.stride, g.x.stride), 0, (g.y.dilation, g.x.dilation), g.groups)
    sums, sizes = (
        torch.nn.functional.conv2d(f(padded), f(kernel), None, *more).numpy()
        for f in (lambda t: t, torch.abs)
    )
    expected = finish(sums.reshape(problem.output), bias[:, None], other, case.epilogue)
    limit = EPS[dtype] * np.abs(expected) + 64 * EPS["float32"] * (
        1 + sizes.reshape(expected.shape)
    )
    assert np.all(np.abs(got - expected) <= limit)  # a NaN fails


@pytest.mark.parametrize(
    ("rows", "inputs", "tile", "dtype"),
    [
        (8, 1, CudaRowsTile(4, 1, 2), "float32"),
        (16, 3, CudaRowsTile(2, 2, 1), "float32"),
        (1, 2, CudaRowsTile(1, 4, 2), "float16"),
        (4, 1, CudaRowsTile(8, 1, 1), "float16"),
        (8, 2, CudaRowsTile(2, 2, 2), "bfloat16"),
    ],
)
def test_rows_kernel(
    rows: int, inputs: int, tile: CudaRowsTile, dtype: str, emulated_gpu: None
) -> None:
    rng = np.random.default_rng(rows)
    weight = pruned(rng, 44, 300, rows).astype(dtype)
    packed = pack(weight.astype(np.float32), BlockShape(rows), longest_first=True)
    bias = rng.standard_normal(44).astype(np.float32)
    x, other = (rng.standard_normal(s).astype(dtype) for s in ((inputs, 300), (inputs, 44)))
    problem = RowsProblem(inputs, 300, 44, packed.row_blocks, rows, False, ALL)
    args = [x, packed.indptr, packed.index, packed.data.astype(dtype), packed.rows]
    kernel = rows_kernel(problem, tile, dtype)
    got = on_device(kernel, *args, bias[packed.rows], other, np.full_like(other, np.nan))
    sums, sizes = (f(x.astype(np.float64)) @ f(weight.astype(np.float64)).T for f in (np.copy, abs))
    expected = finish(sums, bias, other, ALL)
    limit = EPS[dtype] * np.abs(expected) + 64 * EPS["float32"] * (1 + sizes)
    assert np.all(np.abs(got - expected) <= limit)


def test_taps_know_which_pixels_have_them() -> None:
    g = ConvGeometry(1, 2, 4, *square(5, 3, pad=1))
    offsets, bits = tap_tables(g)
    assert offsets.tolist()[:9] == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert (offsets[9:] - offsets[:9]).tolist() == [25] * 9
    assert len(set(bits[:9].tolist())) == 9
    assert bits[9:].tolist() == bits[:9].tolist()


@pytest.mark.parametrize("dtype", EPS)
def test_every_tile_fits_the_gpu(dtype: str) -> None:
    for rows, kernel in product((1, 8, 16, 32), (1, 3)):
        g = ConvGeometry(1, 64, 64, *square(14, kernel, pad=kernel // 2))
        tiles = list(planes_tiles(CudaPlanes(g, rows, 64 // rows, Epilogue(), dtype)))
        assert tiles
        for tile in tiles:
            assert tile.warps % tile.splits == 0
            assert tile.pixels % tile.vector == 0
            assert rows * tile.pixels % tile.splits == 0
            shared = 4 * tile.warps * rows * tile.pixels * 32 if tile.splits > 1 else 0
            assert shared <= SHARED_BYTES


def test_small_layers_share_their_entries_and_large_ones_do_not() -> None:
    target = PRESETS["h100"]
    small = CudaPlanes(ConvGeometry(1, 512, 512, *square(7, 3, pad=1)), 8, 64, Epilogue())
    tile, cycles = choose_planes(small, 64 * 460, target)
    assert tile.splits > 1
    large = CudaPlanes(ConvGeometry(64, 64, 256, *square(56)), 8, 32, Epilogue())
    many, more = choose_planes(large, 32 * 32, target)
    assert many.splits == 1
    assert many.vector == 4
    assert more > cycles
    problem = RowsProblem(1, 4096, 4096, 512, 8, False, Epilogue())
    assert choose_rows(problem, 512 * 410, target)[0].splits > 1


def test_kernels_do_not_spill(nvcc: list[KernelResources]) -> None:
    cuda_compiler.prepare()
    machine, functions = resolve("cuda").to_tvm(), {}
    for rows, kernel, dtype in product((8, 16, 32), (1, 3), EPS):
        g = ConvGeometry(4, 128, 128, *square(28, kernel, pad=kernel // 2))
        problem = CudaPlanes(g, rows, 128 // rows, Epilogue(residual=True, low=0.0), dtype)
        tile, _ = choose_planes(problem, 128 // rows * 100, resolve("cuda"))
        functions[f"planes_{rows}_{kernel}_{dtype}"] = planes_kernel(problem, tile)
    depthwise = ConvGeometry(1, 96, 96, *square(28, 3, 2, pad=1), 96)
    alone = CudaPlanes(depthwise, 1, 96, Epilogue(low=0.0, high=6.0))
    tile, _ = choose_planes(alone, 96 * 9, resolve("cuda"))
    functions["depthwise"] = planes_kernel(alone, tile)
    for rows, dtype in product((1, 8, 16, 32), EPS):
        problem_1 = RowsProblem(1, 1024, 1024, 1024 // rows, rows, False, Epilogue())
        tile_1, _ = choose_rows(problem_1, 1024 // rows * 100, resolve("cuda"))
        functions[f"rows_{rows}_{dtype}"] = rows_kernel(problem_1, tile_1, dtype)
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    with machine:
        tvm.compile(tvm.IRModule(named), machine)
    assert {r.name.removesuffix("_kernel") for r in nvcc} == set(functions)
    assert {r.arch for r in nvcc} == {"sm_80", "sm_90"}
    assert [r for r in nvcc if r.spill_bytes or r.stack_bytes] == []
    assert max(r.registers for r in nvcc) <= 168
    assert max(r.shared_bytes for r in nvcc) <= SHARED_BYTES


def test_the_page_shows_the_rooflines_of_today() -> None:
    page = (Path(__file__).parents[1] / "docs" / "cuda.md").read_text()
    assert "\n".join(rooflines.table(PRESETS["h100"])) in page
