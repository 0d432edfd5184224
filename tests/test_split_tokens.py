"""Rows of dense layers in parts: where they are, and that nothing moves and nothing changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from attention import Attention, lowered_ops, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_nets import inputs_for, make, run
from test_axis_order import memory
from tvm import relax
from tvm.ir import Expr, IRModule

import tvm_pivot
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.relay_passes.feature_major import features_first
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.targets import PRESETS, PivotTarget

# Runs on every host that the tests need, and lines of other cores are far away.
INTEL = replace(PRESETS["haswell"], cores=2)


def found(mod: IRModule, target: PivotTarget) -> list[Layer]:
    """The layers once they are detected."""
    state = Compilation(mod, target)
    for phase in PHASES:
        state = phase.run(state)
        if phase.name == "detect":
            break
    return [p.layer for p in state.planned]


def parts_of(mod: IRModule, target: PivotTarget) -> list[int]:
    """In how many parts each layer has its rows."""
    return [layer.geometry.batch for layer in found(mod, target)]


def perceptron(shape: Sequence[int], outputs: Sequence[int]) -> IRModule:
    """Dense layers on [..., features], with a residual and something elementwise between."""
    rng = np.random.default_rng(0)

    def body(builder: relax.BlockBuilder, x: Expr) -> Expr:
        features = shape[-1]
        for width in outputs:
            y = builder.emit(relax.op.matmul(x, relax.const(weights(rng, features, width))))
            y = builder.emit(relax.op.add(x, y)) if width == features else y
            x, features = builder.emit(relax.op.nn.gelu(y)), width
        return x

    return make(body, tuple(shape))


def close(mod: IRModule, target: PivotTarget, threads: Sequence[int] = (1,)) -> None:
    """The compiled module against TVM's own operators."""
    inputs = inputs_for(mod)
    (want,) = run(mod, *inputs)
    session = tvm_pivot.build(mod, target=target, tuned=False, threads=max(threads))
    for count in threads:
        session.set_threads(count)
        np.testing.assert_allclose(session.run(*inputs), want, rtol=2e-4, atol=2e-5)


@given(
    lead=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3),
    features=st.integers(1, 5),
    parts=st.sampled_from([1, 2, 3, 4, 6]),
)
def test_parts_come_first_then_features(lead: list[int], features: int, parts: int) -> None:
    rows = math.prod(lead)
    if rows % parts:
        return
    shape = (*lead, features)
    x = np.arange(rows * features).reshape(shape)
    want = x.reshape(parts, rows // parts, features).swapaxes(1, 2).ravel()
    storage = features_first(shape, parts)
    if storage is None:
        # A part ends within an axis whose extent it does not divide.
        behind = [math.prod(lead[i:]) for i in range(len(lead) + 1)]
        assert any((rows // parts) % b and b % (rows // parts) for b in behind)
        return
    np.testing.assert_array_equal(memory(x, storage).ravel(), want)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000),
    heads=st.integers(1, 4),
    head=st.sampled_from([3, 8, 17]),
    batch=st.integers(1, 3),
    tokens=st.sampled_from([32, 128, 192]),
    keys=st.sampled_from([13, 128]),
    mask=st.sampled_from(["none", "keys", "causal", "full"]),
    split=st.booleans(),
)
def test_attention_in_parts(
    seed: int, heads: int, head: int, batch: int, tokens: int, keys: int, mask: str, split: bool
) -> None:
    net = Attention(seed, heads, head, mask, split)
    mod, inputs = net.module(batch, tokens, keys), net.inputs(batch, tokens, keys)
    want = net.reference(*(x.astype(np.float64) for x in inputs))
    session = tvm_pivot.build(mod, target=INTEL, tuned=False, threads=2)
    got = session.run(*inputs)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("batch", "tokens", "cores", "parts"),
    [
        (1, 128, 2, 2),
        (1, 256, 2, 2),
        (1, 256, 4, 4),
        (3, 128, 2, 6),
        (2, 64, 2, 2),
        (4, 96, 4, 4),
        (4, 96, 3, 1),
    ],
)
def test_an_attention_in_parts_moves_nothing(
    batch: int, tokens: int, cores: int, parts: int
) -> None:
    """One transpose for each input and one for the result, as with whole tensors."""
    mod = Attention(0, 4, 8, "none", True).module(batch, tokens, tokens)
    target = replace(INTEL, cores=cores)
    assert set(parts_of(mod, target)) == {parts}
    ops = lowered_ops(mod, target)
    assert (ops.count("permute_dims"), ops.count("einsum"), ops.count("matmul")) == (3, 2, 0)


def test_a_perceptron_in_parts_moves_nothing_inside() -> None:
    mod = perceptron((128, 48), [96, 96, 48])
    assert parts_of(mod, INTEL) == [2, 2, 2]
    assert lowered_ops(mod, INTEL).count("permute_dims") == 2
    close(mod, INTEL, (1, 2))


@pytest.mark.parametrize("rows", [64, 120, 130, 200])
def test_rows_that_fill_no_parts_stay_together(rows: int) -> None:
    mod = perceptron((rows, 48), [96, 48])
    assert parts_of(mod, INTEL) == [1, 1]


def test_inputs_beyond_level_2_are_cut_for_one_core() -> None:
    one, mod = replace(INTEL, cores=1), perceptron((256, 48), [768, 48])
    sizes = {768 * 256 * 4 * 3: [1, 1], 768 * 128 * 4 * 3: [2, 2], 768 * 64 * 4 * 3: [4, 4]}
    for l2_bytes, parts in sizes.items():
        target = replace(one, l2_bytes=l2_bytes)
        assert parts_of(mod, target) == parts
        close(mod, target)


def test_layers_with_other_rows_have_parts_of_their_own() -> None:
    rng = np.random.default_rng(0)
    weight = relax.const(weights(rng, 48, 48))

    def body(builder: relax.BlockBuilder, x: Expr, y: Expr) -> list[Expr]:
        return [builder.emit(relax.op.matmul(v, weight)) for v in (x, y)]

    assert parts_of(make(body, (1, 256, 48), (32, 48)), replace(INTEL, cores=4)) == [4, 1]


@pytest.mark.parametrize("name", ["zen4", "cortex-a76"])
def test_elsewhere_rows_stay_together(name: str) -> None:
    target = replace(PRESETS[name], cores=2)
    assert parts_of(perceptron((256, 48), [96, 48]), target) == [1, 1]


def test_images_are_left_to_others() -> None:
    rng = np.random.default_rng(0)
    weight = relax.const(weights(rng, 32, 32).reshape(32, 32, 1, 1))
    mod = make(lambda builder, x: relax.op.nn.conv2d(x, weight), (1, 32, 16, 16))
    assert parts_of(mod, INTEL) == [1]
