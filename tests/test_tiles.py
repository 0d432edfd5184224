"""Every point of the kernels' schedule space computes the same, and the rule picks from it."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from planes_oracle import packed_for, tables_for

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import pack, pack_sliced
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.block_sparse import planes_kernel, rows_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes, schedule_rows
from tvm_pivot.schedules.cost import planes_cycles, rows_cycles
from tvm_pivot.schedules.cpu_tiles import prefetches, prefetching
from tvm_pivot.schedules.pack_planes import pack_planes
from tvm_pivot.schedules.problems import Epilogue, PlanesProblem, PlanesTile, RowsProblem, RowsTile
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.schedules.x86 import choose_planes, choose_rows
from tvm_pivot.targets import PRESETS, resolve

RNG = np.random.default_rng(11)


def compile_all(funcs):
    mod = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in funcs.items()})
    return tvm.compile(mod, target=resolve("x86").to_tvm())


def call(function, *arrays):
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    function(*tensors)
    return tensors[-1].numpy()


def planes_problem(geometry, rows, row_blocks, columns):
    height, width = geometry.y.output, geometry.x.output
    if geometry.pitch == width:
        height, width = 1, height * width
    return PlanesProblem(
        geometry.batch, geometry.image_floats, columns, geometry.outputs, row_blocks, rows,
        height, width, width if height == 1 else geometry.pitch, Epilogue(low=0.0),
        geometry.y.kernel * geometry.x.kernel, geometry.groups,
        len(geometry.y.phases) * geometry.x.kernel, geometry.y.halo,
        len(geometry.y.phases) * len(geometry.plane_starts),
        0 if geometry.unfolded else geometry.x.halo,
    )  # fmt: skip


GEOMETRIES = {
    "matrix": ConvGeometry(1, 40, 20, AxisGeometry(1, 1), AxisGeometry(100, 1)),
    "few pixels": ConvGeometry(2, 40, 20, AxisGeometry(1, 1), AxisGeometry(5, 1)),
    "3x3": ConvGeometry(2, 6, 20, AxisGeometry(11, 3, 1, 1, 1, 1), AxisGeometry(9, 3, 1, 1, 1, 1)),
    "strided": ConvGeometry(1, 6, 20, AxisGeometry(13, 3, 2, 1, 1, 0), AxisGeometry(23, 2, 2)),
}
GEOMETRIES |= {
    f"unfolded {name}": replace(GEOMETRIES[name], unfolded=True) for name in ("3x3", "strided")
}


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_tile_computes_the_same(name, rows, target):
    if target == "x86-avx512" and resolve("x86").lanes < 16:
        pytest.skip("this CPU has no AVX-512")
    g = GEOMETRIES[name]
    columns = g.channels * g.y.kernel * g.x.kernel
    weight = RNG.standard_normal((g.outputs, columns)).astype(np.float32)
    weight[RNG.random(weight.shape) < 0.7] = 0
    problem = planes_problem(g, rows, -(-g.outputs // rows), columns)
    tiles = list(planes_tiles(problem, PRESETS[target]))
    assert len(set(tiles)) == len(tiles)
    tiled = [tile for tile in tiles if tile.k_tiles > 1 or tile.panel]
    tiles = [tile for tile in tiles if tile not in tiled] + tiled[::7]  # see test_k_tiles
    funcs = {
        f"tile_{i}": schedule_planes(planes_kernel(problem, tile), problem, tile)
        for i, tile in enumerate(tiles)
    }
    if not g.direct:
        funcs["pack_planes"] = pack_planes(g, PRESETS[target].lanes, False)
    lib = compile_all(funcs)
    x = RNG.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    planes = x.reshape(g.batch, -1)
    if not g.direct:
        # Whatever stood there before must be overwritten: padding and slack too.
        planes = call(lib["pack_planes"], x, np.full((g.batch, g.image_floats), np.nan, "float32"))
        assert np.isfinite(planes).all()
    shape = (g.batch, g.outputs, g.y.output, g.x.output)
    flat = (g.batch, g.outputs, problem.pixels) if problem.compact else shape
    alike = {}
    for i, tile in enumerate(tiles):
        packed, more = packed_for(g, problem, weight, tile)
        tables = tables_for(packed, np.zeros(g.outputs, np.float32), more)
        out = np.full(flat, np.nan, np.float32)
        y = call(lib[f"tile_{i}"], planes, *tables, out).reshape(shape)
        # Each output sums the same products, in an order that chains and sliding sums change.
        order = (tile.unroll(problem), tile.slides and (tile.slides, tile.k_tiles))
        want = alike.setdefault(order, y)
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(y, next(iter(alike.values())), rtol=1e-5, atol=1e-5)
    taps = [RNG.integers(0, s) for s in shape]
    assert abs(want[tuple(taps)] - reference(g, weight, x, taps)) < 1e-3


def reference(g, weight, x, at):
    """One output pixel, by definition."""
    n, o, oy, ox = at
    kernel = weight[o].reshape(g.channels, g.y.kernel, g.x.kernel).astype(float)
    total = 0.0
    for (c, i, j), w in np.ndenumerate(kernel):
        iy = oy * g.y.stride + i * g.y.dilation - g.y.before
        ix = ox * g.x.stride + j * g.x.dilation - g.x.before
        if 0 <= iy < g.y.size and 0 <= ix < g.x.size:
            total += w * x[n, c, iy, ix]
    return max(total, 0.0)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("own_columns", [False, True])
@pytest.mark.parametrize("unroll", [1, 2, 4])
@pytest.mark.parametrize("parallel", [False, True])
def test_every_rows_tile_computes_the_same(inputs, own_columns, unroll, parallel):
    weight = RNG.standard_normal((50, 70)).astype(np.float32)
    weight[RNG.random(weight.shape) < 0.8] = 0
    if own_columns:
        packed = pack_sliced(weight, 16, unroll=unroll)
    else:
        packed = pack(weight, BlockShape(16), unroll=unroll)
    problem = RowsProblem(inputs, 70, 50, packed.indptr.size - 1, 16, own_columns, Epilogue())
    tile = RowsTile(unroll, parallel)
    lib = compile_all({"main": schedule_rows(rows_kernel(problem, tile), problem, tile)})
    x = RNG.standard_normal((inputs, 70)).astype(np.float32)
    bias = RNG.standard_normal(50).astype(np.float32)
    index = packed.index.astype(problem.index_dtype)
    tables = (packed.indptr, index, packed.data, packed.rows, bias[packed.rows])
    y = call(lib["main"], x, *tables, np.full((inputs, 50), np.nan, np.float32))
    np.testing.assert_allclose(y, x @ weight.T.astype(float) + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_rule_picks_the_cheapest_tile_that_fits_the_registers(name, rows, target):
    described, g = PRESETS[target], GEOMETRIES[name]
    problem = planes_problem(g, rows, -(-g.outputs // rows), g.channels * g.y.kernel * g.x.kernel)
    tile, cycles = choose_planes(problem, 200, described)
    tiles = list(planes_tiles(problem, described))
    assert cycles == min(planes_cycles(problem, t, 200, described) for t in tiles)
    assert replace(tile, ahead=0) in tiles, "small work stays on one core"
    again = problem.batch * tile.groups(problem) > 8
    assert bool(tile.ahead) == (rows in (1, 4, 8, 16) and not again)
    for t in tiles:
        assert t.vectors == 1 or rows * t.vectors < described.registers
        assert t.lanes <= described.lanes


def test_more_entries_never_cost_less():
    g = GEOMETRIES["matrix"]
    problem = planes_problem(g, 8, 3, 40)
    target = PRESETS["x86-avx2"]
    costs = [choose_planes(problem, entries, target)[1] for entries in (0, 10, 50, 120)]
    assert costs == sorted(costs)
    rows = RowsProblem(1, 4096, 4096, 256, 16, False, Epilogue())
    assert rows_cycles(rows, 1000, target) < rows_cycles(rows, 100_000, target)


@pytest.mark.parametrize("own_columns", [False, True])
@pytest.mark.parametrize(("columns", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "int32")])
def test_every_column_has_an_index(columns, dtype, own_columns):
    weight = np.zeros((20, columns), np.float32)
    at = [0, 1, columns // 2, columns - 2, columns - 1]
    weight[:, at] = RNG.standard_normal((20, len(at)))
    packed = pack_sliced(weight, 8) if own_columns else pack(weight, BlockShape(8))
    problem = RowsProblem(1, columns, 20, packed.indptr.size - 1, 8, own_columns, Epilogue())
    assert problem.index_dtype == dtype
    index = packed.index.astype(problem.index_dtype)
    np.testing.assert_array_equal(index, packed.index)
    tile = RowsTile(1, False)
    lib = compile_all({"main": schedule_rows(rows_kernel(problem, tile), problem, tile)})
    x = RNG.standard_normal((1, columns)).astype(np.float32)
    tables = (packed.indptr, index, packed.data, packed.rows, np.zeros(24, np.float32))
    y = call(lib["main"], x, *tables, np.full((1, 20), np.nan, np.float32))
    np.testing.assert_allclose(y, x @ weight.T.astype(float), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turns", [8, 9])
def test_records_may_prefetch_weights_that_are_walked_often(turns):
    g = ConvGeometry(1, 64, 64, AxisGeometry(1, 1), AxisGeometry(48 * turns, 1))
    problem, target = planes_problem(g, 8, 8, 64), PRESETS["x86-avx512"]
    tile = PlanesTile(16, 3, 1, 1, False)
    found = list(prefetches(problem, tile, target))
    assert found[0] == prefetching(problem, tile, target), "the rule's comes first"
    assert bool(found[0].ahead) == (turns == 8)
    assert {bool(t.ahead) for t in found} == {False, True}


def test_large_work_goes_to_all_cores():
    g = ConvGeometry(1, 512, 512, AxisGeometry(1, 1), AxisGeometry(512, 1))
    problem = planes_problem(g, 8, 64, 512)
    two = replace(PRESETS["x86-avx2"], cores=2)
    assert choose_planes(problem, 20_000, two)[0].parallel
    assert not choose_planes(problem, 20_000, replace(two, cores=1))[0].parallel
    matrix = RowsProblem(1, 4096, 4096, 256, 16, False, Epilogue())
    assert choose_rows(matrix, 100_000, two)[0].parallel
    assert not choose_rows(matrix, 100_000, replace(two, cores=1))[0].parallel


@pytest.mark.parametrize(("own_columns", "least"), [(False, 15_000), (True, 60_000)])
def test_small_work_stays_on_one_core(own_columns, least):
    """Matrix-vector layers with blocks read little but weights: they are shared sooner."""
    two = replace(PRESETS["x86-avx2"], cores=2)
    matrix = RowsProblem(1, 4096, 4096, 512, 8, own_columns, Epilogue())
    shared = {True: [], False: []}
    for entries in range(1000, 60_000, 1000):
        tile, cycles = choose_rows(matrix, entries, two)
        shared[tile.parallel].append(cycles)
    assert max(shared[False]) <= least < min(shared[True])
