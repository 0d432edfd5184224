"""Kernels that write over the residual they add: the same bits, and only where none is lost."""

import random
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import packed_for, tables_for
from planes_oracle import problem_of as planes_problem
from relax_nets import inputs_for, make, run
from tvm import relax

import tvm_pivot
from tvm_pivot import compiler
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.relay_passes.graph import MAIN, live_bindings, op_name
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.problems import Epilogue, PlanesTile
from tvm_pivot.schedules.store_once import STORES_ONCE, store_freely, store_over
from tvm_pivot.targets import PRESETS, resolve

RNG = np.random.default_rng(5)
EPS = float(np.finfo(np.float32).eps)
HEIGHT, WIDTH, CHANNELS = 8, 12, 16  # pixels in whole vectors, rows in whole blocks
SHAPE = (1, CHANNELS, HEIGHT, WIDTH)


# -- kernels


def dense(columns, outputs, pixels, batch=1):
    return ConvGeometry(batch, columns, outputs, AxisGeometry(1, 1), AxisGeometry(pixels, 1))


def image(size, outputs):
    y, x = (AxisGeometry(s, 3, 1, 1, 1, 1) for s in size)
    return ConvGeometry(1, 5, outputs, y, x)


def problem_of(g, rows):
    return planes_problem(g, rows, -(-g.outputs // rows), Epilogue(True, low=0.0))


def both_forms(g, rows, tile):
    """What a kernel stores beside its residual and over it, and the layer in float64."""
    rng = np.random.default_rng(g.image_floats)
    problem = problem_of(g, rows)
    weight = rng.standard_normal((g.outputs, problem.columns)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    packed, more = packed_for(g, problem, weight, tile)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    assert func.attrs.get(STORES_ONCE)
    forms = {"beside": store_freely(func), "once": func, "over": store_over(func)}
    mod = tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in forms.items()})
    lib = tvm.compile(mod, target=resolve("x86").to_tvm())
    planes = rng.standard_normal((g.batch, g.image_floats)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    residual = rng.standard_normal(problem.output).astype(np.float32)
    tables = tables_for(packed, bias, more)
    found = []
    for name in forms:
        arrays = [planes, *tables, residual.copy()]
        if name != "over":
            arrays.append(np.full(problem.output, np.nan, np.float32))
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        lib[name](*tensors)
        found.append(tensors[-1].numpy())
    pixel = (np.arange(problem.height)[:, None] * problem.pitch + np.arange(problem.width)).ravel()
    x = planes[:, g.offsets()[:, None] + pixel].astype(float)
    added = bias[:, None].astype(float), residual.reshape(g.batch, g.outputs, -1).astype(float)
    want = np.maximum(np.einsum("oc,ncp->nop", weight.astype(float), x) + sum(added), 0)
    scale = np.einsum("oc,ncp->nop", abs(weight), abs(x)) + sum(map(abs, added))
    return found, want, (problem.columns + 4) * EPS * scale


def check_forms(g, rows, tile):
    (beside, once, over), want, bound = both_forms(g, rows, tile)
    assert np.all(abs(beside.reshape(want.shape) - want) <= bound)
    assert np.array_equal(beside, once)
    assert np.array_equal(beside, over)


@st.composite
def tiles(draw):
    """Layers whose rows fill their blocks, with tiles that cover them by whole vectors."""
    rows = draw(st.sampled_from([1, 2, 4, 8]))
    outputs = rows * draw(st.integers(1, 6))
    lanes = draw(st.sampled_from([4, 8]))
    if draw(st.booleans()):
        g = dense(draw(st.integers(1, 20)), outputs, lanes * draw(st.integers(1, 15)))
        vectors = draw(st.integers(1, min(3, g.x.output // lanes)))
        most = g.x.output // (lanes * vectors)
        tile = PlanesTile(lanes, vectors, draw(st.integers(1, most)), 1, False)
    else:
        g = image((draw(st.integers(2, 11)), lanes * draw(st.integers(1, 3))), outputs)
        group = draw(st.integers(1, g.y.output))
        vectors = draw(st.integers(1, 3))
        pixels = (group - 1) * g.pitch + g.x.output
        tile = PlanesTile(lanes, vectors, -(-pixels // (lanes * vectors)), group, False)
    problem = problem_of(g, rows)
    blocks = [s for s in range(1, problem.row_blocks + 1) if problem.row_blocks % s == 0]
    if draw(st.booleans()):
        k_tiles, stretches = draw(st.integers(2, 4)), draw(st.sampled_from(blocks))
        pitch = 0
        if draw(st.booleans()):
            whole = tile.tiles * tile.width if problem.compact else g.x.output
            pitch = whole if problem.compact else draw(st.sampled_from([lanes, whole]))
            if pitch < whole:  # rectangles of whole register tiles
                tile = replace(tile, vectors=1)
            tile = replace(tile, tiles=-(-tile.group_rows * pitch // tile.width))
        tile = replace(tile, k_tiles=k_tiles, stretches=stretches, panel_pitch=pitch)
    return g, rows, replace(tile, parallel=draw(st.booleans()))


@settings(max_examples=20, deadline=None)
@given(tiles())
def test_over_the_residual_is_the_same_as_beside_it(case):
    check_forms(*case)


@pytest.mark.parametrize("k_tiles", [1, 3])
def test_overlapping_groups_of_many_tasks_add_once(k_tiles):
    tile = PlanesTile(8, 3, 1, 1, True, k_tiles)
    check_forms(dense(64, 128, 8 * (3 * 20 + 1), batch=2), 4, tile)


@pytest.mark.parametrize(("height", "width"), [(8, 32), (7, 24), (9, 40)])
def test_rectangles_that_overlap_on_both_axes_add_once(height, width):
    tile = PlanesTile(8, 4, 1, 2, True, 3, 2, panel_pitch=16)
    check_forms(image((height, width), 8), 4, tile)


@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512"])
def test_a_part_of_a_vector_or_of_a_stretch_is_not_guarded(target):
    lanes = PRESETS[target].lanes
    whole = PlanesTile(lanes, 2, 1, 1, False)
    cases = [
        (dense(9, 8, 5 * lanes), whole, True),
        (dense(9, 8, 5 * lanes + 1), whole, False),
        (image((6, 2 * lanes), 8), replace(whole, tiles=4, group_rows=4), True),
        (image((6, 2 * lanes + 1), 8), replace(whole, tiles=4, group_rows=4), False),
        (image((6, 3 * lanes), 8), replace(whole, group_rows=2, panel_pitch=lanes), True),
        (image((6, 3 * lanes + 1), 8), replace(whole, group_rows=2, panel_pitch=lanes), False),
        (dense(9, 8, 4 * lanes), replace(whole, k_tiles=2, stretches=2), True),
        (dense(9, 12, 4 * lanes), replace(whole, k_tiles=2, stretches=2), False),
    ]
    for g, tile, marked in cases:
        problem = problem_of(g, 4)
        plain = replace(problem, epilogue=Epilogue())
        assert bool(_marked(problem, tile)) == marked
        assert not _marked(plain, tile)


def _marked(problem, tile):
    return schedule_planes(planes_kernel(problem, tile), problem, tile).attrs.get(STORES_ONCE)


# -- networks


def conv(builder, x, outputs=CHANNELS, kernel=1):
    weight = RNG.standard_normal((outputs, int(x.ty.shape.values[1]), kernel, kernel))
    weight = (weight / np.sqrt(weight[0].size)).astype("float32")
    return builder.emit(relax.op.nn.conv2d(x, relax.const(weight), 1, kernel // 2))


def block(builder, x, residual, kernel=1):
    total = builder.emit(relax.op.add(conv(builder, x, kernel=kernel), residual))
    return builder.emit(relax.op.nn.relu(total))


LAYERS = ("conv2d", "dense")


def in_place(mod, names=LAYERS, target=None):
    """How many calls of the compiled module write in place, of functions of such names."""
    state = Compilation(mod, target or resolve("x86"))
    for phase in PHASES:
        state = phase.run(state)
    values = [value for _, value in live_bindings(state.mod[MAIN])]
    over = [value for value in values if op_name(value) == "call_tir_inplace"]
    return sum(any(name in value.args[0].name_hint for name in names) for value in over)


def results(mod, inputs, monkeypatch=None):
    """Outputs of the built network; with a `monkeypatch`, built without writing in place."""
    if monkeypatch is None:
        out = tvm_pivot.build(mod).run(*inputs)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(compiler, "PHASES", PHASES[:-1])
            out = tvm_pivot.build(mod).run(*inputs)
    return out if isinstance(out, tuple | list) else [out]


def check_network(mod, monkeypatch):
    inputs = inputs_for(mod)
    ours, plain = results(mod, inputs), results(mod, inputs, monkeypatch)
    for mine, other, want in zip(ours, plain, run(mod, *inputs), strict=True):
        assert np.array_equal(mine, other)
        np.testing.assert_allclose(mine, want, rtol=1e-3, atol=1e-4)


def dead_after(b, x):
    y = conv(b, x)
    return block(b, conv(b, y), y)


def dead_after_views(b, x):
    y = conv(b, x)
    flat = b.emit(relax.op.reshape(y, (1, CHANNELS, HEIGHT * WIDTH, 1)))
    z = b.emit(relax.op.reshape(conv(b, flat), SHAPE))
    return block(b, z, b.emit(relax.op.reshape(flat, SHAPE)))


def chain(b, x):
    y = conv(b, x)
    for _ in range(3):
        y = block(b, conv(b, y), y)
    return conv(b, y)


def input_itself(b, x):
    return block(b, conv(b, x), x)


def read_later(b, x):
    y = conv(b, x)
    z = block(b, conv(b, y), y)
    return conv(b, z), conv(b, y, 8)


def read_later_by_a_view(b, x):
    y = conv(b, x)
    flat = b.emit(relax.op.reshape(y, (1, CHANNELS * HEIGHT, WIDTH)))
    z = block(b, conv(b, y), y)
    return conv(b, z), b.emit(relax.op.nn.softmax(flat))


def also_an_output(b, x):
    y = conv(b, x)
    return block(b, conv(b, y), y), y


def also_the_input(b, x):
    y = conv(b, x)
    return block(b, y, y)


@pytest.mark.parametrize("body", [dead_after, dead_after_views, chain])
def test_a_residual_that_nothing_reads_again_is_written_over(body, monkeypatch):
    mod = make(body, SHAPE)
    assert in_place(mod) == (3 if body is chain else 1)
    check_network(mod, monkeypatch)


@pytest.mark.parametrize(
    "body", [input_itself, read_later, read_later_by_a_view, also_an_output, also_the_input]
)
def test_a_residual_that_something_else_sees_is_kept(body, monkeypatch):
    mod = make(body, SHAPE)
    assert in_place(mod) == 0
    check_network(mod, monkeypatch)


def test_a_kernel_with_one_call_that_must_not_is_left_alone(monkeypatch):
    def body(b, x):
        y = conv(b, x)
        z = block(b, conv(b, y), y)
        return block(b, conv(b, z), z), z

    mod = make(body, SHAPE)
    assert in_place(mod) == 0
    check_network(mod, monkeypatch)


@pytest.mark.parametrize(
    ("cores", "l2_bytes", "count"), [(1, 2 << 20, 1), (2, 2 << 20, 0), (2, 64 << 10, 1)]
)
def test_a_residual_that_all_cores_hold_is_kept(cores, l2_bytes, count):
    def body(b, x):
        y = conv(b, x, 256)
        return b.emit(relax.op.add(conv(b, conv(b, y, 256), 256), y))

    target = replace(PRESETS["sapphire-rapids"], cores=cores, l2_bytes=l2_bytes)
    assert in_place(make(body, (1, 256, 8, 8)), target=target) == count


def test_rows_that_stand_in_two_blocks_are_not_added_twice(monkeypatch):
    def body(b, x):
        y = conv(b, x, 13)
        total = b.emit(relax.op.add(conv(b, conv(b, y), 13), y))
        return b.emit(relax.op.nn.relu(total))

    mod = make(body, SHAPE)
    assert in_place(mod) == 0
    check_network(mod, monkeypatch)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks_of_additions(seed, monkeypatch):
    """The memory planner gives memory away as soon as it thinks nobody needs it."""
    rng = random.Random(seed)

    def body(b, x):
        values = [x, conv(b, x)]
        for _ in range(7):
            source, other = rng.choice(values[-3:]), rng.choice(values[-4:])
            kernel = rng.choice([1, 1, 3])
            plain = rng.random() < 0.3
            new = conv(b, source, kernel=kernel) if plain else block(b, source, other, kernel)
            values.append(new)
        return values[-rng.randint(1, 2) :]

    check_network(make(body, SHAPE), monkeypatch)
