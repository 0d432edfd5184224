"""Sums that slide by a column between runs of taps, and rows of pixels stored under a mask."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from planes_oracle import packed_for, problem_of
from test_k_tiles import AXES, EPILOGUES, run, unstructured
from tvm import te
from tvm.s_tir import Schedule

from tvm_pivot.pack import column_tiles, unpack
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.pack_layer import panel_runs, panel_tables
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.masked_stores import mask_stores
from tvm_pivot.schedules.problems import MASKED_LANES, Panel, PlanesTile
from tvm_pivot.schedules.row_sum import chains_of
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.schedules.x86 import choose_planes
from tvm_pivot.targets import PRESETS, resolve

needs_masks = pytest.mark.skipif(resolve("x86").lanes < MASKED_LANES, reason="no AVX-512 here")


def square(size, kernel=3, stride=1, channels=10, outputs=24, batch=2):
    axis = AxisGeometry(size, kernel, stride, 1, kernel // 2, kernel // 2)
    return ConvGeometry(batch, channels, outputs, axis, axis)


def check(g, rows, tile, epilogue):
    columns = g.channels * g.y.kernel * g.x.kernel
    weight = np.repeat(unstructured(7, -(-g.outputs // rows), columns, 0.2), rows, axis=0)
    run(g, weight[: g.outputs], rows, tile, EPILOGUES[epilogue])


# Image, kernel, stride, rows of a register tile, K tiles; the last rectangles may overlap others.
MASKED = [
    (28, 3, 1, 14, 2),
    (30, 3, 1, 7, 3),
    (14, 3, 1, 14, 1),
    (28, 3, 2, 7, 2),
    (26, 5, 1, 8, 2),
]


@needs_masks
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("size", "kernel", "stride", "vectors", "k_tiles"), MASKED)
def test_rectangles_of_one_vector_per_row(size, kernel, stride, vectors, k_tiles, epilogue):
    g = square(size, kernel, stride)
    tile = PlanesTile(16, vectors, 1, vectors, True, k_tiles, 2, 16, slides=g.x.halo)
    problem = problem_of(g, 1, 24)
    assert tile.masked(problem) and tile.columns(problem) <= 16 - g.x.halo
    check(g, 1, tile, epilogue)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("k_tiles", [1, 3])
@pytest.mark.parametrize(("size", "pitch"), [(14, 8), (14, 16), (26, 16), (7, 8), (22, 24)])
def test_rows_of_other_panels(size, pitch, k_tiles, rows):
    """Rectangles, whole rows, and rows that lie as in the planes."""
    vectors = max(1, pitch // 8) if rows > 1 else 3 * pitch // 8
    high = 8 * vectors // pitch
    tile = PlanesTile(8, vectors, 2, min(2 * high, size), True, k_tiles, 1, pitch, slides=2)
    check(square(size), rows, tile, "both")


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_shorter_than_a_vector_have_copies_that_begin_in_its_middle(lanes, stride):
    if resolve("x86").lanes < lanes:
        pytest.skip("no vectors of that length here")
    size = (lanes // 2 - 1) * stride
    g = square(size, 3, stride, outputs=16)
    problem = problem_of(g, 1, 16)
    halves = -(-g.y.output // 2)
    tile = PlanesTile(lanes, halves, 1, g.y.output, False, 2, 1, g.pitch, slides=g.x.halo)
    if g.pitch * 2 == lanes:
        _, place = panel_tables(g, problem, tile)
        assert Panel(problem, tile).copies == 2
        assert not np.any(place % 2), "every tap begins at a vector"
    else:
        tile = replace(tile, panel_pitch=lanes, group_rows=halves)
    check(g, 1, tile, "both")


@given(AXES, AXES, st.integers(1, 40), st.integers(1, 12), st.sampled_from([4, 8, 16]))
def test_shared_lines_hold_every_column_at_a_place_of_its_own(y, x, channels, k_tiles, pitch):
    g = ConvGeometry(1, channels, 8, y, x)
    problem = problem_of(g, 1, 8)
    tile = PlanesTile(8, 4, 1, 1, False, k_tiles, 1, pitch, slides=g.x.halo)
    if problem.compact or not tile.slides:
        return
    panel = Panel(problem, tile)
    offset, place = panel_tables(g, problem, tile)
    runs = panel_runs(g, tile)
    tile_of = column_tiles(problem.columns, k_tiles, problem.taps)
    assert place.min() >= 0
    assert place.max() <= panel.rows - panel.height + panel.reach
    assert runs.min() >= 0 and runs.max() <= tile.slides
    keys = (tile_of.astype(np.int64) * tile.runs + runs) * panel.rows + place
    assert np.unique(keys).size == problem.columns
    first = np.minimum(tile_of * panel.channels, channels - panel.channels) * panel.lines
    line, down = first + place // panel.height, place % panel.height
    assert np.array_equal(offset[line] + down * g.pitch + tile.slides - runs, g.offsets())


@given(st.integers(0, 9999), st.integers(1, 6), st.sampled_from([1, 2, 3]), st.integers(1, 14))
def test_unpack_inverts_pack_in_runs(seed, k_tiles, rows, vectors):
    g = square(9, channels=6, outputs=7, batch=1)
    weight = unstructured(seed, 7, 54, 0.3)
    tile = PlanesTile(8, vectors, 1, 1, False, k_tiles, 1, 16, slides=2)
    problem = problem_of(g, rows, -(-7 // rows))
    packed, _ = packed_for(g, problem, weight, tile)
    _, place = panel_tables(g, problem, tile)
    tile_of = column_tiles(54, k_tiles, 9)
    found = unpack(packed, place, tile_of, panel_runs(g, tile))
    assert found.tobytes() == weight.tobytes()
    assert packed.indptr.size == k_tiles * packed.row_blocks * 3 + 1
    assert packed.unroll == (chains_of(vectors) if rows == 1 else 1)


@pytest.mark.parametrize("wanted", [1, 14, 16])
def test_lanes_under_the_mask_are_left_alone(wanted):
    x = te.placeholder((3, 16), "float32", name="x")
    y = te.compute((3, 16), lambda i, j: te.max(x[i, j] + x[i, 0], 0.0), name="Y")
    sch = Schedule(te.create_prim_func([x, y]))
    sch.vectorize(sch.get_loops(sch.get_sblock("Y"))[1])
    func = mask_stores(sch.mod["main"], "Y", wanted)
    lib = tvm.compile(tvm.IRModule({"main": func}), target=resolve("x86").to_tvm())
    data = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    out = tvm.runtime.tensor(np.full((3, 16), np.nan, np.float32))
    lib["main"](tvm.runtime.tensor(data), out)
    want = np.maximum(data + data[:, :1], 0)
    assert np.array_equal(out.numpy()[:, :wanted], want[:, :wanted])
    assert np.isnan(out.numpy()[:, wanted:]).all()


@pytest.mark.parametrize("vectors", [1, 2, 4, 8, 14])
def test_sums_of_a_row_stay_in_registers_in_a_loop_that_is_not_unrolled(vectors):
    g = ConvGeometry(1, 64, 32, AxisGeometry(1, 1), AxisGeometry(8 * vectors, 1))
    problem = problem_of(g, 1, 32)
    tile = PlanesTile(8, vectors, 1, 1, True)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    code = tvm.compile(mod, target=resolve("x86").to_tvm()).mod.inspect_source("asm")
    sums = [part.count("vfmadd") for part in re.split(r"^\S+:|\tj\w+\t", code, flags=re.MULTILINE)]
    assert max(sums) == vectors * chains_of(vectors)


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2", "sapphire-rapids"])
def test_sliding_tiles_are_whole_rows_and_the_rule_takes_one(target):
    described = PRESETS[target]
    for size in (7, 14, 28, 56):
        axis = AxisGeometry(size, 3, 1, 1, 1, 1)
        problem = problem_of(ConvGeometry(1, 256, 256, axis, axis), 1, 256)
        tiles = [tile for tile in planes_tiles(problem, described) if tile.slides]
        assert tiles and all(tile.width % tile.panel_pitch == 0 for tile in tiles)
        tile, _ = choose_planes(problem, 58_982, described)
        assert tile.slides == 2 or tile.lanes < MASKED_LANES
    # Blocks of eight rows multiply more than they load.
    problem = problem_of(ConvGeometry(1, 256, 256, axis, axis), 8, 32)
    assert not any(tile.slides for tile in planes_tiles(problem, described))
