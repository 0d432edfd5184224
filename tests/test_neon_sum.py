"""Ragged sums in assembly: they compute what float64 does, and load before they multiply."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from arm_programs import needs_tools
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import drawn_weight, packed_for, problem_of, tables_for
from test_arm_cost_kernels import needs_tvm
from test_k_tiles import EPILOGUES, EPS, dense, reference

from benchmarks.arm_cost import compiled
from benchmarks.arm_cost.cores import core_of
from tvm_pivot.linking import linker
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules import arm
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.neon_sum import NeonSum
from tvm_pivot.schedules.problems import PlanesTile
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.targets import PRESETS

CONV = ConvGeometry(2, 7, 21, AxisGeometry(11, 3, 1, 1, 1, 1), AxisGeometry(9, 3, 1, 1, 1, 1))
MACHINE = replace(PRESETS["cortex-a53"], cores=1)
Case = tuple[ConvGeometry, np.ndarray, int, PlanesTile, str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    g = draw(st.sampled_from([dense(40, 21, 50), dense(61, 24, 32), CONV]))
    rows = draw(st.sampled_from([1, 2, 4, 8, 16]))
    weight = drawn_weight(draw, g, rows)
    problem = problem_of(g, rows, -(-g.outputs // rows))
    tiles = [replace(tile, weight_lanes=4) for tile in planes_tiles(problem, MACHINE, arm.REACH)]
    grouped = [
        replace(tile, entries=entries)
        for tile in tiles
        if tile.lanes == 4
        for entries in range(2, 6)
        if NeonSum(rows, tile.vectors, entries).fits
    ]
    return g, weight, rows, draw(st.sampled_from(grouped)), draw(st.sampled_from(list(EPILOGUES)))


@needs_tools
@needs_tvm
@settings(max_examples=12, deadline=None)
@given(cases())
def test_any_grouped_tile_under_emulation(case: Case) -> None:
    g, weight, rows, tile, epilogue = case
    problem = problem_of(g, rows, -(-g.outputs // rows), EPILOGUES[epilogue])
    packed, more = packed_for(g, problem, weight, tile)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    rng = np.random.default_rng(0)
    planes = rng.standard_normal((g.batch, g.image_floats)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    residual = rng.standard_normal(problem.output).astype(np.float32)
    tables = tables_for(packed, bias, more)
    arrays = [planes, *tables, *([residual] if problem.epilogue.residual else [])]
    arrays.append(np.full(problem.output, np.nan, np.float32))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernel.so")
        made = tvm.compile(tvm.IRModule({"main": func}), target=MACHINE.to_tvm())
        made.export_library(str(library), fcompile=linker(MACHINE))
        _, after = compiled.execute(library, "main", arrays, core_of("cortex-a53"))
    want, magnitude = reference(g, problem, weight, planes, bias, residual)
    got = after[-1].reshape(want.shape)
    assert np.isfinite(got).all()
    assert np.all(abs(got - want) <= (weight.shape[1] + 4) * EPS * magnitude)


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("step", [1, 12])
def test_loads_stand_in_front_of_the_multiply_adds(rows: int, step: int) -> None:
    for vectors in range(1, 9):
        for entries in range(1, 9):
            made = NeonSum(rows, vectors, entries, step)
            if not made.fits:
                continue
            (code,) = re.findall(r'asm sideeffect "(.*?)"', made.llvm())
            lines = code.split("\\0A")
            groups = "".join("m" if line.startswith("fmla") else "-" for line in lines)
            assert len(re.findall("m+", groups)) == 1 + (entries - 1).bit_length()
            assert len(re.findall("m", groups)) == rows * vectors * (
                entries + (1 << (entries - 1).bit_length()) - 1
            )
            registers = {int(n) for n in re.findall(r"\b[vqsd](\d+)", code)}
            assert max(registers) < 32


def test_only_cores_that_never_load_beside_a_multiply_add_group_loads() -> None:
    problem = problem_of(dense(256, 64, 192), 8, 8)
    for name, grouped in (("cortex-a53", True), ("cortex-a55", False), ("cortex-a76", False)):
        tile, _ = arm.choose_planes(problem, 200, PRESETS[name])
        assert tile.weight_lanes == 4
        assert tile.in_assembly == grouped
        assert (tile.entries > 1) == grouped


def test_assembly_is_for_64_bits() -> None:
    problem = problem_of(dense(256, 64, 192), 4, 16)
    tile, _ = arm.choose_planes(problem, 400, PRESETS["armv7-neon"])
    assert not tile.in_assembly
