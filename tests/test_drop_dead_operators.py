"""Which operators constant and unread channels pass, and which they do not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from dead_channels import bias, dense, dropped, flatten, kept, relu, weights
from relax_nets import (
    add,
    chained,
    conv,
    f32,
    normal,
)
from tvm import relax
from tvm.ir import Expr

# --- between layers -----------------------------------------------------------------------------

BETWEEN: dict[str, tuple[Callable[[Expr], Expr], bool]] = {
    # (operator between the two layers, whether a constant channel of 0.5 passes it)
    "gelu": (lambda x: relax.op.nn.gelu(x), True),
    "silu": (lambda x: relax.op.nn.silu(x), True),
    "clip": (lambda x: relax.op.clip(x, 0.1, 0.3), True),
    "leaky relu": (lambda x: relax.op.nn.leakyrelu(x, 0.1), True),
    "prelu": (lambda x: relax.op.nn.prelu(x, f32([0.1, 0.2, 0.3, 0.4])), True),
    "scale and shift": (
        lambda x: relax.op.add(relax.op.multiply(x, f32(normal(4, 1, 1))), f32(1.0)),
        True,
    ),
    "softplus, not worked out": (lambda x: relax.op.nn.softplus(x), False),
    "bias per pixel": (lambda x: relax.op.add(x, f32(normal(6, 6))), False),
    "max pool": (lambda x: relax.op.nn.max_pool2d(x, (3, 3), padding=1), True),
    "max pool with windows that hang over": (
        lambda x: relax.op.nn.max_pool2d(x, (3, 3), (2, 2), ceil_mode=True),
        False,
    ),
    "average pool": (lambda x: relax.op.nn.avg_pool2d(x, (3, 3)), True),
    "average pool, padding not counted": (
        lambda x: relax.op.nn.avg_pool2d(x, (3, 3), padding=1, count_include_pad=False),
        True,
    ),
    "average pool, padding counted": (
        lambda x: relax.op.nn.avg_pool2d(x, (3, 3), padding=1, count_include_pad=True),
        False,
    ),
    "global average": (lambda x: relax.op.mean(x, [2, 3], True), True),
    "mean over channels": (
        lambda x: relax.op.broadcast_to(relax.op.mean(x, [1], True), (2, 4, 6, 6)),
        False,
    ),
    "softmax over channels": (lambda x: relax.op.nn.softmax(x, 1), False),
    "resize": (lambda x: relax.op.image.resize2d(x, (9, 9), layout="NCHW"), True),
    "cubic resize": (
        lambda x: relax.op.image.resize2d(x, (9, 9), layout="NCHW", method="cubic"),
        False,
    ),
    "padding by zeros": (lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1]), False),
    "padding by the constant": (
        lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "constant", 0.5),
        True,
    ),
    "every other pixel": (
        lambda x: relax.op.strided_slice(x, [2, 3], [0, 1], [6, 6], [2, 2]),
        True,
    ),
    "views": (
        lambda x: relax.op.reshape(relax.op.reshape(x, (2, 4, 1, 36)), (2, 4, 6, 6)),
        True,
    ),
    "layout there and back": (
        lambda x: relax.op.permute_dims(
            relax.op.tanh(relax.op.permute_dims(x, [0, 2, 3, 1])), [0, 3, 1, 2]
        ),
        True,
    ),
    "shuffled pixels": (
        lambda x: relax.op.reshape(relax.op.permute_dims(x, [1, 0, 2, 3]), (2, 4, 6, 6)),
        False,
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_constant_channel_between_two_layers(name: str) -> None:
    step, passes = BETWEEN[name]
    first = weights(4, 3, 1, 1, dead_rows=[1])
    _, report = dropped(
        chained(conv(first), bias(0.1, 0.5, 0.2, -0.3), step, conv(weights(5, 4, 1, 1))),
        (2, 3, 6, 6),
    )
    assert kept(report) == ([(3, 3), (5, 3)] if passes else [(4, 3), (5, 4)])


# what needs all channels does not become less because the next layer ignores one
MIXING = ("mean over channels", "softmax over channels", "shuffled pixels")


@pytest.mark.parametrize("name", BETWEEN)
def test_channel_that_nobody_reads_behind_an_operator(name: str) -> None:
    step, _ = BETWEEN[name]
    second = weights(5, 4, 3, 3, dead_columns=[2])
    if name == "global average":
        second = second[:, :, :1, :1]
    _, report = dropped(
        chained(conv(weights(4, 3, 1, 1)), bias(1, 2, 3, 4), step, conv(second)), (2, 3, 6, 6)
    )
    assert kept(report)[0] == ((4, 3) if name in MIXING else (3, 3))


def test_zero_survives_padding_and_counted_averages() -> None:
    _, report = dropped(
        chained(
            conv(weights(4, 3, 1, 1, dead_rows=[1])),
            lambda x: relax.op.nn.avg_pool2d(x, (3, 3), padding=1, count_include_pad=True),
            lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1]),
            relu,
            conv(weights(5, 4, 3, 3), padding=1),
        ),
        (2, 3, 6, 6),
    )
    assert kept(report) == [(3, 3), (5, 3)]


def test_flatten_drops_all_features_of_a_channel() -> None:
    second = weights(5, 36)
    second[:, 18:27] = 0  # channel 2
    _, report = dropped(
        chained(
            conv(weights(4, 3, 1, 1, dead_rows=[0])),
            bias(0.5, 1, 1, 1),
            relu,
            flatten,
            dense(second),
        ),
        (2, 3, 3, 3),
    )
    assert kept(report) == [(2, 3), (5, 18)]


def test_flatten_keeps_a_channel_of_which_one_feature_is_read() -> None:
    second = weights(5, 36)
    second[:, 18:26] = 0  # all but one of channel 2
    _, report = dropped(
        chained(conv(weights(4, 3, 1, 1)), relu, flatten, dense(second)), (2, 3, 3, 3)
    )
    assert kept(report) == [(4, 3), (5, 36)]


def test_features_joined_into_planes() -> None:
    first = weights(16, 3)
    first[4:8] = 0  # plane 1, of one constant
    first[8:12] = 0  # plane 2, of four different ones
    offset = np.concatenate([normal(4), np.full(4, 0.5), [1, 2, 3, 4], normal(4)])
    _, report = dropped(
        chained(
            dense(first),
            add(offset),
            lambda x: relax.op.reshape(x, (2, 4, 2, 2)),
            conv(weights(5, 4, 1, 1)),
        ),
        (2, 3),
    )
    assert kept(report) == [(12, 3), (5, 3)]
