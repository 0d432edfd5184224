"""The order in which axes lie in memory between dense layers: attention, norms, masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from relax_nets import make
from tvm import relax
from tvm.ir import Expr, IRModule

import tvm_pivot
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.relay_passes.axis_order import permuted, reshaped, row_major, transposition
from tvm_pivot.relay_passes.feature_major import FeatureMajor
from tvm_pivot.relay_passes.graph import MAIN, live_bindings, op_name
from tvm_pivot.targets import missing_features, needed_features, resolve

Array = NDArray[np.float64]
EXTENTS = st.sampled_from([1, 1, 2, 3, 4, 6])


def lowered_ops(mod: IRModule) -> list[str]:
    """Names of the operators in main once its layers are kernels."""
    state = Compilation(mod, resolve("x86"))
    for phase in PHASES:
        state = phase.run(state)
        if phase.name == "lower_layers":
            break
    return [op_name(value) for _, value in live_bindings(state.mod[MAIN])]


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


def stored(x: NDArray[Any], order: tuple[int, ...]) -> NDArray[Any]:
    """`x` as it lies in memory in an order of its axes."""
    rest = [axis for axis in range(x.ndim) if axis not in order]
    return x.transpose([*rest, *order]).reshape([x.shape[axis] for axis in order])


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[NDArray[Any], tuple[int, ...]]:
    shape = draw(st.lists(EXTENTS, min_size=1, max_size=4))
    x = np.arange(math.prod(shape)).reshape(shape)
    return x, tuple(draw(st.permutations(row_major(shape))))


@st.composite
def shapes_of(draw: st.DrawFn, size: int) -> list[int]:
    """A shape with `size` elements."""
    shape = []
    while size > 1:
        shape.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= shape[-1]
    return shape or [1]


@given(st.data())
def test_orders_follow_reshapes(data: st.DataObject) -> None:
    x, order = data.draw(stored_tensors())
    shape = data.draw(shapes_of(x.size))
    y = x.reshape(shape)
    found = reshaped(order, x.shape, shape)
    if found is not None:
        assert stored(x, order).ravel().tolist() == stored(y, found).ravel().tolist()
        return
    # no order of the new axes has the same elements in the same places
    flat = stored(x, order).ravel().tolist()
    assume(y.ndim <= 5)
    orders = {row_major(y.shape), *_permutations(row_major(y.shape))}
    assert all(stored(y, other).ravel().tolist() != flat for other in orders)


def _permutations(axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    if not axes:
        return [()]
    return [(a, *p) for a in axes for p in _permutations(tuple(b for b in axes if b != a))]


@given(st.data())
def test_orders_follow_transposes(data: st.DataObject) -> None:
    x, order = data.draw(stored_tensors())
    axes = data.draw(st.permutations(range(x.ndim)))
    y = x.transpose(axes)
    same = stored(y, permuted(order, axes))
    np.testing.assert_array_equal(stored(x, order), same)
    back = same.transpose(transposition(permuted(order, axes), row_major(y.shape)))
    np.testing.assert_array_equal(back.reshape(y.shape), y)


def weights(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """A pruned weight [rows, columns] that keeps products with it at about the size of inputs."""
    mask = rng.random((rows, columns)) < 0.5
    mask[:, 0] = mask[0] = True  # no dead rows or columns
    return np.where(mask, rng.standard_normal((rows, columns)), 0).astype("f") / np.sqrt(rows / 2)


class Attention:
    """Multi-head attention of `tokens` queries to `keys` keys, with residual and layer norm."""

    def __init__(self, seed: int, heads: int, head: int, mask: str, split_transpose: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.heads, self.head, self.mask, self.split = heads, head, mask, split_transpose
        self.width = heads * head
        self.weights = [weights(self.rng, self.width, self.width) for _ in range(4)]
        self.gamma, self.beta = self.rng.standard_normal((2, self.width)).astype("f")

    def module(self, batch: int, tokens: int, keys: int) -> IRModule:
        def body(builder: relax.BlockBuilder, x: Expr, memory: Expr, mask: Expr) -> Expr:
            emit, op = builder.emit, relax.op

            def heads(y: Expr, weight: NDArray[np.float32], length: int, axes: list[int]) -> Expr:
                y = emit(op.matmul(y, relax.const(weight)))
                y = emit(op.reshape(y, (batch, length, self.heads, self.head)))
                return emit(op.permute_dims(y, axes))

            q = heads(x, self.weights[0], tokens, [0, 2, 1, 3])
            if self.split:
                k = heads(memory, self.weights[1], keys, [0, 2, 1, 3])
                k = emit(op.permute_dims(k, [0, 1, 3, 2]))
            else:
                k = heads(memory, self.weights[1], keys, [0, 2, 3, 1])
            v = heads(memory, self.weights[2], keys, [0, 2, 1, 3])
            scores = emit(op.matmul(q, k))
            scores = emit(op.multiply(scores, relax.const(np.float32(self.head**-0.5))))
            if self.mask != "none":
                scores = emit(op.add(scores, mask))
            o = emit(op.matmul(emit(op.nn.softmax(scores, -1)), v))
            o = emit(op.permute_dims(o, [0, 2, 1, 3]))
            o = emit(op.reshape(o, (batch, tokens, self.width)))
            o = emit(op.matmul(o, relax.const(self.weights[3])))
            o = emit(op.add(x, o))
            gamma, beta = relax.const(self.gamma), relax.const(self.beta)
            return op.nn.layer_norm(o, gamma, beta, [-1], 1e-5)

        shapes = [(batch, n, self.width) for n in (tokens, keys)]
        return make(body, *shapes, self.mask_shape(batch, tokens, keys))

    def mask_shape(self, batch: int, tokens: int, keys: int) -> tuple[int, ...]:
        shapes = {"keys": (batch, 1, 1, keys), "causal": (tokens, keys)}
        return shapes.get(self.mask, (batch, self.heads, tokens, keys))

    def reference(self, x: Array, memory: Array, mask: Array) -> Array:
        def heads(y: Array, weight: NDArray[np.float32]) -> Array:
            y = y @ weight.astype(np.float64)
            return y.reshape(*y.shape[:2], self.heads, self.head).transpose(0, 2, 1, 3)

        q = heads(x, self.weights[0])
        k, v = (heads(memory, w) for w in self.weights[1:3])
        scores = q @ k.swapaxes(2, 3) * self.head**-0.5
        scores = np.exp(scores + (mask if self.mask != "none" else 0))
        o = (scores / scores.sum(-1, keepdims=True)) @ v
        y = x + o.transpose(0, 2, 1, 3).reshape(x.shape) @ self.weights[3]
        centred = y - y.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * self.gamma + self.beta

    def inputs(self, batch: int, tokens: int, keys: int) -> list[NDArray[np.float32]]:
        shapes = [(batch, tokens, self.width), (batch, keys, self.width)]
        shapes.append(self.mask_shape(batch, tokens, keys))
        return [self.rng.standard_normal(shape).astype("f") for shape in shapes]


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
