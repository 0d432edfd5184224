"""One order for all layers of a channel group: where it is chosen, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from channel_orders import shuffled
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_nets import assert_same_function, f32, make, ops
from tvm import relax
from tvm.ir import Expr, IRModule

from tvm_pivot import build
from tvm_pivot.column_order import even_order
from tvm_pivot.pack import longest_first
from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.channel_groups import find_channel_groups
from tvm_pivot.relay_passes.count_moves import count_moves
from tvm_pivot.relay_passes.detect import detect
from tvm_pivot.relay_passes.fuse_permutations import _slots, fuse_permutations
from tvm_pivot.relay_passes.layers import PlannedLayer
from tvm_pivot.relay_passes.report_layers import report_layers
from tvm_pivot.report import Moves, Report, SharedOrder
from tvm_pivot.targets import PivotTarget, resolve
from tvm_pivot.windows import count_steps

AVX512 = resolve("x86-avx512")


def sparse(rng: np.random.Generator, rows: int, columns: int, density: float) -> np.ndarray:
    weights = rng.normal(size=(rows, columns)) / np.sqrt(columns * density)
    return (weights * (rng.random((rows, columns)) < density)).astype(np.float32)


def perceptron(*weights: np.ndarray, batch: int = 1) -> IRModule:
    """Dense layers with weights [rows, columns] and a relu between them."""

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        for number, weight in enumerate(weights):
            x = bb.emit(relax.op.nn.relu(x)) if number else x
            x = bb.emit(relax.op.matmul(x, f32(weight.T)))
        return x

    return canonicalize(make(body, (batch, weights[0].shape[1])))


def fused(
    mod: IRModule, target: PivotTarget
) -> tuple[IRModule, Sequence[PlannedLayer], Sequence[PlannedLayer]]:
    """The module, and the plans before and after; checks that it computes the same."""
    before = detect(mod, target)
    out, after = fuse_permutations(mod, before, target)
    assert ops(out) == ops(mod) and [p.layer.name for p in after] == [p.layer.name for p in before]
    assert sum(p.plan.cycles for p in after) <= sum(p.plan.cycles for p in before)
    assert_same_function(mod, out)
    return out, before, after


# --- the order of columns -----------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 80), st.floats(0, 1), st.integers(0, 2**16))
def test_every_column_has_one_place(rows: int, columns: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    order = even_order([mask.astype(np.uint16)])
    assert order is not None and order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(columns))


def leads(mask: npt.NDArray[np.bool_], lanes: int) -> float:
    """How far rows get ahead of the others of their slice, over all columns: independent of how."""
    used = np.cumsum(mask, axis=1)[longest_first(mask, lanes)]
    return float(np.square(used - used.mean(axis=1, keepdims=True)).mean())


@pytest.mark.parametrize("lanes", [8, 16])
def test_rows_stay_level_and_steps_are_saved(lanes: int) -> None:
    mask = np.random.default_rng(3).random((256, 768)) < 0.1
    order = even_order([mask.astype(np.uint16)])
    assert order is not None
    assert leads(mask[:, order], lanes) < 0.3 * leads(mask, lanes)
    assert count_steps(mask[:, order], lanes, 2) < 0.9 * count_steps(mask, lanes, 2)


def test_two_readers_share_the_order() -> None:
    rng = np.random.default_rng(4)
    masks = [rng.random((n, 512)) < 0.1 for n in (128, 256)]
    order = even_order([m.astype(np.uint16) for m in masks])
    for mask in masks:
        assert leads(mask[:, order], 16) < 0.5 * leads(mask, 16)


def test_too_many_columns_are_left_alone() -> None:
    assert even_order([np.zeros((1, 10_000), np.uint16)]) is None


# --- the pass -----------------------------------------------------------------------------------


def test_columns_that_are_looked_up_get_an_order_from_the_layer_before() -> None:
    rng = np.random.default_rng(0)
    mod = perceptron(sparse(rng, 512, 128, 0.1), sparse(rng, 256, 512, 0.1))
    out, before, after = fused(mod, AVX512)
    assert before[1].plan.window and after[1].plan.window == before[1].plan.window
    assert after[1].plan.entries < 0.95 * before[1].plan.entries
    mask = after[1].layer.matrix != 0
    assert after[1].plan.entries == count_steps(mask, 16, after[1].plan.window)
    (shared,) = after[1].shared
    assert (shared.group, shared.side) == ("matmul_1 rows", "columns") and shared.gain > 1
    assert after[0].shared == (SharedOrder("matmul_1 rows", "rows", shared.gain),)
    order = [
        np.flatnonzero((before[0].layer.matrix == row).all(axis=1))[0]
        for row in after[0].layer.matrix
    ]
    np.testing.assert_array_equal(after[0].layer.matrix, before[0].layer.matrix[order])
    np.testing.assert_array_equal(after[1].layer.matrix, before[1].layer.matrix[:, order])
    assert count_moves(out) == Moves(0, 0)


def test_a_layer_at_the_input_keeps_its_columns() -> None:
    mod = perceptron(sparse(np.random.default_rng(1), 256, 512, 0.1))
    out, before, after = fused(mod, AVX512)
    assert before[0].plan.window and out is mod and list(after) == list(before)


def test_layers_that_gain_nothing_keep_their_order() -> None:
    rng = np.random.default_rng(2)
    weights = sparse(rng, 256, 64, 0.1), sparse(rng, 128, 256, 0.1)
    mod = perceptron(*weights, batch=64)
    out, _, after = fused(mod, AVX512)
    assert out is mod and not any(p.shared for p in after)
    dense = perceptron(np.ones((64, 32), np.float32), np.ones((32, 64), np.float32))
    assert fused(dense, AVX512)[0] is dense


def test_a_layer_that_takes_no_time_is_not_worth_an_order() -> None:
    rng = np.random.default_rng(8)
    small, large = perceptron(sparse(rng, 128, 64, 0.1), sparse(rng, 64, 128, 0.1)), 1e9
    before = detect(small, AVX512)
    assert any(p.plan.window for p in before)
    first = replace(before[0], plan=replace(before[0].plan, cycles=large, window=0))
    out, after = fuse_permutations(small, [first, before[1]], AVX512)
    assert out is small and after == [first, before[1]]


def test_blocks_of_the_layer_before_keep_their_rows_together() -> None:
    rng = np.random.default_rng(5)
    blocks = np.repeat(sparse(rng, 64, 128, 0.1) != 0, 16, axis=0)
    first = sparse(rng, 1024, 128, 1.0) * blocks[rng.permutation(1024)]
    mod = perceptron(first, sparse(rng, 512, 1024, 0.1))
    _, before, after = fused(mod, AVX512)
    assert after[1].shared and not before[0].plan.own_columns
    assert after[0].plan.entries == before[0].plan.entries
    (old,), (new,) = before[0].plan.slots, after[0].plan.slots
    assert not np.array_equal(old, new)
    np.testing.assert_array_equal(after[0].layer.matrix[new], before[0].layer.matrix[old])


def test_slots_of_a_grouped_layer_follow_its_groups() -> None:
    weight = np.arange(12)
    order = np.array([9, 11, 10, 8, 0, 1, 2, 3, 5, 4, 6, 7])  # groups of 4, moved and mixed
    slots = [np.array(s, np.int32) for s in ([0, 2, 1, 3], [3, 2, 1, 0], [0, 1, 2, 3])]
    moved = _slots(slots, order)
    for group, came in enumerate((2, 0, 1)):
        new = weight[order].reshape(3, 4)[group][moved[group]]
        np.testing.assert_array_equal(new, weight.reshape(3, 4)[came][slots[came]])


def test_steps_of_a_recurrence_get_one_order() -> None:
    rng = np.random.default_rng(6)
    recurrent = f32(sparse(rng, 256, 256, 0.1).T)

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        h = bb.emit(relax.op.matmul(x, f32(sparse(rng, 256, 64, 0.1).T)))
        for _ in range(3):
            h = bb.emit(relax.op.tanh(bb.emit(relax.op.matmul(h, recurrent))))
        return bb.emit(relax.op.matmul(h, f32(sparse(rng, 16, 256, 1.0).T)))

    _, _, after = fused(canonicalize(make(body, (1, 64))), AVX512)
    steps = after[1:4]
    assert all(p.shared for p in after)
    assert len({p.plan.entries for p in steps}) == 1
    for p in steps[1:]:
        np.testing.assert_array_equal(p.layer.matrix, steps[0].layer.matrix)


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512"])
def test_a_compiled_network_in_another_order(name: str) -> None:
    """On the machine at hand, against float64, forced orders of all groups among the rest."""
    rng = np.random.default_rng(7)
    weights = [sparse(rng, *s, 0.1) for s in ((384, 96), (256, 384), (40, 256))]
    target = resolve(name)
    if target.lanes > resolve("x86").lanes:
        pytest.skip("needs AVX-512")
    mod = perceptron(*weights)
    x = rng.normal(size=(1, 96)).astype(np.float32)
    expected = x.astype(np.float64)
    for number, weight in enumerate(weights):
        expected = (np.maximum(expected, 0) if number else expected) @ weight.T.astype(np.float64)
    for way in (mod, shuffled(find_channel_groups(mod))):
        np.testing.assert_allclose(build(way, target).run(x), expected, rtol=1e-4, atol=1e-5)


# --- what is counted and told -------------------------------------------------------------------


def test_moves_that_are_counted() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(relax.op.permute_dims(x, [0, 2, 1]))  # 1
        y = bb.emit(relax.op.reshape(y, (1, 3, 4, 1)))
        y = bb.emit(relax.op.permute_dims(y, [0, 3, 1, 2]))  # moves an axis of extent 1
        y = bb.emit(relax.op.reshape(y, (3, 4)))
        y = bb.emit(relax.op.take(y, relax.const(np.array([2, 0]), "int64"), 0))  # a gather
        y = bb.emit(relax.op.strided_slice(y, [1], [0], [4], [2]))  # at a stride: another
        y = bb.emit(relax.op.strided_slice(y, [1], [0], [1]))
        w = bb.emit(relax.op.permute_dims(f32(np.ones((2, 1))), [1, 0]))  # of a constant
        return bb.emit(relax.op.matmul(y, w))

    assert count_moves(make(body, (1, 4, 3))) == Moves(gathers=2, transposes=1)


def test_the_report_tells_of_orders_and_moves() -> None:
    rng = np.random.default_rng(0)
    mod = perceptron(sparse(rng, 512, 128, 0.1), sparse(rng, 256, 512, 0.1))
    planned = detect(mod, AVX512)
    originals = {p.layer.name: p.layer for p in planned}
    _, planned = fuse_permutations(mod, planned, AVX512)
    report = Report(
        tuple(report_layers(originals, planned)),
        "x86",
        model_moves=Moves(1, 2),
        compiled_moves=Moves(0, 1),
    )
    text = str(report)
    assert "order: shared by matmul_1 rows, matmul_11 columns: predicted 1." in text
    assert "moves at run time: 0 gathers, 1 transposes (the model: 1, 2)" in text
    assert Report.from_json(report.to_json()) == report
    assert "moves" not in str(replace(report, compiled_moves=None))
