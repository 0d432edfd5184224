"""Kernels that walk their columns tile by tile: any tiling computes what one walk computes."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import packed_for, problem_of, random_planes, tables_for

from tvm_pivot.pack import column_tiles
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.pack_layer import panel_tables
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.cost import planes_cycles
from tvm_pivot.schedules.problems import Epilogue, Panel, PlanesTile
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.schedules.x86 import choose_planes
from tvm_pivot.targets import PRESETS, resolve

EPS = float(np.finfo(np.float32).eps)
EPILOGUES = {
    "none": Epilogue(),
    "residual": Epilogue(residual=True),
    "clip": Epilogue(low=0.0, high=1.5),
    "both": Epilogue(residual=True, low=-1.0, high=1.0),
}


def dense(columns, outputs, pixels):
    return ConvGeometry(1, columns, outputs, AxisGeometry(1, 1), AxisGeometry(pixels, 1))


def reference(g, problem, weight, planes, bias, residual):
    """The layer in float64, straight from the planes, and the sum of the magnitudes."""
    pixel = (np.arange(problem.height)[:, None] * problem.pitch + np.arange(problem.width)).ravel()
    sums, magnitudes = [], []
    for group, part in enumerate(np.split(weight.astype(float), g.groups)):
        x = planes[:, g.offsets(group)[:, None] + pixel].astype(float)
        sums.append(np.einsum("oc,ncp->nop", part, x))
        magnitudes.append(np.einsum("oc,ncp->nop", abs(part), abs(x)))
    added = bias[:, None] + residual.reshape(g.batch, g.outputs, -1)
    epilogue = problem.epilogue
    value = np.concatenate(sums, 1) + (added if epilogue.residual else bias[:, None])
    low = -np.inf if epilogue.low is None else epilogue.low
    high = np.inf if epilogue.high is None else epilogue.high
    magnitude = np.concatenate(magnitudes, 1) + abs(bias[:, None])
    return np.clip(value, low, high), magnitude + abs(residual.reshape(magnitude.shape))


def run(g, weight, rows, tile, epilogue, seed=0):
    """Compile and run one tile, and hold it against float64."""
    rng = np.random.default_rng(seed)
    problem = problem_of(g, rows, g.groups * -(-(g.outputs // g.groups) // rows), epilogue)
    packed, more = packed_for(g, problem, weight, tile)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    main = tvm.compile(mod, target=resolve("x86").to_tvm())["main"]
    # Only sums that slide from row to row need the padding.
    anything = rng.standard_normal((g.batch, g.image_floats)).astype(np.float32)
    planes = random_planes(g, rng) if tile.slides else anything
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    residual = rng.standard_normal(problem.output).astype(np.float32)
    tables = tables_for(packed, bias, more)
    arrays = [planes, *tables, *([residual] if epilogue.residual else [])]
    out = np.full(problem.output, np.nan, np.float32)
    tensors = [tvm.runtime.tensor(a) for a in (*arrays, out)]
    want, magnitude = reference(g, problem, weight, planes, bias, residual)
    for _ in range(2):  # what the first call left behind must not matter
        main(*tensors)
        got = tensors[-1].numpy().reshape(want.shape)
        assert np.isfinite(got).all()
        assert np.all(abs(got - want) <= (weight.shape[1] + 4) * EPS * magnitude)


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    kernel = draw(st.sampled_from([1, 1, 3]))
    stride = draw(st.sampled_from([1, 1, 2]))
    pad = draw(st.integers(0, kernel // 2))
    sizes = [draw(st.integers(kernel, 12)) for _ in range(2)]
    y, x = (AxisGeometry(size, kernel, stride, 1, pad, pad) for size in sizes)
    channels, outputs = groups * draw(st.integers(1, 24)), groups * draw(st.integers(1, 20))
    g = ConvGeometry(draw(st.integers(1, 2)), channels, outputs, y, x, groups)
    seed = draw(st.integers(0, 9999))
    rng = np.random.default_rng(seed)
    columns = channels // groups * kernel * kernel
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    weight = rng.standard_normal((outputs, columns)).astype(np.float32)
    weight[rng.random(weight.shape) >= density] = 0
    weight[rng.random(outputs) < draw(st.sampled_from([0.0, 0.3]))] = 0  # empty rows
    weight[:, rng.random(columns) < draw(st.sampled_from([0.0, 0.6]))] = 0  # dead columns
    rows = draw(st.sampled_from([1, 1, 2, 4, 8]))
    problem = problem_of(g, rows, groups * -(-(outputs // groups) // rows))
    whole = [tile for tile in planes_tiles(problem, PRESETS["x86-avx2"]) if not tile.singles]
    tile = draw(st.sampled_from(whole))
    if problem.compact and groups == 1 and draw(st.booleans()):
        tile = replace(tile, panel_pitch=tile.tiles * tile.width)
    tile = replace(
        tile,
        k_tiles=draw(st.integers(1 if tile.panel else 2, columns + 2)),
        stretches=draw(st.integers(1, problem.row_blocks)),
        parallel=draw(st.booleans()),
    )
    return g, weight, rows, tile, EPILOGUES[draw(st.sampled_from(sorted(EPILOGUES)))], seed


@settings(max_examples=80, deadline=None)
@given(cases())
def test_any_tiling_matches_float64(case):
    run(*case)


def unstructured(seed, outputs, columns, density=0.1):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, columns)).astype(np.float32)
    return np.where(rng.random(weight.shape) < density, weight, 0).astype(np.float32)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("panel", [False, True])
@pytest.mark.parametrize("stretches", [1, 3, 7])
def test_large_layers_on_all_threads(panel, stretches, epilogue):
    """Groups overlap (200 = 3 * 64 + 8), and so do stretches of 150 row blocks."""
    lanes = 16 if resolve("x86").lanes == 16 else 8
    tile = PlanesTile(lanes, 4, 1, 1, True, 5, stretches, 4 * lanes if panel else 0)
    run(dense(300, 150, 200), unstructured(1, 150, 300), 1, tile, EPILOGUES[epilogue])


@pytest.mark.parametrize("k_tiles", [2, 3, 16])
def test_gaps_between_rows_on_all_threads(k_tiles):
    axis = AxisGeometry(14, 3, 1, 1, 1, 1)
    g = ConvGeometry(2, 16, 50, axis, axis)
    tile = PlanesTile(8, 4, 4, 7, True, k_tiles, 2)
    run(g, unstructured(2, 50, 144), 1, tile, EPILOGUES["both"])


@pytest.mark.parametrize(("k_tiles", "pitch"), [(1, 16), (3, 16), (16, 24)])
def test_panels_of_layers_with_gaps_on_all_threads(k_tiles, pitch):
    y, x = AxisGeometry(15, 3, 2, 1, 1, 1), AxisGeometry(14, 3, 1, 1, 1, 1)
    g = ConvGeometry(2, 16, 50, y, x)
    vectors = 7 * pitch // 8
    tile = PlanesTile(8, vectors // 2, 2, 7, True, k_tiles, 2, pitch)
    run(g, unstructured(4, 50, 144), 1, tile, EPILOGUES["both"])


@pytest.mark.parametrize(("stride", "width"), [(1, 14), (1, 24), (2, 33)])
@pytest.mark.parametrize("rows", [1, 8])
def test_panels_of_rectangles_on_all_threads(rows, stride, width):
    """Eight columns wide: the last ones overlap others, to the side and below."""
    y, x = AxisGeometry(15, 3, stride, 1, 1, 1), AxisGeometry(width, 3, stride, 1, 1, 1)
    tile = PlanesTile(8, 3, 1, 3, True, 3, 2, panel_pitch=8)
    run(ConvGeometry(2, 16, 50, y, x), unstructured(5, 50, 144), rows, tile, EPILOGUES["both"])


def test_rows_repeated_in_a_block_that_is_not_full_are_added_once():
    tile = PlanesTile(8, 2, 1, 1, False, 4)
    run(dense(40, 5, 32), unstructured(3, 5, 40, 0.5), 4, tile, EPILOGUES["both"])


@given(st.integers(1, 200), st.integers(1, 30), st.sampled_from([1, 4, 9]))
def test_column_tiles_keep_channels_together(channels, tiles, taps):
    tile_of = column_tiles(channels * taps, tiles, taps)
    assert np.all(np.diff(tile_of) >= 0)
    assert tile_of.max() < tiles
    assert np.all(tile_of.reshape(channels, taps) == tile_of[::taps, None])


AXES = st.builds(
    AxisGeometry,
    st.integers(9, 14),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(0, 2),
)


@given(AXES, AXES, st.integers(1, 40), st.integers(1, 12))
def test_panels_hold_every_column_at_a_place_of_its_own(y, x, channels, k_tiles):
    g = ConvGeometry(1, channels, 8, y, x)
    problem = problem_of(g, 1, 8)
    tile = PlanesTile(8, 4, 1, 1, False, k_tiles, 1, 32)
    panel = Panel(problem, tile)
    offset, place = panel_tables(g, problem, tile)
    tile_of = column_tiles(problem.columns, k_tiles, problem.taps)
    assert place.min() >= 0
    assert place.max() <= panel.rows - panel.height + panel.reach
    assert np.unique(tile_of.astype(np.int64) * panel.rows + place).size == problem.columns
    # The line that a column is in, and how far down: together they are the column's offset.
    first = np.minimum(tile_of * panel.channels, channels - panel.channels) * panel.lines
    line, down = first + place // panel.height, place % panel.height
    assert np.array_equal(offset[line] + down * g.pitch, g.offsets())


TARGETS = ["x86-avx512", "x86-avx2", "sapphire-rapids"]


@pytest.mark.parametrize("target", TARGETS)
def test_large_unstructured_layers_are_tiled_and_blocks_of_eight_are_not(target):
    described = PRESETS[target]
    g = dense(3072, 3072, 128)
    unblocked = problem_of(g, 1, 3072)
    tile, cycles = choose_planes(unblocked, 943_718, described)
    assert tile.k_tiles > 1
    plain = [t for t in planes_tiles(unblocked, described) if t.k_tiles == 1 and not t.panel]
    assert cycles < 0.9 * min(planes_cycles(unblocked, t, 943_718, described) for t in plain)
    tile, _ = choose_planes(problem_of(g, 8, 384), 117_964, described)
    assert tile.k_tiles == 1


def test_planes_a_power_of_two_apart_are_copied_to_a_panel_of_all_columns():
    """128 pixels apart, a group's pixels of 3072 planes use a quarter of the sets of level 2."""
    target = PRESETS["x86-avx512"]
    near, far = (dense(3072, 3072, pixels) for pixels in (128, 132))
    tile, _ = choose_planes(problem_of(near, 8, 384), 117_964, target)
    assert tile.panel and tile.k_tiles == 1
    tile, _ = choose_planes(problem_of(far, 8, 384), 117_964, target)
    assert not tile.panel


@pytest.mark.parametrize("target", TARGETS)
def test_no_tile_is_empty(target):
    for columns in (1, 7, 64, 1000, 4608):
        problem = problem_of(dense(columns, 64, 100), 1, 64)
        for tile in planes_tiles(problem, PRESETS[target]):
            assert np.unique(column_tiles(columns, tile.k_tiles, 1)).size == tile.k_tiles


def test_rows_that_are_no_whole_vectors_apart_are_copied_to_a_panel():
    problem = problem_of(dense(1024, 256, 196), 1, 256)
    assert choose_planes(problem, 26_214, PRESETS["sapphire-rapids"])[0].panel


def test_few_groups_of_pixels_are_shared_out_as_stretches_of_rows():
    four = replace(PRESETS["sapphire-rapids"], cores=4)
    problem = problem_of(dense(1024, 1024, 64), 1, 1024)
    tile, _ = choose_planes(problem, 104_857, four)
    assert tile.parallel
    assert tile.stretches * -(-64 // (tile.tiles * tile.width)) % 4 == 0


@pytest.mark.parametrize("height", [8, 16])
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14)])
def test_high_blocks_are_run_as_blocks_of_eight_rows(channels, size, density, height):
    axis = AxisGeometry(size, 3, 1, 1, 1, 1)
    g = ConvGeometry(1, channels, channels, axis, axis)
    described = PRESETS["sapphire-rapids"]
    cycles = {}
    for rows in (16, 8, 4, 2):
        blocks = channels // rows
        # Of blocks of eight, one of sixteen is kept where either half is.
        kept = 1 - (1 - density) ** 2 if rows > height else density
        entries = round(blocks * channels * 9 * kept)
        cycles[rows] = choose_planes(problem_of(g, rows, blocks), entries, described)[1]
    assert min(cycles, key=cycles.get) == 8


def test_a_first_layer_reads_a_panel_that_whole_register_tiles_cover():
    axis = AxisGeometry(224, 7, 2, 1, 3, 3)
    g = ConvGeometry(1, 3, 64, axis, axis)
    problem = problem_of(g, 8, 8)
    tile, _ = choose_planes(problem, 8 * 147, PRESETS["sapphire-rapids"])
    assert tile.panel and tile.tiles * tile.width == tile.group_rows * tile.panel_pitch
    rng = np.random.default_rng(0)
    run(g, rng.standard_normal((64, 147)).astype(np.float32), 8, tile, EPILOGUES["clip"])


def test_a_panel_whose_columns_do_not_fit_level_1_is_not_for_high_blocks():
    axis = AxisGeometry(56, 3, 1, 1, 1, 1)
    problem = problem_of(ConvGeometry(1, 64, 64, axis, axis), 8, 8)
    for tile in planes_tiles(problem, PRESETS["sapphire-rapids"]):
        assert not tile.panel or 4 * 576 * tile.width <= 48 << 10
