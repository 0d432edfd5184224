"""Depthwise convolutions, which have a kernel of their own, against float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels import SEEDS, check, relax_module
from tvm import relax

import tvm_pivot
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.depthwise_tiles import (
    choose_depthwise,
    depthwise_problem,
    share_depthwise,
)
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.targets import PRESETS, missing_features, needed_features, resolve

HOST = replace(resolve("x86"), cores=2)
TARGETS = [HOST, PRESETS["x86-avx2"], replace(HOST, cores=1, lanes=4)]
TARGETS = [target for target in TARGETS if not missing_features(needed_features(target))]


@st.composite
def cases(draw):
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    low = [max(1, r - pad[i] - pad[i + 2]) for i, r in enumerate(reach)]
    return {
        "seed": draw(SEEDS),
        "batch": draw(st.integers(1, 2)),
        "channels": draw(st.integers(2, 4)),
        "multiplier": draw(st.integers(1, 3)),
        "size": tuple(low[i] + draw(st.integers(0, 40)) for i in (0, 1)),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 2))),
        "dilation": dilation,
        "pad": pad,
        "epilogue": draw(st.sampled_from(["none", "bias", "relu6", "residual"])),
        "target": draw(st.integers(0, len(TARGETS) - 1)),
    }


def run(case):
    """Build and run one convolution, check it, and return the kernels it ran."""
    rng = np.random.default_rng(case["seed"])
    channels, outputs = case["channels"], case["channels"] * case["multiplier"]
    weight = rng.standard_normal((outputs, 1, *case["kernel"])).astype(np.float32)
    bias = rng.standard_normal((1, outputs, 1, 1)).astype(np.float32)
    x = rng.standard_normal((case["batch"], channels, *case["size"])).astype(np.float32)
    top, left, bottom, right = case["pad"]

    def convolved(x, weight):
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right))).astype(np.float64)
        return torch.conv2d(
            torch.tensor(padded),
            torch.tensor(weight.astype(np.float64)),
            stride=case["stride"],
            dilation=case["dilation"],
            groups=channels,
        ).numpy()

    want, magnitude = convolved(x, weight), convolved(np.abs(x), np.abs(weight))
    other = rng.standard_normal(want.shape).astype(np.float32)
    kind = case["epilogue"]

    def body(builder, data, residual):
        geometry = (list(case["stride"]), list(case["pad"]), list(case["dilation"]), channels)
        y = builder.emit(relax.op.nn.conv2d(data, relax.const(weight), *geometry))
        if kind != "none":
            y = builder.emit(relax.op.add(y, relax.const(bias)))
        if kind == "residual":
            y = builder.emit(relax.op.add(y, residual))
        return relax.op.clip(y, 0, 6) if kind == "relu6" else y

    target = TARGETS[case["target"]]
    net = tvm_pivot.build(relax_module([x.shape, other.shape], body), target=target)
    if kind != "none":
        want, magnitude = want + bias, magnitude + np.abs(bias)
    if kind == "residual":
        want, magnitude = want + other, magnitude + np.abs(other)
    want = np.clip(want, 0, 6) if kind == "relu6" else want
    check(net.run(x, other), want, magnitude, weight[0].size)
    return [layer.kernel for layer in net.report.layers]


CASE = {
    "seed": 1, "batch": 1, "channels": 3, "multiplier": 1, "size": (14, 14), "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pad": (1, 1, 1, 1), "epilogue": "relu6", "target": 0,
}  # fmt: skip
MANY_ROWS = {**CASE, "size": (61, 9), "epilogue": "residual"}


@settings(max_examples=50)
@given(cases())
@example(MANY_ROWS)
@example({**MANY_ROWS, "target": 1})
@example({**CASE, "size": (2, 33), "kernel": (1, 5), "pad": (0, 0, 0, 3), "stride": (1, 2)})
@example({**CASE, "size": (40, 3), "stride": (3, 1), "pad": (3, 3, 3, 3)})
@example({**CASE, "size": (1, 16), "pad": (2, 1, 2, 1), "epilogue": "none"})
@example({**CASE, "size": (1, 4), "kernel": (2, 1), "dilation": (2, 1), "pad": (1, 0, 1, 0)})
def test_any_depthwise_convolution_matches_float64(case):
    run(case)


@pytest.mark.parametrize("target", range(len(TARGETS)))
@pytest.mark.parametrize("size, kernel, stride", [(7, 3, 1), (14, 5, 2), (28, 3, 1), (112, 3, 2)])
def test_the_shapes_of_mobile_networks_run_the_kernel(size, kernel, stride, target):
    geometry = {"size": (size, size), "kernel": (kernel, kernel), "stride": (stride, stride)}
    (name,) = run({**CASE, **geometry, "pad": (kernel // 2,) * 4, "target": target})
    assert name.startswith("conv2d_depthwise")


def test_cores_share_the_channels_of_large_layers():
    geometry = ConvGeometry(2, 48, 48, *[AxisGeometry(56, 3, 1, 1, 1, 1)] * 2, groups=48)
    problem = depthwise_problem(geometry, Epilogue(), HOST)
    assert problem is not None
    assert share_depthwise(problem, choose_depthwise(problem, HOST), HOST).parallel
    run({**CASE, "batch": 2, "channels": 48, "size": (56, 56)})


@pytest.mark.parametrize(
    "other",
    [{"stride": (1, 3)}, {"size": (1, 3)}, {"kernel": (8, 8), "size": (30, 30)}],
    ids=["wide stride", "tiny plane", "huge kernel"],
)
def test_what_the_kernel_does_not_do_runs_on_planes(other):
    (name,) = run({**CASE, **other, "target": 1})
    assert "planes" in name


def test_pixels_outside_a_plane_are_never_read():
    """Whatever surrounds a channel, even what is no number, stays out of its results."""
    weight = np.ones((3, 1, 3, 3), np.float32)

    def body(builder, data):
        return relax.op.nn.conv2d(data, relax.const(weight), padding=1, groups=3)

    x = np.full((1, 3, 9, 14), np.nan, np.float32)
    x[0, 1] = 1.0
    net = tvm_pivot.build(relax_module([x.shape], body))
    got = net.run(x)[0, 1]
    assert got[1:-1, 1:-1].tolist() == np.full((7, 12), 9.0).tolist()
    assert np.all(np.isfinite(got))
