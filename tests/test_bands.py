"""Kernels that read images band by band compute the convolution that PyTorch computes."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import convolution, packed_for, tables_for

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.bands import in_bands
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.problems import Bands, Epilogue, PlanesProblem, PlanesTile
from tvm_pivot.schedules.store_once import STORES_ONCE
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.schedules.x86 import choose_bands, choose_planes
from tvm_pivot.targets import PRESETS, resolve

EPS = float(np.finfo(np.float32).eps)
PLAIN = Epilogue()
BOTH = Epilogue(residual=True, low=-1.0, high=1.0)


def square(channels, outputs, size, kernel=3, stride=1, batch=1):
    axis = AxisGeometry(size, kernel, stride, 1, kernel // 2, kernel // 2)
    return ConvGeometry(batch, channels, outputs, axis, axis)


def problem_of(g, rows, epilogue=PLAIN):
    taps = g.y.kernel * g.x.kernel
    columns, blocks = g.channels // g.groups * taps, -(-(g.outputs // g.groups) // rows)
    return PlanesProblem(
        g.batch, g.image_floats, columns, g.outputs, g.groups * blocks, rows, g.y.output,
        g.x.output, g.pitch, epilogue, taps, g.groups, len(g.y.phases) * g.x.kernel, g.y.halo,
        len(g.y.phases) * len(g.x.phases), g.x.halo,
    )  # fmt: skip


def run(g, weight, rows, tile, bands, epilogue=PLAIN, lanes=8, seed=0):
    rng = np.random.default_rng(seed)
    problem = problem_of(g, rows, epilogue).band(bands.rows)
    packed, more = packed_for(g.band(bands.rows), problem, weight, tile)
    func = in_bands(schedule_planes(planes_kernel(problem, tile), problem, tile), g, bands, lanes)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    main = tvm.compile(mod, target=resolve("x86").to_tvm())["main"]
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    shape = (g.batch, g.outputs, g.y.output, g.x.output)
    residual = rng.standard_normal(shape).astype(np.float32)
    tables = tables_for(packed, bias, more)
    arrays = [x, *tables, *([residual] if epilogue.residual else [])]
    tensors = [tvm.runtime.tensor(a) for a in (*arrays, np.full(shape, np.nan, np.float32))]
    want, magnitude = convolution(g, weight, x, bias, residual, epilogue)
    for _ in range(2):  # what the first call left behind must not matter
        main(*tensors)
        got = tensors[-1].numpy()
        assert np.isfinite(got).all()
        assert np.all(abs(got - want) <= (weight.shape[1] + 4) * EPS * magnitude)
    return func


def pruned(g, density, seed):
    rng = np.random.default_rng(seed)
    columns = g.channels // g.groups * g.y.kernel * g.x.kernel
    weight = rng.standard_normal((g.outputs, columns)).astype(np.float32)
    return weight * (rng.random(weight.shape) < density)


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 2]))
    axes = []
    for _ in range(2):
        kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        dilation = draw(st.integers(1, 2))
        reach = (kernel - 1) * dilation
        pads = [draw(st.integers(0, reach)) for _ in range(2)]
        size = draw(st.integers(reach + 1, reach + 20))
        axes.append(AxisGeometry(size, kernel, stride, dilation, *pads))
    channels, outputs = (groups * draw(st.integers(1, 9)) for _ in range(2))
    g = ConvGeometry(draw(st.integers(1, 2)), channels, outputs, *axes, groups)
    rows = draw(st.sampled_from([1, 2, 8]))
    bands = Bands(draw(st.integers(1, g.y.output)), draw(st.booleans()))
    return g, rows, bands, draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.integers(0, 9999))


def test_a_band_of_one_row_with_gaps():
    axis = AxisGeometry(2, 2, 1, 1, 0, 0)
    g = ConvGeometry(1, 1, 1, axis, axis)
    for density in (0.0, 1.0):
        run(
            g,
            pruned(g, density, 0),
            1,
            PlanesTile(8, 1, 1, 1, False, panel_pitch=4),
            Bands(1, False),
        )


@given(cases(), st.sampled_from([PLAIN, BOTH]), st.data())
@settings(max_examples=30, deadline=None)
def test_any_band_computes_the_convolution(case, epilogue, data):
    g, rows, bands, density, seed = case
    problem = problem_of(g, rows, epilogue)
    if problem.compact:
        return
    target = PRESETS["x86-avx2"]
    tile = data.draw(st.sampled_from(list(planes_tiles(problem.band(bands.rows), target))))
    run(g, pruned(g, density, seed), rows, tile, bands, epilogue, seed=seed)


@pytest.mark.parametrize("vectors", [1, 2])
def test_tiles_that_overlap_within_a_row(vectors):
    g = square(5, 16, 29)
    tile = PlanesTile(8, vectors, -(-29 // (8 * vectors)), 1, False)
    assert tile.within_rows(problem_of(g, 8))
    run(g, pruned(g, 0.3, 1), 8, tile, Bands(10, True), BOTH)


def test_the_problem_of_a_band_is_that_of_its_geometry():
    g = replace(square(6, 16, 31, kernel=5, stride=2, batch=3), groups=2)
    assert problem_of(g, 8).band(4) == problem_of(g.band(4), 8)
    assert g.band(4).y.output == 4


@pytest.mark.parametrize(("rows", "once"), [(4, True), (5, False)])
def test_bands_that_overlap_may_not_write_over_the_residual(rows, once):
    g = square(4, 8, 16)
    tile = PlanesTile(8, 2, 1, 1, False)
    func = run(g, pruned(g, 0.5, 2), 8, tile, Bands(rows, False), BOTH)
    assert bool(func.attrs.get(STORES_ONCE)) == once


@pytest.mark.parametrize("name", ["x86-avx512", "x86-avx2"])
def test_bands_fit_level_2_and_only_large_planes_have_them(name):
    target = PRESETS[name]
    large, small = problem_of(square(32, 32, 112), 8), problem_of(square(32, 32, 7), 8)
    bands = choose_bands(large, 115, target)
    assert bands is not None
    assert 4 * large.band(bands.rows).image_floats <= target.l2_bytes / 2
    assert choose_bands(small, 115, target) is None
    # Weights that fill level 2 are read once, not once per band.
    assert choose_bands(large, 300_000, target) is None


def test_bands_share_the_cores_if_there_are_several():
    target = PRESETS["x86-avx512"]
    problem = problem_of(square(64, 64, 112), 8)
    for cores in (1, 4):
        bands = choose_bands(problem, 4608, replace(target, cores=cores))
        assert bands is not None
        assert bands.parallel == (cores > 1)
    tile, _ = choose_planes(problem.band(bands.rows), 4608, replace(target, cores=1))
    assert not tile.parallel


def test_fewer_bands_than_cores_are_none():
    """An image of 14 rows is one band of a panel's height, which a second core could not share."""
    target = PRESETS["sapphire-rapids"]
    problem = problem_of(square(512, 512, 14), 1)
    bands = [choose_bands(problem, 235_930, replace(target, cores=cores)) for cores in (1, 2)]
    assert bands[0] is not None and bands[0].rows == 14
    assert bands[1] is None
