"""Kernels that multiply by lane: all ways to hold operands compute the same, with one load each."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import drawn_weight, problem_of
from test_k_tiles import EPILOGUES, dense, run

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules import arm
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.problems import PlanesTile
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.targets import PRESETS

CONV = ConvGeometry(2, 7, 21, AxisGeometry(11, 3, 1, 1, 1, 1), AxisGeometry(9, 3, 1, 1, 1, 1))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ConvGeometry, np.ndarray, int, PlanesTile, str]:
    g = draw(st.sampled_from([dense(40, 21, 50), dense(7, 8, 3), CONV]))
    rows = draw(st.sampled_from([1, 2, 4, 8, 16]))
    weight = drawn_weight(draw, g, rows)
    problem = problem_of(g, rows, -(-g.outputs // rows))
    tile = draw(st.sampled_from(list(planes_tiles(problem, PRESETS["arm"], arm.REACH))))
    tile = replace(tile, weight_lanes=4)
    return g, weight, rows, tile, draw(st.sampled_from(list(EPILOGUES)))


@settings(max_examples=40)
@given(cases())
def test_any_tile_with_held_operands(
    case: tuple[ConvGeometry, np.ndarray, int, PlanesTile, str],
) -> None:
    g, weight, rows, tile, epilogue = case
    run(g, weight, rows, tile, EPILOGUES[epilogue])


@pytest.mark.parametrize("target", ["cortex-a55", "cortex-a76", "apple-m1"])
@pytest.mark.parametrize("rows", [4, 8])
def test_weights_are_lanes_of_loaded_vectors(rows: int, target: str) -> None:
    machine = PRESETS[target]
    problem = problem_of(dense(256, 64, 192), rows, 64 // rows)
    tile, _ = arm.choose_planes(problem, 1600 // rows, machine)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    text = tvm.tirx.build(mod, target=machine.to_tvm()).inspect_source("asm")
    loops = re.split(r"^\.LBB\w+:", text, flags=re.M)
    (hot,) = [part for part in loops if part.count("fmla") >= 16 and "b.ne" in part][:1]
    hot = hot[: hot.index("b.ne")]
    products = re.findall(r"fmla\tv\d+\.4s, v\d+\.4s, v\d+\.s\[(\d)\]", hot)
    assert len(products) == hot.count("fmla")
    assert set(products) == {"0", "1", "2", "3"}
    assert not re.search(r"\bdup\b|ld1r|ldr\ts\d", hot)
