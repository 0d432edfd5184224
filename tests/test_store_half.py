"""What 16-bit kernels hand on stays in 16 bits, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from relax_nets import calls, f32, inputs_for, make, normal, run
from tvm import relax
from tvm.ir import Expr, IRModule

from tvm_pivot.relay_passes.graph import dtype_of, stored
from tvm_pivot.relay_passes.store_half import store_half

Between = Callable[[relax.BlockBuilder, Expr], Expr]
HALVES = ("float16", "bfloat16")
WEIGHT = normal(8, 8)


def kernel(bb: relax.BlockBuilder, x: Expr, dtype: str) -> Expr:
    """A layer as it is lowered: its kernel, here a product, between casts."""
    half = bb.emit(relax.op.astype(x, dtype))
    weight = bb.emit(relax.op.astype(f32(WEIGHT), dtype))
    product = bb.emit(relax.op.matmul(half, weight))
    return bb.emit(relax.op.astype(product, "float32"))


def network(between: Between, dtype: str) -> IRModule:
    """Two layers with something between them."""
    return make(lambda bb, x: kernel(bb, between(bb, kernel(bb, x, dtype)), dtype), (4, 8))


def casts(mod: IRModule) -> list[str]:
    """To what `main` casts, of what is no constant."""
    found = [c for c in calls(mod, "astype") if isinstance(c.args[0], relax.Var)]
    return [str(c.attrs.dtype) for c in found]


def moved(bb: relax.BlockBuilder, x: Expr) -> Expr:
    """What moves and compares elements."""
    flat = bb.emit(relax.op.reshape(x, (2, 16)))
    both = bb.emit(relax.op.concat([flat, bb.emit(relax.op.negative(flat))], axis=0))
    positive = bb.emit(relax.op.nn.relu(both))
    turned = bb.emit(relax.op.permute_dims(bb.emit(relax.op.reshape(positive, (8, 8)))))
    return bb.emit(relax.op.maximum(turned, f32(0.25)))


def doubled(bb: relax.BlockBuilder, x: Expr) -> Expr:
    """Sums and products."""
    return bb.emit(relax.op.add(bb.emit(relax.op.multiply(x, f32(np.arange(8)))), x))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("between", [moved, doubled, lambda _, x: x])
def test_between_kernels_nothing_is_cast(between: Between, dtype: str) -> None:
    before = network(between, dtype)
    after = store_half(before, dtype)
    relax.analysis.well_formed(after)
    assert casts(before) == [dtype, "float32"] * 2
    assert casts(after) == [dtype, "float32"]
    assert dtype_of(after["main"].body.body) == "float32"


def test_moves_change_no_bit() -> None:
    before = network(moved, "float16")
    x = inputs_for(before)
    (expected,), (got,) = run(before, *x), run(store_half(before, "float16"), *x)
    assert np.array_equal(got, expected)


def test_sums_are_rounded_once_more() -> None:
    before = make(
        lambda bb, x: bb.emit(relax.op.astype(doubled(bb, kernel(bb, x, "float16")), "float32")),
        (4, 8),
    )
    x = inputs_for(before)
    (expected,), (got,) = run(before, *x), run(store_half(before, "float16"), *x)
    np.testing.assert_allclose(got, expected, rtol=2.0**-9, atol=2.0**-9)
    assert not np.array_equal(got, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_other_operators_compute_in_float32(dtype: str) -> None:
    mod = store_half(network(lambda bb, x: bb.emit(relax.op.exp(x)), dtype), dtype)
    (exponential,) = calls(mod, "exp")
    assert dtype_of(exponential.args[0]) == "float32"
    assert casts(mod) == [dtype, "float32", dtype, "float32"]


def test_what_no_kernel_made_is_left_alone() -> None:
    mod = make(lambda bb, x, y: doubled(bb, bb.emit(relax.op.add(x, y))), (4, 8), (4, 8))
    assert casts(store_half(mod, "float16")) == []


def test_constants_are_rounded_to_nearest_even() -> None:
    values = np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1e-40, 3e38])
    got = stored(values, "bfloat16").astype(np.float32)
    assert got.tolist()[:2] == [1.0, 1 + 2.0**-6]
    np.testing.assert_allclose(got, values, rtol=2.0**-8, atol=1e-40)
    assert stored(values[:3], "float16").dtype == np.float16
