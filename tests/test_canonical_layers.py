"""Dense layers, convolutions and per-channel chains: their canonical forms, and what stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from relax_nets import (
    RNG,
    add,
    assert_same_function,
    batch_norm,
    calls,
    chained,
    checked,
    conv,
    f32,
    make,
    normal,
    ops,
    times,
)
from tvm import relax
from tvm.ir import Expr

from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.graph import array_of, ints, static_shape

# --- dense --------------------------------------------------------------------------------------

DENSE = {
    "transposed weight": (
        (4, 3),
        lambda x: relax.op.matmul(x, relax.op.permute_dims(f32(normal(5, 3)))),
        [],
    ),
    "vector": ((3,), lambda x: relax.op.matmul(x, f32(normal(3, 5))), ["reshape", "reshape"]),
    "weight on the left": (
        (2, 3, 4),
        lambda x: relax.op.matmul(f32(normal(5, 3)), x),
        ["permute_dims", "permute_dims"],
    ),
    "weight left of a vector": (
        (3,),
        lambda x: relax.op.matmul(f32(normal(5, 3)), x),
        ["reshape", "reshape"],
    ),
    "weight with a batch of one": (
        (2, 3),
        lambda x: relax.op.matmul(x, f32(normal(1, 3, 5))),
        ["reshape"],
    ),
    "repeated weight": (
        (4, 2, 3),
        lambda x: relax.op.matmul(x, relax.op.broadcast_to(f32(normal(3, 5)), (4, 3, 5))),
        [],
    ),
    "explicit result type": (
        (4, 3),
        lambda x: relax.op.matmul(x, f32(normal(3, 5)), "float32"),
        [],
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_is_matmul_by_a_constant_matrix(name: str) -> None:
    shape, layer, around = DENSE[name]
    out = checked(chained(layer), shape)
    assert sorted(ops(out)) == sorted(["matmul", *around])
    weight = calls(out, "matmul")[0].args[1]
    assert array_of(weight) is not None and static_shape(weight) == (3, 5)


def test_gemm_scales_fold_into_the_weights() -> None:
    w, c = normal(3, 5), normal(5)
    out = checked(chained(times(0.3), lambda x: relax.op.matmul(x, f32(w)), add(c)), (4, 3))
    assert ops(out) == ["matmul", "add"]
    folded = (w.astype("float64") * np.float32(0.3)).astype("float32")
    np.testing.assert_array_equal(array_of(calls(out, "matmul")[0].args[1]), folded)


@pytest.mark.parametrize("weight_shape", [(4, 3, 5), (3,)])
def test_other_products_are_left_alone(weight_shape: tuple[int, ...]) -> None:
    out = checked(chained(lambda x: relax.op.matmul(x, f32(normal(*weight_shape)))), (4, 2, 3))
    assert ops(out) == ["matmul"]
    assert static_shape(calls(out, "matmul")[0].args[1]) == weight_shape


@pytest.mark.parametrize("part", [(1, 5), (3, 1), (1, 1), (1, 1, 1)])
def test_a_weight_that_a_broadcast_makes_larger_is_not_taken_for_its_part(
    part: tuple[int, ...],
) -> None:
    def layer(x: Expr) -> Expr:
        return relax.op.matmul(x, relax.op.broadcast_to(f32(normal(*part)), (4, 3, 5)))

    assert "matmul" in ops(checked(chained(layer), (4, 2, 3)))


def test_product_of_two_inputs_is_left_alone() -> None:
    out = checked(lambda bb, x, y: bb.emit(relax.op.matmul(x, y)), (2, 3), (3, 4))
    assert ops(out) == ["matmul"]


@pytest.mark.parametrize("form", [(5,), (1, 5), (1, 1, 5), (1,), ()])
def test_dense_bias_has_one_axis(form: tuple[int, ...]) -> None:
    out = checked(
        chained(lambda x: relax.op.matmul(x, f32(normal(3, 5))), add(normal(*form))), (2, 4, 3)
    )
    assert ops(out) == ["matmul", "add"]
    assert static_shape(calls(out, "add")[0].args[1]) == (5,)


# --- convolutions -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(1, 4, 1, 1), (4, 1, 1), (1,)])
def test_conv_bias_has_four_axes(form: tuple[int, ...]) -> None:
    bias = normal(*form)
    out = checked(
        chained(conv(normal(4, 3, 3, 3)), lambda x: relax.op.add(f32(bias), x)), (1, 3, 5, 5)
    )
    assert ops(out) == ["nn.conv2d", "add"]
    assert static_shape(calls(out, "add")[0].args[1]) == (1, 4, 1, 1)


def test_conv1d_is_conv2d_of_planes_of_height_one() -> None:
    w, b = normal(4, 2, 3), normal(1, 4, 1)
    attrs = {"strides": 2, "padding": (2, 1), "dilation": 2, "groups": 2}
    out = checked(chained(lambda x: relax.op.nn.conv1d(x, f32(w), **attrs), add(b)), (2, 4, 11))
    assert ops(out) == ["reshape", "nn.conv2d", "add", "reshape"]
    layer = calls(out, "nn.conv2d")[0]
    assert static_shape(layer.args[1]) == (4, 2, 1, 3)
    assert ints(layer.attrs.padding) == (0, 2, 0, 1)


def test_nhwc_convolution_becomes_nchw() -> None:
    w = normal(3, 3, 2, 4)
    layouts = {"data_layout": "NHWC", "kernel_layout": "HWIO"}
    out = checked(chained(conv(w, **layouts), lambda x: relax.op.nn.relu(x)), (1, 6, 6, 2))
    layer = calls(out, "nn.conv2d")[0]
    assert (layer.attrs.data_layout, layer.attrs.kernel_layout) == ("NCHW", "OIHW")
    assert static_shape(layer.args[1]) == (4, 2, 3, 3) and array_of(layer.args[1]) is not None


def test_zero_padding_moves_into_the_convolution() -> None:
    pad = [0, 0, 0, 0, 1, 0, 2, 1]
    out = checked(
        chained(lambda x: relax.op.nn.pad(x, pad), conv(normal(4, 3, 3, 3), padding=1)),
        (1, 3, 5, 5),
    )
    assert ops(out) == ["nn.conv2d"]
    assert ints(calls(out, "nn.conv2d")[0].attrs.padding) == (2, 3, 1, 2)


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "constant", 1.0),
        lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "reflect"),
        lambda x: relax.op.nn.pad(x, [0, 0, 1, 1, 0, 0, 0, 0]),
    ],
    ids=["by ones", "reflected", "by channels"],
)
def test_other_padding_stays(pad: Callable[[Expr], Expr]) -> None:
    mod = make(chained(pad, lambda x: relax.op.nn.relu(x)), (1, 3, 5, 5))
    assert ops(canonicalize(mod)) == ["nn.pad", "nn.relu"]


# --- scales and shifts per channel --------------------------------------------------------------


def test_chain_folds_into_the_weights_with_one_rounding() -> None:
    w, b, s = normal(4, 3, 3, 3), normal(1, 4, 1, 1), normal(4, 1, 1)
    norm = batch_norm(4)
    mod = make(
        chained(conv(w), add(b), norm, times(s), lambda x: relax.op.divide(x, f32(3.0)), add(1.5)),
        (1, 3, 6, 6),
    )
    out = canonicalize(mod)
    assert ops(out) == ["nn.conv2d", "add"]
    assert_same_function(mod, out)
    stats = [
        array_of(a).astype("float64")
        for a in norm(conv(w)(mod["main"].params[0])).tuple_value.args[1:]
    ]
    gamma, _, _, variance = stats
    third = float(np.float32(1) / np.float32(3))
    scale = gamma / np.sqrt(variance + 1e-5) * s.reshape(-1).astype("float64") * third
    exact = w * scale[:, None, None, None]
    rounded = array_of(calls(out, "nn.conv2d")[0].args[1])
    assert np.all(np.abs(rounded - exact) <= np.spacing(np.abs(exact).astype("float32")))


def test_pruned_weights_stay_exactly_zero() -> None:
    w = normal(8, 4, 3, 3) * (RNG.random((8, 4, 3, 3)) < 0.1)
    out = checked(chained(conv(w), batch_norm(8), times(normal(8, 1, 1))), (1, 4, 6, 6))
    np.testing.assert_array_equal(array_of(calls(out, "nn.conv2d")[0].args[1]) == 0, w == 0)


@pytest.mark.parametrize("attrs", [{"scale": False}, {"center": False}, {"epsilon": 0.1}])
def test_batch_norm_attributes(attrs: dict[str, object]) -> None:
    assert ops(
        checked(chained(conv(normal(4, 3, 1, 1)), batch_norm(4, **attrs)), (1, 3, 5, 5))
    ) == [
        "nn.conv2d",
        "add",
    ]


def test_batch_norm_folds_into_dense_and_conv1d() -> None:
    dense = chained(lambda x: relax.op.matmul(x, f32(normal(3, 5))), batch_norm(5))
    assert ops(checked(dense, (4, 3))) == ["matmul", "add"]
    conv1d = chained(lambda x: relax.op.nn.conv1d(x, f32(normal(4, 3, 3))), batch_norm(4))
    assert ops(checked(conv1d, (2, 3, 9))) == ["reshape", "nn.conv2d", "add", "reshape"]


def test_batch_norm_elsewhere_is_multiply_and_add() -> None:
    out = checked(
        chained(batch_norm(3), lambda x: relax.op.nn.relu(x), conv(normal(4, 3, 1, 1))),
        (1, 3, 5, 5),
    )
    assert ops(out) == ["multiply", "add", "nn.relu", "nn.conv2d"]


def test_batch_norm_of_another_axis_does_not_touch_the_weights() -> None:
    w = normal(4, 3, 3, 3)
    out = checked(chained(conv(w), batch_norm(4, axis=2)), (1, 3, 6, 6))
    assert ops(out) == ["nn.conv2d", "multiply", "add"]
    np.testing.assert_array_equal(array_of(calls(out, "nn.conv2d")[0].args[1]), w)


def test_conv_that_others_read_keeps_its_weights() -> None:
    w = normal(4, 3, 1, 1)

    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        y = bb.emit(conv(w)(x))
        return [bb.emit(batch_norm(4)(y)), bb.emit(relax.op.nn.relu(y))]

    out = checked(body, (1, 3, 5, 5))
    assert sorted(ops(out)) == ["add", "multiply", "nn.conv2d", "nn.relu"]
    np.testing.assert_array_equal(array_of(calls(out, "nn.conv2d")[0].args[1]), w)


def test_bias_that_is_a_result_stays() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        y = bb.emit(add(normal(1, 4, 1, 1))(bb.emit(conv(normal(4, 3, 1, 1))(x))))
        return [y, bb.emit(times(2.0)(y))]

    assert ops(checked(body, (1, 3, 5, 5))) == ["nn.conv2d", "add", "multiply"]


def test_scale_per_pixel_is_not_folded() -> None:
    out = checked(chained(conv(normal(4, 3, 1, 1)), times(normal(1, 4, 5, 5))), (1, 3, 5, 5))
    assert ops(out) == ["nn.conv2d", "multiply"]


def test_overflowing_scale_stays_outside() -> None:
    w = np.zeros((2, 3, 1, 1), "float32")
    w[0] = 1e30
    mod = make(chained(conv(w), times(np.array([1e30, 1]).reshape(1, 2, 1, 1))), (1, 3, 2, 2))
    out = canonicalize(mod)
    assert ops(out) == ["nn.conv2d", "multiply"]
    np.testing.assert_array_equal(array_of(calls(out, "nn.conv2d")[0].args[1]), w)


def test_training_batch_norm_keeps_its_meaning() -> None:
    out = checked(chained(conv(normal(4, 3, 1, 1)), batch_norm(4, training=True)), (2, 3, 4, 4))
    assert ops(out) == ["nn.conv2d", "nn.batch_norm"]
