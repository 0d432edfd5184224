"""Whole networks whose channel groups are all given random orders, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from channel_orders import shuffles
from relax_nets import f32, inputs_for, make, normal, run
from test_networks import Case, assert_close, run_onnxruntime
from test_networks import inputs_for as network_inputs
from tvm import relax
from tvm.ir import Expr, IRModule

from benchmarks import zoo
from tvm_pivot import build
from tvm_pivot.importer import import_model
from tvm_pivot.relay_passes.apply_permutations import apply_permutations
from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.channel_groups import find_channel_groups
from tvm_pivot.report import Report

# How many groups are free. The state of the recurrent ones is their result; transposes are those
# of a batch that the kernels read as columns.
CASES = (
    (Case("resnet50", "8x1@0.1", image=64), 37, 0),
    (Case("resnet18", "1x1@0.1", image=64), 12, 0),
    (Case("mobilenet_v1", "8x1@0.1", image=64), 14, 0),
    (Case("mobilenet_v2", "4x1@0.2", image=64), 25, 0),
    (Case("bert2", "16x1@0.1", length=32), 52, 0),
    (Case("mlp", "8x1@0.1"), 2, 2),
    (Case("mlp_b1", "1x1@0.1"), 2, 0),
    (Case("lstm", "8x1@0.1", length=4), 0, 0),
    (Case("gru", "8x1@0.1", length=4), 0, 0),
    (Case("resnet20_cifar", "8x1@0.2"), 12, 0),
)


def assert_nothing_added(report: Report, transposes: int = 0) -> None:
    """No gather, and no transposes but so many, stand in the graph that were not in the model."""
    model, compiled = report.model_moves, report.compiled_moves
    assert model is not None and compiled is not None
    assert compiled.gathers <= model.gathers
    assert compiled.transposes <= model.transposes + transposes


@pytest.mark.parametrize(("case", "free", "transposes"), CASES, ids=lambda c: str(c))
def test_network_in_a_random_order(
    case: Case, free: int, transposes: int, request: pytest.FixtureRequest
) -> None:
    if case.name.endswith("_cifar"):
        request.getfixturevalue("shared_data")
    path = zoo.load(case.name, case.variant, image=case.image, length=case.length)
    groups = find_channel_groups(canonicalize(import_model(path).mod))
    assert len(groups.free) == free
    net = build(apply_permutations(groups, shuffles(groups)))
    x = network_inputs(case)[0]
    assert_close(net.run(x), run_onnxruntime(path, x))
    assert_nothing_added(net.report, transposes)


def densely_connected() -> IRModule:
    """Two stages of layers that read all before them, as in DenseNet."""

    def conv(bb: relax.BlockBuilder, x: Expr, rows: int, columns: int, taps: int) -> Expr:
        w = normal(rows, columns, taps, taps) / np.float32(taps * np.sqrt(columns))
        w *= np.random.default_rng(rows * columns).random((rows, columns, 1, 1)) < 0.3
        return bb.emit(relax.op.nn.conv2d(x, f32(w), padding=taps // 2))

    def norm(bb: relax.BlockBuilder, x: Expr, channels: int) -> Expr:
        x = bb.emit(relax.op.multiply(x, f32(normal(channels, 1, 1))))
        return bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(x, f32(normal(channels, 1, 1))))))

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        x, channels = conv(bb, x, 16, 3, 3), 16
        for _ in range(2):
            for _ in range(3):
                new = conv(bb, norm(bb, x, channels), 32, channels, 1)
                new = conv(bb, norm(bb, new, 32), 8, 32, 3)
                x, channels = bb.emit(relax.op.concat([x, new], 1)), channels + 8
            x = conv(bb, norm(bb, x, channels), channels // 2, channels, 1)
            x, channels = bb.emit(relax.op.nn.avg_pool2d(x, (2, 2), (2, 2))), channels // 2
        y = bb.emit(relax.op.mean(norm(bb, x, channels), [2, 3]))
        return bb.emit(relax.op.matmul(y, f32(normal(channels, 10))))

    return make(body, (1, 3, 16, 16))


def gated() -> IRModule:
    """A GRU-like cell over four steps, and a layer that reads its last state."""
    size = 24
    recurrent = f32(normal(size, 2 * size) / np.float32(np.sqrt(size)))

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        inputs = bb.emit(relax.op.matmul(x, f32(normal(12, 2 * size))))
        h: Expr = f32(np.zeros((1, size)))
        for t in range(4):
            z = bb.emit(relax.op.strided_slice(inputs, [0], [t], [t + 1]))
            z = bb.emit(relax.op.add(z, bb.emit(relax.op.matmul(h, recurrent))))
            gate, new = (
                bb.emit(relax.op.strided_slice(z, [1], [k * size], [k * size + size]))
                for k in range(2)
            )
            step = bb.emit(relax.op.subtract(bb.emit(relax.op.tanh(new)), h))
            step = bb.emit(relax.op.multiply(bb.emit(relax.op.sigmoid(gate)), step))
            h = bb.emit(relax.op.add(h, step))
        return bb.emit(relax.op.matmul(h, f32(normal(size, 5))))

    return make(body, (4, 12))


@pytest.mark.parametrize(("net", "free"), [(densely_connected, 15), (gated, 1)])
def test_hand_made_network_in_a_random_order(net: Callable[[], IRModule], free: int) -> None:
    mod = net()
    groups = find_channel_groups(canonicalize(mod))
    assert len(groups.free) == free
    session = build(apply_permutations(groups, shuffles(groups)))
    inputs = inputs_for(mod)
    assert_close(session.run(*inputs), tuple(run(mod, *inputs)))
    assert_nothing_added(session.report)
