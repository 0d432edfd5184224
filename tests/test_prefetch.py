"""Kernels that prefetch their weights compute what those without do."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from planes_oracle import packed_for, problem_of, tables_for

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import pack, pack_sliced
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.block_sparse import BEYOND, planes_kernel, rows_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes, schedule_rows
from tvm_pivot.schedules.choices import planes_space
from tvm_pivot.schedules.isolated_tasks import isolate_tasks
from tvm_pivot.schedules.problems import Epilogue, PlanesTile, RowsProblem, RowsTile
from tvm_pivot.schedules.x86 import choose_planes, choose_rows
from tvm_pivot.targets import PRESETS, resolve


@pytest.mark.parametrize("own_columns", [False, True])
@pytest.mark.parametrize(("rows", "unroll"), [(8, 4), (16, 2), (4, 1)])
@pytest.mark.parametrize("parallel", [False, True])
def test_prefetches_change_nothing(rows, unroll, parallel, own_columns):
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((50, 70)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.8] = 0
    if own_columns:
        packed = pack_sliced(weight, rows, unroll=unroll)
    else:
        packed = pack(weight, BlockShape(rows), unroll=unroll)
    problem = RowsProblem(2, 70, 50, packed.indptr.size - 1, rows, own_columns, Epilogue())
    x = rng.standard_normal((2, 70)).astype(np.float32)
    bias = rng.standard_normal(50).astype(np.float32)
    index = packed.index.astype(problem.index_dtype)
    arrays = (x, packed.indptr, index, packed.data, packed.rows, bias[packed.rows])
    # Far beyond the weights, too: nothing there is read.
    for ahead in (3, 256, 1 << 24):
        tile = RowsTile(unroll, parallel, ahead)
        func = schedule_rows(rows_kernel(problem, tile), problem, tile)
        mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        lib = tvm.compile(mod, target=resolve("x86").to_tvm())
        assert "prefetch" in lib.mod.inspect_source("asm")
        out = tvm.runtime.tensor(np.full((2, 50), np.nan, np.float32))
        lib["main"](*(tvm.runtime.tensor(array) for array in arrays), out)
        want = x @ weight.T.astype(float) + bias
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "vectors", "k_tiles"), [(8, 1, 1), (8, 1, 3), (1, 1, 1), (1, 7, 3)]
)
@pytest.mark.parametrize("ahead", [{"ahead": 4}, {"ahead": 1 << 24}, {"inputs_ahead": BEYOND}])
def test_prefetches_of_planes_change_nothing(ahead, rows, vectors, k_tiles):
    if rows == 1 and "inputs_ahead" in ahead:
        pytest.skip("the sum of a single row fetches no inputs")
    axis = AxisGeometry(14, 3, 1, 1, 1, 1)
    g = ConvGeometry(2, 16, 48, axis, axis)
    rng = np.random.default_rng(1)
    kept = np.repeat(rng.random((48 // rows, 144)) < 0.2, rows, axis=0)
    weight = (rng.standard_normal((48, 144)) * kept).astype(np.float32)
    problem = problem_of(g, rows, 48 // rows)
    # Tasks on all cores: there nothing tells LLVM what a prefetch leaves alone.
    tile = PlanesTile(8, vectors, 14 // vectors, 7, True, k_tiles)
    packed, _ = packed_for(g, problem, weight, tile)
    planes = rng.standard_normal((2, g.image_floats)).astype(np.float32)
    bias = rng.standard_normal(48).astype(np.float32)
    tables = tables_for(packed, bias)
    outputs, stores = [], []
    for one in (tile, replace(tile, **ahead)):
        func = schedule_planes(planes_kernel(problem, one), problem, one)
        func = isolate_tasks(func) if rows == 1 else func
        mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        lib = tvm.compile(mod, target=resolve("x86").to_tvm())
        code = lib.mod.inspect_source("asm")
        assert ("prefetch" in code) == bool(one.ahead or one.inputs_ahead)
        stores.append(len(re.findall(r"vmov[ua]ps\s+%[yz]mm\d+, ", code)))
        out = tvm.runtime.tensor(np.full(problem.output, np.nan, np.float32))
        lib["main"](*map(tvm.runtime.tensor, (planes, *tables)), out)
        outputs.append(out.numpy())
    np.testing.assert_array_equal(*outputs)
    # The sums stay in registers while they are added up; empty ones of a row may be code apart.
    apart = 2 * vectors if rows == 1 else 0
    assert stores[1] <= stores[0] + 4 + apart


def test_only_weights_beyond_the_caches_are_prefetched():
    target = PRESETS["zen4"]
    problem = RowsProblem(1, 25088, 4096, 512, 8, False, Epilogue())
    assert choose_rows(problem, 1_284_505, target)[0].ahead == 256
    assert choose_rows(problem, 1_284_505, PRESETS["sapphire-rapids"])[0].ahead == 96
    assert choose_rows(problem, 1_284_505, target)[0].unroll == 8, "long rows from far"
    assert choose_rows(problem, 20_000, target)[0] == RowsTile(4, target.cores > 1, 0)


def pixels(columns, count):
    return ConvGeometry(1, columns, 512, AxisGeometry(1, 1), AxisGeometry(count, 1))


def test_inputs_are_prefetched_where_level_1_cannot_hold_them():
    intel, amd = PRESETS["sapphire-rapids"], PRESETS["zen4"]
    large, small = (problem_of(pixels(columns, 196), 8, 64) for columns in (1024, 64))
    for target, ahead in ((intel, 8), (amd, 0)):
        assert choose_planes(large, 6500, target)[0].inputs_ahead == ahead
        assert choose_planes(small, 400, target)[0].inputs_ahead == 0
        # Which of them pays is for tuning to say, on all.
        space = list(planes_space(large, target))
        assert {tile.inputs_ahead for tile in space} == {0, 8}
        assert len(set(space)) == len(space)


@pytest.mark.parametrize(("count", "lines"), [(40, 3), (48, 2)])
def test_where_vectors_may_begin_anywhere_one_line_more_is_fetched(count, lines):
    problem = problem_of(pixels(64, count), 8, 64)
    tile = PlanesTile(16, 2, 1, 1, False, inputs_ahead=8)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    assert str(func).count('"pivot_prefetch_level') == lines


def test_a_single_row_fetches_weights_that_are_not_walked_often():
    target = PRESETS["sapphire-rapids"]
    once, often = (problem_of(pixels(512, count), 1, 512) for count in (196, 12544))
    assert choose_planes(once, 26000, target)[0].ahead == 512
    assert choose_planes(often, 26000, target)[0].ahead == 0
    assert choose_planes(once, 26000, target, bands=9)[0].ahead == 0
    assert {tile.inputs_ahead for tile in planes_space(once, target)} == {0}
