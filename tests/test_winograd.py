"""Minimal filtering along the rows of stems: the transforms, kernels, networks, and the rule."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planes_oracle import convolution
from tvm import relax

import tvm_pivot
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.relay_passes.winograd_layers import (
    MOST_CHANNELS,
    TAPS,
    block_problem,
    row_filter,
    winograd_cycles,
    winograd_layer,
)
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.schedules.tile_space import planes_tiles
from tvm_pivot.schedules.winograd import POINTS, RowFilter, transforms
from tvm_pivot.targets import PRESETS, resolve
from tvm_pivot.tuning.tuner import model_tasks

EPS = float(np.finfo(np.float32).eps)
TARGET = replace(PRESETS["x86-avx2"], cores=1)
follow = importlib.import_module("tvm_pivot.relay_passes.follow_in_bands")
kernels = importlib.import_module("tvm_pivot.relay_passes.choose_kernels")


@pytest.mark.parametrize("taps", TAPS)
def test_products_at_points_are_a_filter(taps):
    inputs, weights, products = transforms(taps)
    rng = np.random.default_rng(taps)
    x, w = rng.standard_normal(POINTS), rng.standard_normal(taps)
    got = products @ ((weights @ w) * (inputs @ x))
    np.testing.assert_allclose(got, np.correlate(x, w, "valid"), rtol=0, atol=1e-13)


def layer_of(g, seed):
    rng = np.random.default_rng(seed)
    shape = (g.outputs, g.channels, g.y.kernel, g.x.kernel)
    weight = rng.standard_normal(shape).astype(np.float32)
    return Layer(relax.Var("stem"), "conv2d", shape, weight.reshape(g.outputs, -1), g)


@st.composite
def geometries(draw):
    """Convolutions that a filter of rows can be of, of up to 30 x 30 pixels."""
    axes = []
    for tall in (True, False):
        stride = draw(st.integers(1, 3))
        kernel = draw(st.integers(stride + 1, 4 * stride) if tall else st.integers(1, 5))
        dilation = 1 if tall else draw(st.integers(1, 2))
        reach = (kernel - 1) * dilation
        pads = [draw(st.integers(0, reach)) for _ in range(2)]
        size = draw(st.integers(reach + 1, reach + 26))
        axes.append(AxisGeometry(size, kernel, stride, dilation, *pads))
    channels = draw(st.integers(1, MOST_CHANNELS))
    g = ConvGeometry(draw(st.integers(1, 2)), channels, draw(st.integers(1, 19)), *axes)
    assume(RowFilter(g).rows <= g.y.output and not RowFilter(g).mixed(1, 1, False).direct)
    return g


@given(
    geometries(),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.sampled_from([Epilogue(), Epilogue(low=0.0, high=6.0)]),
    st.sampled_from([1, 2]),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_kernel_computes_the_convolution(g, rows, unfolded, epilogue, cores, data):
    found, seed = RowFilter(g), data.draw(st.integers(0, 999))
    assert found.taps in TAPS
    assume(rows <= g.outputs)
    tiles = data.draw(st.integers(1, g.y.output // found.rows))
    problem = block_problem(found.mixed(tiles, rows, unfolded), rows, found.columns)
    tile = data.draw(st.sampled_from(list(planes_tiles(problem, TARGET))))
    choice = Choice("winograd", rows, tile, keep_all=True, unfolded=unfolded)
    choice = replace(choice, band_rows=tiles * found.rows)
    layer, rng = layer_of(g, seed), np.random.default_rng(seed)
    made = winograd_layer(layer, choice, epilogue, replace(TARGET, cores=cores), None)
    mod = tvm.IRModule({"main": made.make().with_attr("global_symbol", "main")})
    main = tvm.compile(mod, target=resolve("x86").to_tvm())["main"]
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    bias = rng.standard_normal(g.outputs).astype(np.float32)
    arrays = [x, *made.tables(bias), np.full(made.output, np.nan, np.float32)]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    want, magnitude = convolution(g, layer.matrix, x, bias, None, epilogue)
    for _ in range(2):  # what the first call left behind must not matter
        main(*tensors)
        got = tensors[-1].numpy()
        assert np.isfinite(got).all()
        # All inputs of a tile are in the sums of each of its rows.
        bound = (layer.matrix.shape[1] + 40) * EPS * magnitude.max()
        assert np.abs(got - want).max() <= bound


# -- networks


@pytest.fixture
def eager(monkeypatch):
    """Predicts that minimal filtering, and what follows in its bands, take no time."""
    monkeypatch.setattr(follow, "reading_cycles", lambda floats, target: 1e12)
    planes = follow._planes_way
    monkeypatch.setattr(follow, "_planes_way", lambda *a: replace(planes(*a), heights=[]))

    def always(planned, epilogue, target):
        found = row_filter(planned.layer, planned.plan, epilogue, target)
        return None if found is None else winograd_cycles(found, target)[0]

    monkeypatch.setattr(kernels, "choose_winograd", always)


class Filtered(torch.nn.Module):
    """A stem, and a depthwise layer behind it."""

    def __init__(self, stride):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 20, 3, stride, 1)
        self.filter = torch.nn.Conv2d(20, 20, 3, 2, 1, groups=20)

    def forward(self, x):
        return torch.relu(self.filter(torch.nn.functional.relu6(self.stem(x))))


def pooled(kernel, stride, pad, *pool):
    conv = torch.nn.Conv2d(3, 20, kernel, stride, pad)
    return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(*pool))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("model", "size"),
    [
        (pooled(7, 2, 3, 3, 2, 1), 63),
        (pooled(7, 2, 3, 3, 2, 1), 96),
        (pooled(3, 1, 1, 2, 2), 41),
        (pooled(5, 2, 0, 3, 1, 1), 50),
        (Filtered(1), 37),
        (Filtered(2), 60),
    ],
)
def test_a_stem_with_what_follows_it_is_the_same_network(eager, model, size, threads):
    torch.manual_seed(size)
    x = torch.randn(2, 3, size, size + 3)
    exported = torch.export.export(model.eval(), (x,))
    session = tvm_pivot.build(exported, threads=threads, tuned=False)
    assert "winograd" in session.report.layers[0].kernel
    if len(session.report.layers) > 1:
        assert session.report.layers[1].kernel == ""
    with torch.no_grad():
        want = model(x).numpy()
    assert np.abs(session.run(x) - want).max() <= 1e-5 * np.abs(want).max()


# -- the rule


def stem(channels=3, outputs=64, kernel=7, stride=2, size=224, groups=1):
    axis = AxisGeometry(size, kernel, stride, 1, kernel // 2, kernel // 2)
    return ConvGeometry(1, channels, outputs, axis, axis, groups)


def filter_of(g, preset="x86-avx512", epilogue=None, density=1.0):
    """What the rule makes of a layer."""
    layer = layer_of(replace(g, channels=g.channels // g.groups), 0)
    matrix = layer.matrix * (np.random.default_rng(1).random(layer.matrix.shape) < density)
    layer = replace(layer, geometry=g, matrix=matrix)
    target = replace(PRESETS[preset], cores=1)
    plan = plan_layer(layer, target, sparse=True).plan
    return row_filter(layer, plan, epilogue or Epilogue(low=0.0), target), plan, target


@pytest.mark.parametrize("preset", ["x86-avx512", "x86-avx2", "sapphire-rapids"])
def test_stems_of_many_taps_are_filtered_by_rows(preset):
    found, plan, target = filter_of(stem(), preset)
    choice, cycles = winograd_cycles(found, target)
    assert (found.taps, found.rows, choice.form) == (4, 5, "winograd")
    assert choice.band_rows % found.rows == 0
    assert cycles < 0.8 * plan.cycles


def test_small_filters_are_not_worth_it():
    found, plan, target = filter_of(stem(kernel=3, stride=1))
    assert found is not None
    assert winograd_cycles(found, target)[1] > 0.9 * plan.cycles


@pytest.mark.parametrize(
    "case",
    [
        {"g": stem(channels=16)},
        {"g": stem(channels=4, groups=2)},
        {"g": stem(kernel=1, stride=1, size=16)},
        {"g": stem(kernel=11, stride=2)},
        {"g": stem(size=8)},
        {"g": replace(stem(), x=AxisGeometry(224, 1))},
        {"g": stem(), "density": 0.1},
        {"g": stem(), "epilogue": Epilogue(residual=True)},
        {"g": stem(), "preset": "cortex-a76"},
    ],
)
def test_what_is_no_filter_of_few_channels(case):
    assert filter_of(**case)[0] is None


def test_filtered_stems_are_no_tasks():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7, 2, 3), torch.nn.Conv2d(64, 8, 1))
    exported = torch.export.export(model.eval(), (torch.randn(1, 3, 96, 96),))
    tasks = model_tasks(exported, resolve("x86-avx512"))
    assert [task.shape for task in tasks] == [(8, 64, 1, 1)]
