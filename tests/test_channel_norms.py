"""Group norms: channels move within the groups of a norm, and groups of it as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from channel_orders import free, groups_of, shuffles
from relax_nets import chained, conv, f32, normal
from test_channel_networks import assert_nothing_added
from test_networks import assert_close, run_onnxruntime
from torch import nn
from tvm import relax
from tvm.ir import Expr

import tvm_pivot
from tvm_pivot import build
from tvm_pivot.importer import import_model
from tvm_pivot.relay_passes.apply_permutations import apply_permutations
from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.channel_groups import find_channel_groups
from tvm_pivot.relay_passes.graph import static_shape

relu = relax.op.nn.relu


def point(rows: int, columns: int) -> Callable[[Expr], Expr]:
    """A 1x1 convolution."""
    return conv(normal(rows, columns, 1, 1))


def group_norm(channels: int, groups: int) -> Callable[[Expr], Expr]:
    scale, shift = f32(normal(channels)), f32(normal(channels))
    return lambda x: relax.op.nn.group_norm(x, scale, shift, groups, 1, [2, 3])


def spelt_out_norm(bb: relax.BlockBuilder, x: Expr, groups: int) -> Expr:
    """A group norm as ONNX files have it: an instance norm of the groups, then channels' scales."""
    whole = static_shape(x)
    x = bb.emit(relax.op.reshape(x, (whole[0], groups, -1)))
    centred = bb.emit(relax.op.subtract(x, bb.emit(relax.op.mean(x, [2], True))))
    variance = bb.emit(relax.op.add(bb.emit(relax.op.variance(x, [2], True)), f32(0.1)))
    x = bb.emit(relax.op.divide(centred, bb.emit(relax.op.sqrt(variance))))
    x = bb.emit(relax.op.reshape(x, whole))
    x = bb.emit(relax.op.multiply(x, f32(normal(whole[1], 1, 1))))
    return bb.emit(relax.op.add(x, f32(normal(whole[1], 1, 1))))


def spelt_out(groups: int) -> Callable[..., Expr]:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = spelt_out_norm(bb, bb.emit(point(12, 3)(x)), groups)
        return bb.emit(point(4, 12)(bb.emit(relu(y))))

    return body


@pytest.mark.parametrize(
    "body",
    [chained(point(12, 3), group_norm(12, 3), relu, point(4, 12)), spelt_out(3)],
    ids=["group norm", "spelt out"],
)
def test_channels_move_within_the_groups_of_a_norm_and_groups_as_a_whole(
    body: Callable[..., Expr],
) -> None:
    groups = groups_of(body, (2, 3, 5, 5))
    assert sorted(free(groups).values()) == [3, 4, 4, 4]
    assert all([s.side for s in g.sides] == ["rows", "columns"] for g in groups.free)


@pytest.mark.parametrize("groups", [1, 12])
def test_a_norm_of_one_group_or_of_each_channel_ties_nothing(groups: int) -> None:
    for body in (
        chained(point(12, 3), group_norm(12, groups), relu, point(4, 12)),
        spelt_out(groups),
    ):
        assert list(free(groups_of(body, (1, 3, 5, 5))).values()) == [12]


def test_norms_that_group_channels_differently_keep_their_groups_in_place() -> None:
    net = chained(point(12, 3), group_norm(12, 3), relu, group_norm(12, 4), point(4, 12))
    groups = groups_of(net, (1, 3, 5, 5))
    # Of the channels 0-3, 4-7, 8-11 and 0-2, 3-5, 6-8, 9-11, those in the same two groups.
    assert sorted(free(groups).values()) == [2, 2, 3, 3]
    assert all(g.depth == 0 for g in groups.free)


def test_a_norm_with_a_computed_scale_keeps_channels_in_place() -> None:
    def body(bb: relax.BlockBuilder, x: Expr, scale: Expr) -> Expr:
        y = bb.emit(point(12, 3)(x))
        y = bb.emit(relax.op.nn.group_norm(y, scale, f32(normal(12)), 3, 1, [2, 3]))
        return bb.emit(point(4, 12)(y))

    assert not groups_of(body, (1, 3, 5, 5), (12,)).free


def test_what_differs_from_pixel_to_pixel_of_a_group_keeps_channels_in_place() -> None:
    def body(bb: relax.BlockBuilder, x: Expr, z: Expr) -> Expr:
        y = bb.emit(relax.op.reshape(bb.emit(point(12, 3)(x)), (1, 3, 100)))
        means = bb.emit(relax.op.mean(y, [2], True))
        y = bb.emit(relax.op.multiply(y, bb.emit(relax.op.multiply(means, z))))
        return bb.emit(point(4, 12)(bb.emit(relax.op.reshape(y, (1, 12, 5, 5)))))

    assert not groups_of(body, (1, 3, 5, 5), (1, 1, 100)).free


@pytest.mark.parametrize("opset", [17, 21])
def test_group_norms_between_convolutions(opset: int, tmp_path: Path) -> None:
    """Spelt out up to opset 17; channels move within the groups, and groups with each other."""
    rng = np.random.default_rng(opset)
    net = group_norm_net()
    for parameter in net.parameters():
        parameter.data *= torch.from_numpy(rng.random(parameter.shape) < 0.5)
    path = tmp_path / "norms.onnx"
    torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), path, opset_version=opset, dynamo=opset > 17)
    groups = find_channel_groups(canonicalize(import_model(path).mod))
    assert sorted(g.size for g in groups.free) == [4] * 11 + [6]
    compiled = build(apply_permutations(groups, shuffles(groups)))
    x = rng.standard_normal((1, 3, 8, 8)).astype(np.float32)
    expected = run_onnxruntime(path, x)
    assert_close(compiled.run(x), expected)
    assert_nothing_added(compiled.report)
    assert_close(build(net, example_inputs=torch.zeros(1, 3, 8, 8)).run(x), expected)


def group_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.GroupNorm(6, 24),
        nn.ReLU(),
        nn.Conv2d(24, 8, 1),
    ).eval()


@pytest.mark.parametrize("block", ["8x1", "4x4"])
def test_a_network_with_group_norms_is_pruned(block: str) -> None:
    """Blocks of several columns need the order of channels that layers on both sides share."""
    torch.manual_seed(0)
    net = group_norm_net()
    x = torch.randn(1, 3, 8, 8)
    report = tvm_pivot.prune(net, density=0.25, block=block, example_inputs=x)
    assert report.density == pytest.approx(0.25, abs=0.01)
    with torch.no_grad():
        assert_close(build(net, example_inputs=x).run(x.numpy()), (net(x).numpy(),))
