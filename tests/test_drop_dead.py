"""Dead rows and columns: what goes, what has to stay, and that the function stays the same."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from dead_channels import bias, dense, dropped, flatten, kept, relu, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_nets import (
    RandomNet,
    add,
    assert_same_function,
    chained,
    conv,
    f32,
    load_onnx,
    make,
    normal,
    ops,
    times,
)
from tvm import relax
from tvm.ir import Expr

from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.drop_dead import DropReport, LayerDrop, drop_dead
from tvm_pivot.relay_passes.graph import static_shape

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


# --- chains of layers ---------------------------------------------------------------------------


def test_dead_row_moves_into_the_next_bias() -> None:
    out, report = dropped(
        chained(
            conv(weights(4, 3, 3, 3, dead_rows=[1])),
            bias(0.1, 0.7, 0.2, -0.3),
            lambda x: relax.op.sigmoid(x),
            conv(weights(5, 4, 3, 3)),
            bias(1, 2, 3, 4, 5),
        ),
        (1, 3, 8, 8),
    )
    assert kept(report) == [(3, 3), (5, 3)]
    assert ops(out) == ["nn.conv2d", "add", "sigmoid", "nn.conv2d", "add"]


def test_next_layer_without_a_bias_gets_one() -> None:
    out, report = dropped(
        chained(
            dense(weights(4, 3, dead_rows=[2])), add([1.0, 1, 2, 1]), relu, dense(weights(2, 4))
        ),
        (5, 3),
    )
    assert kept(report) == [(3, 3), (2, 3)]
    assert ops(out) == ["matmul", "add", "nn.relu", "matmul", "add"]


def test_dead_column_drops_the_row_before_and_so_on() -> None:
    _, report = dropped(
        chained(
            dense(weights(6, 3)),
            relu,
            dense(np.diag([0.0, 1, 2, 3, 4, 5])),
            relu,
            dense(weights(2, 6, dead_columns=[1, 4])),
        ),
        (5, 3),
    )
    assert kept(report) == [(3, 3), (3, 3), (2, 3)]


def test_nonzero_constant_next_to_zero_padding_stays() -> None:
    def net(padding: int, value: float) -> tuple[int, int]:
        _, report = dropped(
            chained(
                conv(weights(4, 3, 1, 1, dead_rows=[1])),
                bias(0.1, value, 0.2, -0.3),
                relu,
                conv(weights(5, 4, 3, 3), padding=padding),
            ),
            (1, 3, 6, 6),
        )
        return kept(report)[0]

    assert net(padding=1, value=0.7) == (4, 3)
    assert net(padding=0, value=0.7) == (3, 3)
    assert net(padding=1, value=-0.7) == (3, 3)  # relu makes it zero


def test_rows_of_results_stay() -> None:
    out, report = dropped(
        chained(conv(weights(4, 3, 1, 1, dead_rows=[0, 2])), bias(1, 2, 3, 4)), (1, 3, 2, 2)
    )
    assert kept(report) == [(4, 3)]
    assert [static_shape(f) for f in (out["main"].body.body,)] == [(1, 4, 2, 2)]


def test_dead_columns_of_inputs_stay() -> None:
    out, report = dropped(chained(dense(weights(4, 6, dead_columns=[0, 5]))), (2, 6))
    assert kept(report) == [(4, 6)]
    assert static_shape(out["main"].params[0]) == (2, 6)


def test_nothing_dead_changes_nothing() -> None:
    mod = canonicalize(
        make(chained(conv(weights(4, 3, 3, 3)), relu, conv(weights(2, 4, 1, 1))), (1, 3, 6, 6))
    )
    out, report = drop_dead(mod)
    assert out is mod
    assert report.changed == () and report.weights == (116, 116)


def test_scattered_zeros_are_not_dead() -> None:
    w = weights(4, 4, 3, 3) * (np.indices((4, 4)).sum(0) % 2)[:, :, None, None]
    _, report = dropped(chained(conv(weights(4, 3, 1, 1)), relu, conv(w)), (1, 3, 6, 6))
    assert report.changed == ()


# --- layers that vanish -------------------------------------------------------------------------


def test_layer_of_zeros_makes_the_rest_constant() -> None:
    out, report = dropped(
        chained(
            conv(weights(4, 3, 3, 3)),
            relu,
            conv(np.zeros((5, 4, 3, 3))),
            bias(1, -2, 3, 0, 5),
            relu,
            flatten,
            dense(weights(2, 20)),
        ),
        (2, 3, 6, 6),
    )
    assert report.weights[1] == 0
    assert ops(out) == ["broadcast_to"]


def test_vanished_branch_of_a_residual_becomes_a_bias() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(conv(weights(4, 3, 1, 1))(x))
        z = bb.emit(conv(np.zeros((4, 4, 1, 1)))(bb.emit(relu(y))))
        z = bb.emit(bias(1, 0, 2, 0)(z))
        return bb.emit(conv(weights(2, 4, 1, 1))(bb.emit(relax.op.add(y, z))))

    out, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(4, 3), (0, 0), (2, 4)]
    assert ops(out) == ["nn.conv2d", "add", "nn.conv2d"]


# --- others -------------------------------------------------------------------------------------


def test_feed_forward_of_a_transformer_shrinks_and_the_stream_stays() -> None:
    gain, shift = f32(normal(8)), f32(normal(8))

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(add(normal(16))(bb.emit(dense(weights(16, 8, dead_rows=[3, 4]))(x))))
        y = bb.emit(
            dense(weights(8, 16, dead_columns=[9], dead_rows=[0]))(bb.emit(relax.op.nn.gelu(y)))
        )
        return bb.emit(relax.op.nn.layer_norm(bb.emit(relax.op.add(x, y)), gain, shift, axes=[-1]))

    _, report = dropped(body, (2, 5, 8))
    assert kept(report) == [(13, 8), (8, 13)]


def test_matmul_over_pixels_needs_every_channel() -> None:
    _, report = dropped(
        chained(
            conv(weights(4, 3, 1, 1, dead_rows=[1])),
            lambda x: relax.op.matmul(x, f32(normal(6, 5))),
        ),
        (1, 3, 6, 6),
    )
    assert report.changed == ()


def test_channel_scaled_by_its_own_mean() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(bias(1, 2, 3)(bb.emit(conv(weights(3, 3, 1, 1, dead_rows=[1]))(x))))
        s = bb.emit(relax.op.sigmoid(bb.emit(relax.op.mean(y, [2, 3], True))))
        return bb.emit(
            conv(weights(2, 3, 1, 1, dead_columns=[0]))(bb.emit(relax.op.multiply(y, s)))
        )

    _, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(1, 3), (2, 1)]


def test_scale_of_zero_kills_a_channel() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(conv(weights(3, 3, 1, 1))(x))
        a = bb.emit(relu(y))
        b = bb.emit(times(np.array([1, 0, 2]).reshape(1, 3, 1, 1))(a))
        return bb.emit(conv(weights(2, 3, 1, 1))(b))

    _, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(2, 3), (2, 2)]


def test_branches_are_left_alone() -> None:
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    c = relax.Var("c", relax.TensorType((), "bool"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, c]):
        branch = relax.If(c, relax.op.nn.relu(x), relax.op.matmul(x, f32(np.zeros((3, 3)))))
        bb.emit_func_output(bb.emit(branch))
    mod = canonicalize(bb.get())
    out, report = drop_dead(mod)
    assert out is mod and report == DropReport()


def test_report_counts_and_prints() -> None:
    drop = LayerDrop("lv", "dense", rows=(4, 3), columns=(5, 5), weights=(20, 15))
    same = LayerDrop("lv1", "conv2d", rows=(2, 2), columns=(3, 3), weights=(6, 6))
    report = DropReport((drop, same))
    assert report.weights == (26, 21) and report.changed == (drop,)
    assert (
        str(report) == "lv dense: rows 4 -> 3, columns 5 -> 5, weights 20 -> 15\nweights 26 -> 21"
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(0, 2**16))
def test_random_networks_keep_their_function(choose: random.Random, seed: int) -> None:
    mod = RandomNet(choose, seed, steps=9).build()
    out, _ = drop_dead(canonicalize(mod))
    assert_same_function(mod, out)
    again, second = drop_dead(out)
    assert second.changed == () and ops(again) == ops(out)


@pytest.mark.parametrize(
    ("name", "expected", "layers"),
    [
        ("lenet5_dns.onnx", (430500, 21898), [(8, 1), (19, 8), (57, 304), (10, 57)]),
        ("lenet300_dns.onnx", (266200, 49904), [(62, 784), (18, 62), (10, 18)]),
    ],
)
def test_pruned_lenets(name: str, expected: tuple[int, int], layers: list[tuple[int, int]]) -> None:
    mod = load_onnx(DATA / name)
    out, report = drop_dead(canonicalize(mod))
    assert report.weights == expected
    assert kept(report) == layers
    assert_same_function(mod, out)
