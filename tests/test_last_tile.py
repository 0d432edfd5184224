"""Register tiles that are the last ones of their groups: no more vectors than pixels need."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import convolution, geometries, packed_for, planes_of, problem_of, tables_for

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.problems import Epilogue, PlanesTile
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.targets import PRESETS, resolve

EPS = float(np.finfo(np.float32).eps)
EPILOGUES = [Epilogue(), Epilogue(low=0.0), Epilogue(residual=True, low=-0.5, high=0.5)]


def check(g, rows, tile, epilogue, seed):
    """Compare a kernel with float64."""
    rng = np.random.default_rng(seed)
    blocks = g.groups * -(-g.outputs // g.groups // rows)
    problem = problem_of(g, rows, blocks, epilogue)
    weight = rng.standard_normal((g.outputs, problem.columns)).astype(np.float32)
    weight[rng.random(weight.shape) >= 0.4] = 0
    packed, more = packed_for(g, problem, weight, tile)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    shape = (g.batch, g.outputs, g.y.output, g.x.output)
    residual = rng.standard_normal(shape).astype(np.float32)
    planes = x.reshape(g.batch, -1) if g.direct else planes_of(g, 1, x)
    arrays = [planes, *tables_for(packed, bias, more)]
    arrays += [residual.reshape(problem.output)] if epilogue.residual else []
    arrays.append(np.full(problem.output, np.nan, np.float32))
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    tvm.compile(mod, target=resolve("x86").to_tvm())["main"](*tensors)
    want, magnitude = convolution(g, weight, x, bias, residual, epilogue)
    got = tensors[-1].numpy().reshape(shape)
    assert np.all(abs(got - want) <= (problem.columns + 4) * EPS * magnitude)


def narrowed(problem, target):
    """The tiles of the space whose groups end with fewer vectors."""
    return [t for t in planes_tiles(problem, target) if t.last(problem) < t.vectors]


@given(geometries(st.booleans()), st.sampled_from([2, 4, 8]), st.sampled_from(EPILOGUES), st.data())
@settings(max_examples=60, deadline=None)
def test_any_layer_matches_float64(g, rows, epilogue, data):
    target = data.draw(st.sampled_from([PRESETS["x86-avx2"], PRESETS["x86-avx512"]]))
    tiles = narrowed(problem_of(g, rows, -(-g.outputs // rows)), target)
    if tiles:
        ahead = {"ahead": data.draw(st.sampled_from([0, 64]))}
        ahead["inputs_ahead"] = data.draw(st.sampled_from([0, 4]))
        tile = replace(data.draw(st.sampled_from(tiles)), parallel=data.draw(st.booleans()))
        check(g, rows, replace(tile, **ahead), epilogue, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize(
    ("size", "tile", "last"),
    [
        (14, PlanesTile(16, 3, 5, 14, False), 2),  # 13 rows of 15 floats, and 14: 14 vectors
        (28, PlanesTile(16, 3, 5, 7, False), 1),
        (28, PlanesTile(16, 3, 3, 5, False), 3),
        (80, PlanesTile(16, 3, 2, 1, False), 2),  # rows by themselves
        (80, PlanesTile(16, 3, 2, 1, False, k_tiles=2), 3),  # sums that rest are of whole tiles
    ],
)
def test_as_many_vectors_as_the_pixels_need(size, tile, last):
    axis = AxisGeometry(size, 3, 1, 1, 1, 1)
    g = ConvGeometry(1, 4, 16, axis, axis)
    problem = problem_of(g, 8, 2)
    assert tile.last(problem) == last
    text = schedule_planes(planes_kernel(problem, tile), problem, tile).script()
    # Of each tile's loops one makes the sums zero, and another one adds to them.
    sums = re.findall(r"in T.unroll\((\d+), annotations={\"pivot.vectors\": 1}\)", text)
    assert str(last) in sums and "3" in sums
    check(g, 8, tile, Epilogue(low=0.0), 0)


def test_one_row_per_block_has_whole_tiles():
    axis = AxisGeometry(14, 3, 1, 1, 1, 1)
    problem = problem_of(ConvGeometry(1, 4, 16, axis, axis), 1, 16)
    assert not narrowed(problem, PRESETS["x86-avx512"])
