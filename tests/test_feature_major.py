"""The order in which axes lie in memory between dense layers: attention, norms, masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention import Array, Attention, lowered_ops, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from relax_nets import make
from tvm import relax
from tvm.ir import Expr, IRModule

import tvm_pivot
from tvm_pivot.relay_passes.feature_major import FeatureMajor
from tvm_pivot.targets import missing_features, needed_features, resolve


def check(
    mod: IRModule,
    reference: Callable[..., Array],
    *inputs: NDArray[np.float32],
    target: str = "x86",
) -> None:
    """The compiled module against float64."""
    want = reference(*(x.astype(np.float64) for x in inputs))
    got = tvm_pivot.build(mod, target=target).run(*inputs)
    assert isinstance(got, np.ndarray) and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    heads=st.integers(1, 5),
    head=st.sampled_from([1, 3, 8, 17]),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 13, 32, 50]),
    keys=st.sampled_from([1, 13, 40]),
    mask=st.sampled_from(["none", "keys", "causal", "full"]),
    split=st.booleans(),
)
def test_attention(
    seed: int, heads: int, head: int, batch: int, tokens: int, keys: int, mask: str, split: bool
) -> None:
    net = Attention(seed, heads, head, mask, split)
    sizes = (batch, tokens, keys)
    check(net.module(*sizes), net.reference, *net.inputs(*sizes))


def test_attention_for_narrow_vectors() -> None:
    target = "x86-avx2"
    if missing_features(needed_features(resolve(target))):
        pytest.skip("this machine cannot run it")
    net, sizes = Attention(2, 3, 24, "keys", True), (2, 43, 29)
    check(net.module(*sizes), net.reference, *net.inputs(*sizes), target=target)


@pytest.mark.parametrize("mask", ["none", "keys"])
@pytest.mark.parametrize("split", [False, True])
def test_attention_moves_nothing_inside(mask: str, split: bool) -> None:
    """One transpose for each input and one for the result; a mask of one image is a vector."""
    ops = lowered_ops(Attention(0, 4, 8, mask, split).module(1, 32, 48))
    assert ops.count("permute_dims") == 3
    assert ops.count("einsum") == 2
    assert "matmul" not in ops
    with_causal = lowered_ops(Attention(0, 4, 8, "causal", split).module(1, 32, 48))
    assert with_causal.count("permute_dims") == 4


def test_a_batch_of_attentions_moves_nothing_inside() -> None:
    ops = lowered_ops(Attention(0, 4, 8, "none", False).module(3, 32, 48))
    assert ops.count("permute_dims") == 3
    assert ops.count("einsum") == 2


def test_sums_over_fewer_tokens_than_a_vector_stay_row_major() -> None:
    net = Attention(0, 4, 8, "none", False)
    lanes = resolve("x86").lanes
    assert "einsum" in lowered_ops(net.module(6, lanes, 8))
    assert "einsum" not in lowered_ops(net.module(6, lanes - 1, 8))


def test_long_rows_of_scores_stay_row_major() -> None:
    """Softmax over a column that is too long for the caches costs more than it saves."""
    net, target = Attention(1, 2, 4, "none", False), resolve("x86")
    longest = max(n for n in range(4096) if FeatureMajor(target).fits_columns(n))
    assert lowered_ops(net.module(1, 32, longest)).count("einsum") == 2
    sizes = (1, 32, longest + 1)
    ops = lowered_ops(net.module(*sizes))
    assert (ops.count("einsum"), ops.count("matmul")) == (1, 1)
    check(net.module(*sizes), net.reference, *net.inputs(*sizes))


def dense_then(
    then: Callable[[Callable[[Expr], Expr], Expr], Expr], shape: tuple[int, ...], outputs: int
) -> tuple[IRModule, NDArray[np.float32]]:
    """A dense layer on [.., 16], with something behind it."""
    weight = weights(np.random.default_rng(3), 16, outputs)

    def body(builder: relax.BlockBuilder, x: Expr) -> Expr:
        return then(builder.emit, builder.emit(relax.op.matmul(x, relax.const(weight))))

    return make(body, (*shape, 16)), weight


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_softmax_over_any_axis(axis: int) -> None:
    mod, weight = dense_then(lambda emit, y: relax.op.nn.softmax(y, axis), (3, 40), 24)

    def reference(x: Array) -> Array:
        y = np.exp(x @ weight.astype(np.float64))
        return np.asarray(y / y.sum(axis, keepdims=True))

    assert lowered_ops(mod).count("permute_dims") == 2
    check(mod, reference, random(3, 40, 16))


@pytest.mark.parametrize("axes", [[-1], [1], [0, 1]])
def test_layer_norm_over_any_axes(axes: list[int]) -> None:
    """Of several axes, too, which is left to the row-major tensor."""
    extents = [(3, 40, 24)[axis] for axis in axes]
    gamma, beta = random(2, *extents)

    def then(emit: Callable[[Expr], Expr], y: Expr) -> Expr:
        scale, shift = relax.const(gamma), relax.const(beta)
        return relax.op.nn.layer_norm(y, scale, shift, axes, 1e-3)

    def reference(x: Array) -> Array:
        y = x @ weight.astype(np.float64)
        last = [-1 - i for i in range(len(axes))][::-1]
        y = np.moveaxis(y, axes, last)
        centred = y - y.mean(tuple(last), keepdims=True)
        y = centred / np.sqrt((centred**2).mean(tuple(last), keepdims=True) + 1e-3) * gamma + beta
        return np.moveaxis(y, last, axes)

    mod, weight = dense_then(then, (3, 40), 24)
    check(mod, reference, random(3, 40, 16))


@pytest.mark.parametrize(
    "shape", [(), (1, 1), (24,), (40, 1), (3, 1, 24), (1, 40, 24), (3, 40, 24)]
)
def test_constants_of_any_shape(shape: tuple[int, ...]) -> None:
    other = random(*shape)
    mod, weight = dense_then(
        lambda emit, y: relax.op.maximum(emit(relax.op.exp(y)), relax.const(other)), (3, 40), 24
    )
    check(mod, lambda x: np.maximum(np.exp(x @ weight.astype(float)), other), random(3, 40, 16))


def test_where_chooses_in_any_order() -> None:
    keep = random(40, 24) > 0
    mod, weight = dense_then(
        lambda emit, y: relax.op.where(relax.const(keep), y, relax.const(np.float32(-2))),
        (3, 40),
        24,
    )
    check(mod, lambda x: np.where(keep, x @ weight.astype(float), -2), random(3, 40, 16))


def test_a_product_of_other_batches_is_left_alone() -> None:
    """[3, 40, 24] times the same [24, 40] for all: ranks differ, so TVM's own operator runs."""
    other = relax.Var("other", relax.TensorType((24, 40), "float32"))
    weight = weights(np.random.default_rng(3), 16, 24)
    x = relax.Var("x", relax.TensorType((3, 40, 16), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, other]):
        with builder.dataflow():
            y = builder.emit(relax.op.matmul(x, relax.const(weight)))
            out = builder.emit_output(relax.op.matmul(y, other))
        builder.emit_func_output(out)
    mod = builder.get()
    assert "einsum" not in lowered_ops(mod)
    check(mod, lambda x, o: x @ weight.astype(float) @ o, random(3, 40, 16), random(24, 40))
