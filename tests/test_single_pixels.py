"""Pixels beside the vectors of a register tile: any layer, over its residual, and the rule."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import convolution, packed_for, problem_of, tables_for

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules import arm, x86
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.choices import Choice, planes_space
from tvm_pivot.schedules.problems import Epilogue, PlanesTile
from tvm_pivot.schedules.store_once import STORES_ONCE, store_over
from tvm_pivot.schedules.tile_space import MOST_SINGLES, planes_tiles
from tvm_pivot.targets import PRESETS, resolve

EPS = float(np.finfo(np.float32).eps)
EPILOGUES = [Epilogue(), Epilogue(low=0.0), Epilogue(residual=True, low=-0.5, high=0.5)]


def direct(channels, outputs, size, batch=1, groups=1):
    return ConvGeometry(batch, channels, outputs, *(AxisGeometry(s, 1) for s in size), groups)


def check(g, rows, tile, epilogue, density=0.5, seed=0):
    """Compare a kernel with float64, and with itself over its residual if it may be there."""
    rng = np.random.default_rng(seed)
    blocks = g.groups * -(-g.outputs // g.groups // rows)
    problem = problem_of(g, rows, blocks, epilogue)
    weight = rng.standard_normal((g.outputs, problem.columns)).astype(np.float32)
    weight[rng.random(weight.shape) >= density] = 0
    packed, more = packed_for(g, problem, weight, tile)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    forms = {"beside": func}
    whole_blocks = g.outputs // g.groups % rows == 0  # others repeat a row
    if func.attrs.get(STORES_ONCE) and whole_blocks:
        forms["over"] = store_over(func)
    mod = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in forms.items()})
    lib = tvm.compile(mod, target=resolve("x86").to_tvm())
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    shape = (g.batch, g.outputs, g.y.output, g.x.output)
    residual = rng.standard_normal(shape).astype(np.float32)
    want, magnitude = convolution(g, weight, x, bias, residual, epilogue)
    for form in forms:
        arrays = [x.reshape(g.batch, -1), *tables_for(packed, bias, more)]
        arrays += [residual.reshape(problem.output).copy()] if epilogue.residual else []
        arrays += [np.full(problem.output, np.nan, np.float32)] if form == "beside" else []
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        lib[form](*tensors)
        got = tensors[-1].numpy().reshape(shape)
        assert np.all(abs(got - want) <= (problem.columns + 4) * EPS * magnitude), form
    return list(forms)


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 2]))
    rows = draw(st.sampled_from([2, 4, 8, 16]))
    size = (draw(st.integers(1, 15)), draw(st.integers(1, 15)))
    channels, outputs = (groups * draw(st.integers(1, 30)) for _ in range(2))
    g = direct(channels, outputs, size, draw(st.integers(1, 2)), groups)
    problem = problem_of(g, rows, 1)
    target = draw(st.sampled_from([PRESETS["x86-avx2"], PRESETS["x86-avx512"]]))
    tiles = [tile for tile in planes_tiles(problem, target) if tile.singles]
    return g, rows, draw(st.sampled_from(tiles)) if tiles else None, draw(st.booleans())


@given(cases(), st.sampled_from(EPILOGUES), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_layer_matches_float64(case, epilogue, density, seed):
    g, rows, tile, parallel = case
    if tile is not None:
        check(g, rows, replace(tile, parallel=parallel, ahead=64), epilogue, density, seed)


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((7, 7), PlanesTile(16, 3, 1, 1, False, singles=1)),
        ((14, 14), PlanesTile(16, 3, 2, 1, True, singles=1)),
        ((10, 10), PlanesTile(8, 3, 1, 1, True, singles=1)),
    ],
)
def test_tiles_that_share_them_evenly_write_over_the_residual(size, tile):
    assert (
        tile.groups(problem_of(direct(9, 16, size), 8, 2))
        * tile.tiles
        * (tile.width + tile.singles)
        == size[0] * size[1]
    )
    assert check(direct(9, 16, size), 8, tile, EPILOGUES[2]) == ["beside", "over"]


def test_pixels_that_are_computed_twice_are_added_once():
    tile = PlanesTile(16, 3, 1, 1, True, singles=2)  # 197 pixels: 4 tiles of 48, and 5 of 8
    g = direct(12, 16, (1, 197))
    problem = problem_of(g, 8, 2)
    assert (tile.groups(problem), tile.whole(problem)) == (4, 192)
    assert check(g, 8, tile, EPILOGUES[2]) == ["beside"]


@pytest.mark.parametrize("name", ["x86-avx512", "x86-avx2"])
@pytest.mark.parametrize("pixels", range(1, 300, 7))
def test_tiles_cover_all_pixels_and_fit_the_registers(name, pixels):
    target = PRESETS[name]
    for rows in (2, 4, 8, 16):
        problem = problem_of(direct(64, 64, (1, pixels)), rows, 64 // rows)
        for tile in planes_tiles(problem, target):
            if not tile.singles:
                continue
            tiles = tile.groups(problem) * tile.tiles
            left = pixels - tile.whole(problem)
            assert tile.whole(problem) == tiles * tile.width
            assert 0 < left <= tiles * tile.singles and tile.singles <= MOST_SINGLES
            sums = rows * tile.vectors + tile.singles * -(-rows // tile.lanes)
            assert sums + tile.vectors + 1 <= target.registers


def test_the_rule_takes_them_where_vectors_leave_few_pixels_over():
    target = PRESETS["x86-avx512"]
    for size in (7, 14):
        problem = problem_of(direct(512, 512, (size, size)), 8, 64)
        tile, _ = x86.choose_planes(problem, 64 * 51, target)
        assert (tile.vectors, tile.singles) == (3, 1)
        assert Choice.of(Choice("planes", 8, tile).decisions()).tile == tile
    problem = problem_of(direct(512, 512, (8, 16)), 8, 64)  # whole vectors
    assert not x86.choose_planes(problem, 64 * 51, target)[0].singles


def test_arm_sums_them_otherwise():
    target, problem = PRESETS["raspberry-pi-5"], problem_of(direct(64, 64, (7, 7)), 8, 8)
    assert not any(tile.singles for tile in planes_space(problem, target))
    assert not arm.choose_planes(problem, 500, target)[0].singles


@pytest.mark.parametrize("change", [{"k_tiles": 2}, {"panel_pitch": 48}, {"weight_lanes": 4}])
def test_columns_are_not_cut_beside_them(change):
    problem = problem_of(direct(64, 64, (7, 7)), 8, 8)
    tile = replace(PlanesTile(16, 3, 1, 1, False, singles=1), **change)
    with pytest.raises(ValueError, match="single pixels"):
        schedule_planes(planes_kernel(problem, tile), problem, tile)
