"""The kernel family against float64, over every kind of layer it covers."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax

import tvm_pivot

EPS = float(np.finfo(np.float32).eps)
SEEDS = st.integers(0, 10_000)
DENSITIES = st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.7, 1.0])
HEIGHTS = st.sampled_from([1, 2, 4, 8, 16])


def pruned(rng, n, k, rows, density):
    """A weight matrix [n, k] of rows x 1 blocks."""
    mask = np.repeat(rng.random((-(-n // rows), k)) < density, rows, axis=0)[:n]
    return np.where(mask, rng.standard_normal((n, k)), 0).astype(np.float32)


def check(got, want, magnitude, terms):
    """|error| <= c K eps sum |w| |x|: no float32 summation order can be worse."""
    bound = (terms + 4) * EPS * (magnitude + 1e-30)
    worst = np.max(np.abs(got - want) - bound)
    assert worst <= 0, f"error exceeds its bound by {worst:.3e}"


def conv2d_reference(x, weight, stride, pad, dilation, groups):
    """Direct convolution in float64, tap by tap."""
    top, left, bottom, right = pad
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, _, h, w = x.shape
    o, per_group, kh, kw = weight.shape
    oh = (h - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    ow = (w - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    y = np.zeros((n, o, oh, ow))
    for g in range(groups):
        rows = slice(g * (o // groups), (g + 1) * (o // groups))
        channels = x[:, g * per_group : (g + 1) * per_group]
        for i in range(kh):
            for j in range(kw):
                y0, x0 = i * dilation[0], j * dilation[1]
                patch = channels[
                    :,
                    :,
                    y0 : y0 + (oh - 1) * stride[0] + 1 : stride[0],
                    x0 : x0 + (ow - 1) * stride[1] + 1 : stride[1],
                ]
                y[:, rows] += np.einsum("nchw,oc->nohw", patch, weight[rows, :, i, j].astype(float))
    return y


def relax_module(shapes, body):
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            out = builder.emit_output(body(builder, *inputs))
        builder.emit_func_output(out)
    return builder.get()


@st.composite
def conv_cases(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pad = draw(st.tuples(*[st.integers(0, 3)] * 4))
    low = [max(1, r - pad[i] - pad[i + 2]) for i, r in enumerate(reach)]
    return {
        "seed": draw(SEEDS),
        "batch": draw(st.integers(1, 2)),
        "channels": groups * draw(st.integers(1, 9)),
        "outputs": groups * draw(st.integers(1, 20)),
        "size": tuple(low[i] + draw(st.integers(0, 20)) for i in (0, 1)),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "dilation": dilation,
        "pad": pad,
        "groups": groups,
        "rows": draw(HEIGHTS),
        "density": draw(DENSITIES),
        "epilogue": draw(st.sampled_from(["none", "bias", "relu", "residual"])),
    }


def run_here(net, *inputs):
    return net.run(*inputs)


def run_conv(case, target="x86", run=run_here):
    rng = np.random.default_rng(case["seed"])
    n, c, o, g = case["batch"], case["channels"], case["outputs"], case["groups"]
    weight = pruned(rng, o, c // g * np.prod(case["kernel"]), case["rows"], case["density"])
    weight = weight.reshape(o, c // g, *case["kernel"])
    bias = rng.standard_normal(o).astype(np.float32)
    geometry = (case["stride"], case["pad"], case["dilation"], g)
    x = rng.standard_normal((n, c, *case["size"])).astype(np.float32)
    want = conv2d_reference(x, weight, *geometry)
    magnitude = conv2d_reference(np.abs(x), np.abs(weight), *geometry)
    other = rng.standard_normal(want.shape).astype(np.float32)
    kind = case["epilogue"]

    def body(builder, data, residual):
        y = builder.emit(
            relax.op.nn.conv2d(
                data,
                relax.const(weight),
                list(case["stride"]),
                list(case["pad"]),
                list(case["dilation"]),
                g,
            )
        )
        if kind != "none":
            y = builder.emit(relax.op.add(y, relax.const(bias.reshape(1, o, 1, 1))))
        if kind == "residual":
            y = builder.emit(relax.op.add(residual, y))
        return relax.op.nn.relu(y) if kind in ("relu", "residual") else relax.op.abs(y)

    net = tvm_pivot.build(relax_module([x.shape, other.shape], body), target=target)
    got = run(net, x, other)
    if kind != "none":
        want, magnitude = want + bias.reshape(-1, 1, 1), magnitude + np.abs(bias.reshape(-1, 1, 1))
    if kind == "residual":
        want, magnitude = want + other, magnitude + np.abs(other)
    want = np.maximum(want, 0) if kind in ("relu", "residual") else np.abs(want)
    check(got, want, magnitude, weight[0].size)
    return net


CASE = {
    "seed": 1, "batch": 1, "channels": 8, "outputs": 16, "size": (9, 9), "kernel": (3, 3),
    "stride": (1, 1), "dilation": (1, 1), "pad": (1, 1, 1, 1), "groups": 1, "rows": 8,
    "density": 0.3, "epilogue": "relu",
}  # fmt: skip


@settings(max_examples=120)
@given(conv_cases())
@example({**CASE, "density": 0.0})
@example({**CASE, "density": 1.0})
@example({**CASE, "kernel": (1, 1), "pad": (0, 0, 0, 0), "size": (7, 7), "epilogue": "residual"})
@example({**CASE, "kernel": (1, 1), "pad": (0, 0, 0, 0), "stride": (2, 2), "size": (14, 14)})
@example({**CASE, "channels": 24, "outputs": 24, "groups": 24, "size": (30, 17)})
@example({**CASE, "kernel": (1, 1), "pad": (0, 0, 0, 0), "size": (1, 1), "batch": 3})
@example({**CASE, "kernel": (1, 7), "pad": (0, 3, 0, 3), "size": (17, 17)})
@example({**CASE, "pad": (0, 3, 2, 0), "size": (5, 40), "epilogue": "residual"})
@example({**CASE, "kernel": (4, 4), "size": (4, 4), "pad": (0, 0, 0, 0)})
@example({**CASE, "channels": 64, "outputs": 64, "size": (56, 56), "batch": 2, "density": 0.1})
def test_any_convolution_matches_float64(case):
    run_conv(case)


@st.composite
def dense_cases(draw):
    return {
        "seed": draw(SEEDS),
        "inputs": draw(st.sampled_from([1, 1, 2, 3, 5, 7, 8, 12, 16, 17, 40, 100, 129])),
        "columns": draw(st.integers(1, 120)),
        "outputs": draw(st.integers(1, 90)),
        "rows": draw(HEIGHTS),
        "density": draw(DENSITIES),
        "epilogue": draw(st.sampled_from(["none", "bias", "relu", "residual"])),
    }


def run_dense(case, target="x86", leading=(), run=run_here):
    rng = np.random.default_rng(case["seed"])
    m, k, n = case["inputs"], case["columns"], case["outputs"]
    weight = pruned(rng, n, k, case["rows"], case["density"])
    bias = rng.standard_normal(n).astype(np.float32)
    x = rng.standard_normal((*leading, m, k)).astype(np.float32)
    want, magnitude = x @ weight.T.astype(float), np.abs(x) @ np.abs(weight.T).astype(float)
    other = rng.standard_normal(want.shape).astype(np.float32)
    kind = case["epilogue"]

    def body(builder, data, residual):
        y = builder.emit(relax.op.matmul(data, relax.const(np.ascontiguousarray(weight.T))))
        if kind != "none":
            y = builder.emit(relax.op.add(y, relax.const(bias)))
        if kind == "residual":
            y = builder.emit(relax.op.add(y, residual))
        return relax.op.clip(y, -1, 1) if kind in ("relu", "residual") else relax.op.abs(y)

    net = tvm_pivot.build(relax_module([x.shape, other.shape], body), target=target)
    got = run(net, x, other)
    if kind != "none":
        want, magnitude = want + bias, magnitude + np.abs(bias)
    if kind == "residual":
        want, magnitude = want + other, magnitude + np.abs(other)
    want = np.clip(want, -1, 1) if kind in ("relu", "residual") else np.abs(want)
    check(got, want, magnitude, k)
    return net


DENSE = {
    "seed": 1, "inputs": 1, "columns": 100, "outputs": 60, "rows": 8, "density": 0.2,
    "epilogue": "bias",
}  # fmt: skip


@settings(max_examples=120)
@given(dense_cases())
@example({**DENSE, "density": 0.0})
@example({**DENSE, "density": 1.0})
@example({**DENSE, "rows": 1, "columns": 512})
@example({**DENSE, "inputs": 192, "density": 0.0, "epilogue": "residual"})
@example({**DENSE, "inputs": 192, "density": 1.0})
def test_any_dense_layer_matches_float64(case):
    run_dense(case)


def test_leading_dimensions_are_rows():
    run_dense({**DENSE, "inputs": 5, "epilogue": "residual"}, leading=(2, 3))


@pytest.mark.parametrize("case", [CASE, {**CASE, "size": (56, 56)}, {**CASE, "stride": (2, 2)}])
def test_avx2_code_matches_float64(case):
    """The narrower preset runs on any host that this package supports."""
    run_conv(case, target="x86-avx2")
    run_dense({**DENSE, "inputs": 33}, target="x86-avx2")


def test_plans_follow_the_pattern():
    blocks = run_conv({**CASE, "channels": 64, "outputs": 64, "size": (28, 28), "density": 0.1})
    (layer,) = blocks.report.layers
    assert (layer.mode, layer.pattern) == ("sparse", "8x1 blocks")
    assert layer.fill == 1.0
    dense = run_conv({**CASE, "density": 1.0})
    assert dense.report.layers[0].mode == "dense"
    assert "no weight is zero" in dense.report.layers[0].reason


def test_alike_layers_share_a_kernel():
    rng = np.random.default_rng(0)
    weights = [pruned(rng, 64, 64, 8, 0.2) for _ in range(3)]
    for weight in weights:
        weight[:, 0] = weight[:8] = 1.0  # no row or column is dead, so none is dropped

    def body(builder, x):
        for weight in weights:
            matrix = relax.const(np.ascontiguousarray(weight.T))
            x = builder.emit(relax.op.nn.relu(builder.emit(relax.op.matmul(x, matrix))))
        return x

    net = tvm_pivot.build(relax_module([(64, 64)], body))
    assert len({layer.kernel for layer in net.report.layers}) == 1
