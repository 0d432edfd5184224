"""Transposes in registers: exact for all shapes and types, and what is fused around them stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_oracle import HOST, functions, module, run
from tvm import relax, tirx

from tvm_pivot.relay_passes.schedule_functions import schedule_functions
from tvm_pivot.schedules.analysis import walk
from tvm_pivot.schedules.squares import transposes
from tvm_pivot.targets import PRESETS

op = relax.op
WIDTHS = {lanes: replace(HOST, lanes=lanes) for lanes in (4, 8, HOST.lanes)}


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Numbers that all differ in their bits, so that none can be taken for another."""
    count = int(np.prod(shape))
    order = np.random.default_rng(seed).permutation(count).astype(dtype)
    return order.reshape(shape)


def scheduled(mod: Any, target: Any) -> Any:
    return schedule_functions(mod, target)


def shuffles(mod: Any) -> int:
    return sum(len(walk(func.body, tirx.Shuffle)) for func in functions(mod).values())


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "int32", "float64", "float16", "int64"]),
    lanes=st.sampled_from(sorted(WIDTHS)),
)
def test_transposes_are_exact(rows: int, columns: int, batch: int, dtype: str, lanes: int) -> None:
    x = values((batch, rows, columns), dtype)
    mod = module(lambda x: op.permute_dims(x, [0, 2, 1]), (dtype, *x.shape))
    (result,) = run(scheduled(mod, WIDTHS[lanes]), WIDTHS[lanes], [x])
    np.testing.assert_array_equal(result, x.transpose(0, 2, 1))


@pytest.mark.parametrize("target", [HOST, PRESETS["x86-avx2"]], ids=lambda target: target.name)
@pytest.mark.parametrize(
    "shape, order",
    [
        ((128, 96), (1, 0)),
        ((49, 4, 24), (1, 2, 0)),
        ((3, 33, 40), (2, 0, 1)),
        ((2, 20, 6, 16), (0, 2, 3, 1)),
    ],
)
def test_squares_are_transposed_in_registers(
    shape: tuple[int, ...], order: tuple[int, ...], target: Any
) -> None:
    x = values(shape, "float32")
    mod = scheduled(module(lambda x: op.permute_dims(x, list(order)), shape), target)
    assert shuffles(mod) > 0
    (result,) = run(mod, target, [x])
    np.testing.assert_array_equal(result, x.transpose(order))


def test_only_the_operands_that_lie_across_are_transposed() -> None:
    shapes = ((48, 80), (80, 48), (48,))
    x, y, z = (values(shape, "float32", seed) for seed, shape in enumerate(shapes))

    def fused(x: Any, y: Any, z: Any) -> Any:
        return op.nn.relu(op.permute_dims(x, [1, 0]) - y) + z

    mod = scheduled(module(fused, x.shape, y.shape, z.shape), HOST)
    (result,) = run(mod, HOST, [x, y, z])
    np.testing.assert_array_equal(result, np.maximum(x.T - y, 0) + z)
    each = shuffles(scheduled(module(lambda x: op.permute_dims(x, [1, 0]), x.shape), HOST))
    assert shuffles(mod) == each > 0


def test_conditions_keep_their_loads_from_being_moved() -> None:
    """What lies outside is never loaded: a transposed operand of a concatenation ends there."""
    x, y = values((24, 40), "float32"), values((24, 19), "float32", 1)

    def joined(x: Any, y: Any) -> Any:
        return op.permute_dims(op.concat([x, y], 1), [1, 0])

    (result,) = run(scheduled(module(joined, x.shape, y.shape), HOST), HOST, [x, y])
    np.testing.assert_array_equal(result, np.concatenate([x, y], 1).T)


def test_sizes() -> None:
    assert [size for size in range(40) if transposes(size)] == [4, 8, 16, 32]
