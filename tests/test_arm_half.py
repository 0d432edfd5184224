"""float16 on ARM cores: kernels and networks under emulation, and who refuses it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tvm
from arm_programs import needs_tools
from emulated import needed, run
from planes_oracle import problem_of
from test_arm_cost_kernels import needs_tvm
from test_k_tiles import dense
from test_networks import Case, inputs_for, run_onnxruntime

import tvm_pivot
from benchmarks import zoo
from benchmarks.arm_cost import kernels
from benchmarks.arm_cost.cores import core_of
from tvm_pivot.errors import UnsupportedTargetError
from tvm_pivot.schedules import arm
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.held_operands import STRETCH
from tvm_pivot.targets import PRESETS

NETWORKS = (
    (Case("mlp", "8x1@0.1"), "cortex-a55"),
    (Case("resnet18", "8x1@0.1", image=32), "cortex-a76"),
    (Case("resnet18", "dense", image=32), "cortex-x1"),
    (Case("bert2", "4x1@0.1", length=16), "neoverse-v1"),
)


@needed
@pytest.mark.parametrize(("case", "target"), NETWORKS, ids=str)
def test_networks_in_half_precision(case: Case, target: str, tmp_path: Path) -> None:
    path = zoo.load(case.name, case.variant, image=case.image, length=case.length)
    net = tvm_pivot.build(path, target=target, precision="float16")
    x = inputs_for(case)[0]
    wanted = run_onnxruntime(path, x)
    for got, want in zip(run(net, [x], tmp_path), wanted, strict=True):
        assert got.dtype == want.dtype
        assert abs(got - want).max() <= 0.05 * abs(want).max()


@needs_tools
@needs_tvm
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_a_kernel_in_half_precision(rows: int, density: float) -> None:
    assert 2 * STRETCH < 0.9 * 512
    shape, core = (56, 512, 32), core_of("cortex-a76")
    half = kernels.measure_one(shape, rows, density, core, "float16")  # checks what it computes
    whole = kernels.measure_one(shape, rows, density, core)
    assert half.cost.cycles < 0.85 * whole.cost.cycles


@pytest.mark.parametrize("rows", [4, 8])
def test_products_are_of_eight_halves_by_lane(rows: int) -> None:
    machine = replace(PRESETS["cortex-a76"].with_precision("float16"), cores=1)
    problem = problem_of(dense(256, 64, 192), rows, 64 // rows)
    tile, _ = arm.choose_planes(problem, 1600 // rows, machine)
    assert (tile.lanes, tile.weight_lanes, tile.entries) == (8, 8, 1)
    func = schedule_planes(planes_kernel(problem, tile, "float16"), problem, tile)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    text = tvm.tirx.build(mod, target=machine.to_tvm()).inspect_source("asm")
    products = re.findall(r"fmla\tv\d+\.8h, v\d+\.8h, v\d+\.h\[(\d)\]", text)
    assert set(map(int, products)) >= set(range(rows))


def test_cores_without_the_arithmetic_refuse_it() -> None:
    for name in ("cortex-a53", "cortex-a72", "arm", "armv7-neon", "zen4", "x86-avx512"):
        with pytest.raises(UnsupportedTargetError, match=rf"'{name}' does not compute in"):
            PRESETS[name].with_precision("float16")
    for name in ("cortex-a55", "cortex-a76", "cortex-x1", "neoverse-n1", "neoverse-v1", "apple-m1"):
        half = PRESETS[name].with_precision("float16")
        assert (half.lanes, half.stored_lanes) == (4, 8)
        assert PRESETS[name].stored_lanes == 4
