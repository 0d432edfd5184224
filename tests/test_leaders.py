"""Convolutions that compute what their bands read, with the layer before: kernels and networks."""

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
from planes_oracle import convolution, drawn_weight, packed_for, problem_of, tables_for
from relax_nets import RandomNet, f32, inputs_for, make, run
from test_followers import built, chosen, lowered
from tvm.relax import op

from tvm_pivot.bench.watch import Watch
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.bands import in_bands
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.followers import Pool
from tvm_pivot.schedules.isolated_tasks import isolate_tasks
from tvm_pivot.schedules.leaders import Leader
from tvm_pivot.schedules.problems import Bands, Epilogue
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.targets import PRESETS, resolve

EPS = float(np.finfo(np.float32).eps)
TARGETS = [PRESETS["x86-avx2"], PRESETS["x86-avx512"]]
lead = importlib.import_module("tvm_pivot.relay_passes.lead_in_bands")


# -- kernels


@st.composite
def axes(draw, size, strides=(1,)):
    """An axis of a convolution on so many pixels."""
    kernel, stride = draw(st.integers(2, 4)), draw(st.sampled_from(strides))
    dilation = draw(st.sampled_from([1, 1, 2]))
    reach = (kernel - 1) * dilation
    before, after = draw(st.integers(0, reach)), draw(st.integers(0, reach))
    assume(size + before + after > reach + 4 * stride)
    return AxisGeometry(size, kernel, stride, dilation, before, after)


@st.composite
def pairs(draw):
    """Two convolutions, one behind the other, the first one with gaps between its rows."""
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    between, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    sizes = [draw(st.integers(9, 24)) for _ in range(2)]
    first = ConvGeometry(batch, channels, between, *(draw(axes(n, (1, 1, 2))) for n in sizes))
    behind = (draw(axes(axis.output)) for axis in (first.y, first.x))
    g = ConvGeometry(batch, between, outputs, *behind)
    assume(first.pitch != first.x.output and g.pitch != g.x.output)
    return first, g


@given(pairs(), st.sampled_from([1, 2, 8]), st.sampled_from([1, 4, 8]), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_pair_in_any_bands_is_both_layers(pair, before_rows, rows, parallel, data):
    first, g = pair
    target = data.draw(st.sampled_from(TARGETS))
    height = data.draw(st.integers(1, g.y.output))
    follower = None
    if data.draw(st.booleans()) and height >= 2 and g.x.output >= 2:
        y, x = (AxisGeometry(axis.output, 2, 2) for axis in (g.y, g.x))
        height -= height % 2
        follower = Pool(y, x, target.lanes)
    band, least = g.band(height), height if follower is None else 2 * follower.outputs_of(height)
    own = first.band(data.draw(st.integers(least, band.y.size)))
    epilogue = Epilogue(low=0.0)
    problems = [
        problem_of(own, before_rows, -(-own.outputs // before_rows), epilogue),
        problem_of(band, rows, -(-g.outputs // rows), epilogue),
    ]
    assume(not any(problem.compact for problem in problems))
    tiles = [data.draw(st.sampled_from(list(planes_tiles(p, target)))) for p in problems]
    weights = [drawn_weight(data.draw, one, r) for one, r in ((own, before_rows), (band, rows))]
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    biases = [rng.standard_normal(one.outputs).astype(np.float32) for one in (first, g)]
    x = rng.standard_normal((g.batch, first.channels, first.y.size, first.x.size)).astype("float32")

    leader = Leader(first, problems[0], tiles[0])
    kernel = schedule_planes(planes_kernel(problems[1], tiles[1]), problems[1], tiles[1])
    bands = Bands(height, parallel, data.draw(st.integers(1, 3)))
    func = in_bands(kernel, g, bands, target.lanes, follower, leader=leader)
    func = isolate_tasks(func) if rows == 1 else func
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    main = tvm.compile(mod, target=resolve("x86").to_tvm())["main"]
    tables = [
        tables_for(packed, bias, more)
        for (packed, more), bias in (
            (packed_for(one, problem, weight, tile), bias)
            for one, problem, weight, tile, bias in zip(
                (own, band), problems, weights, tiles, biases, strict=True
            )
        )
    ]

    middle, size = convolution(first, weights[0], x, biases[0], None, epilogue)
    want, _ = convolution(g, weights[1], middle, biases[1], None, epilogue)
    _, scale = convolution(g, weights[1], size, biases[1], None, epilogue)
    if follower is not None:
        want, scale = (
            torch.nn.functional.max_pool2d(torch.from_numpy(a), 2).numpy() for a in (want, scale)
        )
    bound = (problems[0].columns + problems[1].columns + 16) * EPS * scale
    out = np.full(want.shape, np.nan, np.float32)
    tensors = [tvm.runtime.tensor(a) for a in (x, *tables[1], *tables[0], out)]
    for _ in range(2):  # what the first call left behind must not matter
        main(*tensors)
        got = tensors[-1].numpy()
        assert np.isfinite(got).all()
        assert np.all(abs(got - want) <= bound)


# -- networks


class Stem(torch.nn.Module):
    """Three convolutions and a pooling, as networks begin."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d
        self.layers = torch.nn.Sequential(
            conv(3, 16, 3, 2, 1),
            torch.nn.ReLU(),
            conv(16, 24, 3, 1, 1),
            torch.nn.ReLU6(),
            conv(24, 24, 3, 1, 1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
        )
        with torch.no_grad():
            self.layers[4].weight *= torch.rand(24, 24, 3, 3) < 0.3

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def eager(monkeypatch):
    """Predicts that reading what left level 2 takes for ever, and that little fits there."""
    monkeypatch.setattr(lead, "reading_cycles", lambda floats, target: 1e12)
    tiles = importlib.import_module("tvm_pivot.schedules.cpu_tiles")
    monkeypatch.setattr(tiles, "BAND_SHARE", 0.05)
    tiles.choose_bands.cache_clear()
    yield
    tiles.choose_bands.cache_clear()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_with_leaders_is_the_same_network(eager, batch, threads):
    torch.manual_seed(batch)
    model, x = Stem(), torch.randn(batch, 3, 160, 160)
    session = built(model, x, threads)
    layers = {layer.shape: layer for layer in session.report.layers}
    within = [layer for layer in layers.values() if layer.kernel == ""]
    assert len(within) == 1  # the one in the middle is not both led and leading
    assert within[0].reason.startswith("computed in the bands of ")
    with torch.no_grad():
        want = model(x).numpy()
    got = session.run(x)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    called = [call.function for call in Watch(session).calls]
    assert {layer.kernel for layer in layers.values() if layer.kernel} <= set(called)
    assert not [name for name in called if "pack_planes" in name]


def two(size, outputs=64):
    """A convolution of few channels, and one of many zeros behind it."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((outputs, 3, 3, 3)).astype(np.float32)
    blocks = rng.random((outputs // 8, outputs * 9)) < 0.1
    mask = np.repeat(blocks, 8, axis=0).reshape(outputs, outputs, 3, 3)
    second = np.where(mask, rng.standard_normal(mask.shape), 0).astype(np.float32)

    def body(bb, x):
        x = bb.emit(op.nn.relu(bb.emit(op.nn.conv2d(x, f32(first), 1, 1))))
        return op.nn.relu(bb.emit(op.nn.conv2d(x, f32(second), 1, 1)))

    return make(body, (1, 3, size, size))


@pytest.mark.parametrize(
    ("preset", "size", "led"),
    [("sapphire-rapids", 224, True), ("sapphire-rapids", 56, False), ("zen4", 224, False)],
)
def test_the_rule_joins_large_layers_where_memory_is_far(preset, size, led):
    state = chosen(two(size), replace(PRESETS[preset], l2_bytes=2 << 20))
    first, second = state.planned
    assert (second.lead is not None) == led
    assert (first.within == second.layer.name) == led
    assert second.alone != led


def test_half_precision_goes_layer_by_layer():
    target = replace(PRESETS["sapphire-rapids"], precision="float16")
    assert all(layer.lead is None for layer in chosen(two(224), target).planned)


def test_an_output_that_others_read_is_written():
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(s).astype(np.float32) for s in ((64, 3, 3, 3), (64, 64, 3, 3))]

    def body(bb, x):
        x = bb.emit(op.nn.conv2d(x, f32(weights[0]), 1, 1))
        y = bb.emit(op.nn.conv2d(x, f32(weights[1]), 1, 1))
        return op.add(x, bb.emit(op.nn.relu(y)))

    state = chosen(make(body, (1, 3, 224, 224)), PRESETS["sapphire-rapids"])
    assert all(layer.lead is None and not layer.within for layer in state.planned)


@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_networks_are_the_same_with_leaders(choose: random.Random):
    mod = RandomNet(choose, choose.randrange(1000)).build()
    tiles = importlib.import_module("tvm_pivot.schedules.cpu_tiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lead, "reading_cycles", lambda floats, target: 1e12)
        patch.setattr(tiles, "BAND_SHARE", 0.01)
        tiles.choose_bands.cache_clear()
        eager_mod = lowered(mod)
    tiles.choose_bands.cache_clear()
    plain = lowered(mod)
    inputs = inputs_for(mod)
    for got, want in zip(run(eager_mod, *inputs), run(plain, *inputs), strict=True):
        scale = np.abs(want).max(initial=0.0)
        assert np.abs(got - want).max(initial=0.0) <= 1e-5 * scale + 1e-6
