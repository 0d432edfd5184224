"""Convolutions that go band by band with what follows them: kernels, and networks with them."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planes_oracle import convolution, packed_for, tables_for
from planes_oracle import problem_of as planes_problem
from relax_nets import RandomNet, f32, inputs_for, make, run
from tvm.relax import op

import tvm_pivot
from tvm_pivot.bench.watch import Watch
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.schedules.bands import in_bands
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.depthwise_tiles import LEAST_LANES, choose_depthwise
from tvm_pivot.schedules.followers import BandRows, Depthwise, Pool
from tvm_pivot.schedules.isolated_tasks import isolate_tasks
from tvm_pivot.schedules.max_pool import is_supported
from tvm_pivot.schedules.problems import Bands, Epilogue
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.targets import PRESETS, resolve
from tvm_pivot.tuning.tasks import network_tasks

EPS = float(np.finfo(np.float32).eps)
TARGET = PRESETS["x86-avx2"]
follow = importlib.import_module("tvm_pivot.relay_passes.follow_in_bands")


# -- kernels


def followed(follower, x, taps, bias):
    """What the follower makes of float64 images."""
    y, across = follower.y, follower.x
    fill = -np.inf if isinstance(follower, Pool) else 0.0
    pads = [(0, 0), (0, 0), *((a.before, max(0, a.after)) for a in (y, across))]
    x = torch.from_numpy(np.pad(x, pads, constant_values=fill))
    strides = (y.stride, across.stride)
    if isinstance(follower, Pool):
        made = torch.nn.functional.max_pool2d(x, (y.kernel, across.kernel), strides)
    else:
        w = torch.from_numpy(taps.reshape(len(taps), 1, y.kernel, across.kernel).astype(float))
        made = torch.nn.functional.conv2d(
            x, w, torch.from_numpy(bias.astype(float)), strides, 0, (y.dilation, 1), len(taps)
        )
        made = made if follower.epilogue.low is None else made.clamp(min=follower.epilogue.low)
    return made[:, :, : y.output, : across.output].numpy()


def check(g, rows, tile, follower, outputs, epilogue, parallel=False, seed=0):
    """Compare a kernel in bands of so many output rows of its follower with both, one by one."""
    rng = np.random.default_rng(seed)
    height = follower.rows_of(outputs)
    band = g.band(height)
    blocks = -(-g.outputs // rows)
    problem = planes_problem(band, rows, blocks, epilogue)
    weight = rng.standard_normal((g.outputs, problem.columns)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    packed, more = packed_for(g if g.direct else band, problem, weight, tile)
    func = schedule_planes(planes_kernel(problem, tile), problem, tile)
    func = in_bands(func, g, Bands(height, parallel), TARGET.lanes, follower)
    func = isolate_tasks(func) if rows == 1 else func
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    main = tvm.compile(mod, target=resolve("x86").to_tvm())["main"]
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    shape = (g.batch, g.outputs, g.y.output, g.x.output)
    residual = rng.standard_normal(shape).astype(np.float32)
    taps = rng.standard_normal((g.outputs, follower.y.kernel * follower.x.kernel)).astype("float32")
    behind = rng.standard_normal(g.outputs).astype(np.float32)
    arrays = [x.reshape(g.batch, -1) if g.direct else x, *tables_for(packed, bias, more)]
    arrays += [taps, behind] if follower.tables else []
    if epilogue.residual:
        arrays.append(residual.reshape(*shape[:2], -1) if g.direct else residual)
    out = (g.batch, g.outputs, follower.y.output, follower.x.output)
    tensors = [tvm.runtime.tensor(a) for a in (*arrays, np.full(out, np.nan, np.float32))]
    value, magnitude = convolution(g, weight, x, bias, residual, epilogue)
    want, bound = followed(follower, value, taps, behind), (problem.columns + 16) * EPS
    if follower.tables:
        scale = followed(
            replace(follower, epilogue=Epilogue(low=0.0)), magnitude, abs(taps), abs(behind)
        )
    else:
        scale = followed(follower, magnitude, taps, behind)
    for _ in range(2):  # what the first call left behind must not matter
        main(*tensors)
        got = tensors[-1].numpy()
        assert np.isfinite(got).all()
        assert np.all(abs(got - want) <= bound * scale)


def behind(draw, size):
    """An axis of a follower on so many pixels."""
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    before = draw(st.integers(0, kernel - 1))
    assume(size + before >= kernel)
    after = draw(st.integers(0, kernel - 1))
    return AxisGeometry(size, kernel, stride, 1, before, after)


@st.composite
def cases(draw):
    axes = []
    direct = draw(st.booleans())
    for _ in range(2):
        kernel, stride = (1, 1) if direct else (draw(st.integers(2, 4)), draw(st.integers(1, 2)))
        pad = draw(st.integers(0, kernel - 1))
        size = draw(st.integers(kernel + 4, 24))
        axes.append(AxisGeometry(size, kernel, stride, 1, pad, pad))
    g = ConvGeometry(
        draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 19)), *axes
    )
    assume(g.direct or g.pitch != g.x.output)
    y, x = behind(draw, g.y.output), behind(draw, g.x.output)
    if draw(st.booleans()):
        assume(is_supported(y, x))
        # Only what the last window needs counts as padding behind.
        y, x = (
            replace(a, after=(a.output - 1) * a.stride + a.kernel - a.size - a.before)
            for a in (y, x)
        )
        follower = Pool(y, x, TARGET.lanes)
    else:
        assume(x.output >= 2 and y.kernel * x.kernel > 1 and y.output > 0)
        if draw(st.booleans()) and y.size + y.before + y.after > 2 * (y.kernel - 1):
            y = replace(y, dilation=2, before=min(2 * y.before, 2 * y.kernel - 2))
        low = draw(st.sampled_from([None, 0.0]))
        follower = Depthwise(y, x, g.outputs, Epilogue(low=low), None)
    fitting = [
        n
        for n in range(1, follower.y.output + 1)
        if follower.rows_of(n) <= g.y.output and n * x.output >= LEAST_LANES
    ]
    assume(fitting)
    outputs = draw(st.sampled_from(fitting))
    if isinstance(follower, Depthwise):
        tile = choose_depthwise(follower.problem(follower.rows_of(outputs)), TARGET)
        follower = replace(follower, tile=tile)
    return g, follower, outputs


@given(
    cases(),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 999),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_follower_in_any_band_computes_both(case, rows, residual, parallel, seed, data):
    g, follower, outputs = case
    epilogue = Epilogue(residual=residual, low=0.0)
    band = g.band(follower.rows_of(outputs))
    problem = planes_problem(band, rows, -(-g.outputs // rows), epilogue)
    assume(problem.compact == g.direct)
    tiles = [t for t in planes_tiles(problem, TARGET) if not (g.direct and t.masked(problem))]
    assume(tiles)
    tile = data.draw(st.sampled_from(tiles))
    check(g, rows, tile, follower, outputs, epilogue, parallel, seed)


@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize("outputs", [1, 3, 8])
def test_the_poolings_of_well_known_networks(kernel, stride, pad, outputs):
    axis = AxisGeometry(32, 3, 1, 1, 1, 1)
    g = ConvGeometry(1, 3, 16, axis, axis)
    count = (32 + 2 * pad - kernel) // stride + 1
    behind = AxisGeometry(32, kernel, stride, 1, pad, (count - 1) * stride + kernel - 32 - pad)
    band = planes_problem(g.band((outputs - 1) * stride + kernel), 8, 2, Epilogue(low=0.0))
    tile = next(t for t in planes_tiles(band, TARGET) if t.group_rows == 1)
    follower = Pool(behind, behind, TARGET.lanes)
    check(g, 8, tile, follower, outputs, Epilogue(low=0.0))


def test_a_band_has_room_for_the_rows_around_the_image():
    axis = AxisGeometry(20, 3, 1, 1, 1, 1)
    follower = Depthwise(axis, axis, 4, Epilogue(), None)
    rows = BandRows(follower, 4, follower.rows_of(5), 20, flat=False)
    assert (rows.outputs, rows.rows, rows.margin) == (5, 7, 1)
    assert int(rows.buffer.ty.shape[2]) == 9  # one above, seven, one below


# -- networks


@pytest.fixture
def eager(monkeypatch):
    """Predicts that reading what left level 2 takes for ever."""
    monkeypatch.setattr(follow, "reading_cycles", lambda floats, target: 1e12)


class Mobile(torch.nn.Module):
    """A stem with a pooling, and a block that widens, filters and narrows."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d
        self.stem = conv(3, 16, 7, 2, 3)
        self.widen, self.filter = conv(16, 40, 1), conv(40, 40, 3, 2, 1, groups=40)
        self.narrow = conv(40, 24, 1)
        with torch.no_grad():
            for layer in (self.widen, self.narrow):
                layer.weight *= torch.rand_like(layer.weight) < 0.4

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
        x = torch.nn.functional.relu6(self.widen(x))
        return self.narrow(torch.nn.functional.relu6(self.filter(x)))


def built(model, x, threads):
    exported = torch.export.export(model.eval(), (x,))
    return tvm_pivot.build(exported, threads=threads, tuned=False)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_with_followers_is_the_same_network(eager, batch, threads):
    torch.manual_seed(batch)
    model, x = Mobile(), torch.randn(batch, 3, 96, 96)
    session = built(model, x, threads)
    layers = {layer.shape: layer for layer in session.report.layers}
    within = layers[40, 1, 3, 3]
    assert within.kernel == ""
    assert within.reason.startswith("computed in the bands of ")
    assert layers[40, 16, 1, 1].kernel != ""
    with torch.no_grad():
        want = model(x).numpy()
    got = session.run(x)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_what_follows_is_no_function_of_its_own(eager):
    session = built(Mobile(), torch.randn(1, 3, 96, 96), 1)
    called = [call.function for call in Watch(session).calls]
    kernels = [layer.kernel for layer in session.report.layers if layer.kernel]
    assert len(kernels) == 3
    assert set(kernels) <= set(called)
    assert not [name for name in called if "pool" in name or "depthwise" in name]


def test_what_stays_in_level_2_is_left_alone():
    session = built(Mobile(), torch.randn(1, 3, 96, 96), 1)
    assert all(layer.kernel for layer in session.report.layers)


def lowered(mod):
    """The module after all phases."""
    state = Compilation(mod, resolve("x86"))
    for phase in PHASES:
        state = phase.run(state)
    return state.mod


def chosen(mod, target):
    """The planned layers of a module once their kernels are chosen."""
    state = Compilation(mod, target)
    for phase in PHASES:
        state = phase.run(state)
        if phase.name == "choose_kernels":
            return state
    raise AssertionError


def stem(size):
    """A stem of 64 outputs and its pooling, of too many channels for minimal filtering."""
    weight = np.random.default_rng(0).standard_normal((64, 5, 7, 7)).astype(np.float32)

    def body(bb, x):
        x = bb.emit(op.nn.conv2d(x, f32(weight), 2, 3))
        x = bb.emit(op.nn.relu(x))
        return op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1))

    return make(body, (1, 5, size, size))


@pytest.mark.parametrize(
    ("preset", "size", "followed"),
    [("sapphire-rapids", 224, True), ("sapphire-rapids", 96, False), ("zen4", 224, False)],
)
def test_the_rule_lets_large_layers_be_followed_where_memory_is_far(preset, size, followed):
    target = replace(PRESETS[preset], l2_bytes=2 << 20)
    state = chosen(stem(size), target)
    (layer,) = state.planned
    assert (layer.handover is not None) == followed
    assert bool(network_tasks(state.mod, state.planned, target)) != followed
    if followed:
        assert layer.handover.follower.outputs_of(layer.choice.band_rows) < 56


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_networks_are_the_same_with_followers(choose: random.Random):
    mod = RandomNet(choose, choose.randrange(1000)).build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "reading_cycles", lambda floats, target: 1e12)
        eager_mod = lowered(mod)
    plain = lowered(mod)
    inputs = inputs_for(mod)
    for got, want in zip(run(eager_mod, *inputs), run(plain, *inputs), strict=True):
        scale = np.abs(want).max(initial=0.0)
        assert np.abs(got - want).max(initial=0.0) <= 1e-5 * scale + 1e-6
