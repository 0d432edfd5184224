"""Channels on several axes: attention heads and their features; gates of recurrent cells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from channel_orders import free, frozen, groups_of, sides
from relax_nets import f32, normal
from tvm import relax
from tvm.ir import Expr

HEADS, SIZE, LENGTH = 3, 4, 5
WIDTH = HEADS * SIZE


def dense(bb: relax.BlockBuilder, x: Expr, rows: int, columns: int) -> Expr:
    y = bb.emit(relax.op.matmul(x, f32(normal(columns, rows))))
    return bb.emit(relax.op.add(y, f32(normal(rows))))


def heads(bb: relax.BlockBuilder, x: Expr, axes: list[int], batch: int) -> Expr:
    y = bb.emit(relax.op.reshape(x, (batch, LENGTH, HEADS, SIZE)))
    return bb.emit(relax.op.permute_dims(y, axes))


def attention(
    bb: relax.BlockBuilder,
    x: Expr,
    *,
    batch: int = 2,
    bias: np.ndarray | None = None,
    between: Callable[[Expr], Expr] | None = None,
) -> Expr:
    """Multi-head attention of `x`; `between` is done to the features of the values' heads."""
    q, k, v = (dense(bb, x, WIDTH, 6) for _ in range(3))
    scores = bb.emit(
        relax.op.matmul(heads(bb, q, [0, 2, 1, 3], batch), heads(bb, k, [0, 2, 3, 1], batch))
    )
    scores = bb.emit(relax.op.multiply(scores, f32(0.5)))
    if bias is not None:
        scores = bb.emit(relax.op.add(scores, f32(bias)))
    values = heads(bb, v, [0, 2, 1, 3], batch)
    values = values if between is None else bb.emit(between(values))
    y = bb.emit(relax.op.matmul(bb.emit(relax.op.nn.softmax(scores, -1)), values))
    y = bb.emit(relax.op.permute_dims(y, [0, 2, 1, 3]))
    return dense(bb, bb.emit(relax.op.reshape(y, (batch, LENGTH, WIDTH))), 7, WIDTH)


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_move_and_features_within_them(batch: int) -> None:
    groups = groups_of(lambda bb, x: attention(bb, x, batch=batch), (batch, LENGTH, 6))
    whole, *inner = groups.free
    assert (whole.size, whole.depth) == (HEADS, 0)
    every = ["matmul_1 rows", "matmul_11 rows", "matmul_13 rows", "matmul_15 columns"]
    names = {s.layer for s in whole.sides}
    assert len(whole.sides) == 4 and len(names) == 4 and sides(whole)[0] == every[0]
    assert all(s.index.shape == (HEADS, SIZE) for s in whole.sides)
    # queries with keys, and values with the columns of the output: in each head on their own
    assert [(g.size, g.depth) for g in inner] == [(SIZE, 1)] * (2 * HEADS)
    pairs = {tuple(s.side for s in g.sides) for g in inner}
    assert pairs == {("rows", "rows"), ("rows", "columns")}


def test_a_bias_per_head_follows() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        return attention(bb, x, bias=normal(HEADS, LENGTH, LENGTH))

    assert HEADS in free(groups_of(body, (2, LENGTH, 6))).values()


@pytest.mark.parametrize("shape", [(HEADS, 1, SIZE), (HEADS, 1, 1), (SIZE,)])
def test_constants_per_feature_and_per_head(shape: tuple[int, ...]) -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        return attention(bb, x, between=lambda v: relax.op.multiply(v, f32(normal(*shape))))

    sizes = sorted(g.size for g in groups_of(body, (2, LENGTH, 6)).free)
    features = 2 * HEADS if shape == (HEADS, 1, SIZE) else HEADS
    assert sizes == [HEADS] + [SIZE] * features


def test_features_whose_order_matters_stay() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        return attention(bb, x, between=lambda v: relax.op.cumsum(v, 3))

    groups = groups_of(body, (2, LENGTH, 6))
    assert any("cumsum" in reason for reason in frozen(groups).values())
    assert not any("columns" in s for g in groups.free for s in sides(g))


def test_one_head() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        q, k, v = (dense(bb, x, WIDTH, 6) for _ in range(3))
        scores = bb.emit(relax.op.matmul(q, bb.emit(relax.op.permute_dims(k, [0, 2, 1]))))
        y = bb.emit(relax.op.matmul(bb.emit(relax.op.nn.softmax(scores, -1)), v))
        return dense(bb, y, 7, WIDTH)

    assert [g.size for g in groups_of(body, (2, LENGTH, 6)).free] == [WIDTH, WIDTH]


def test_heads_joined_with_the_batch_keep_their_order() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(relax.op.reshape(dense(bb, x, WIDTH, 6), (LENGTH, 2 * HEADS, SIZE)))
        q = bb.emit(relax.op.permute_dims(y, [1, 0, 2]))
        k = bb.emit(relax.op.permute_dims(y, [1, 2, 0]))
        return bb.emit(relax.op.matmul(q, k))

    assert not groups_of(body, (LENGTH, 2, 6)).free


def lstm(bb: relax.BlockBuilder, x: Expr, *, steps: int, state: np.ndarray) -> Expr:
    """The last state of an LSTM over the rows of `x`, unrolled."""
    size = state.size
    recurrent = f32(normal(size, 4 * size))
    inputs = dense(bb, x, 4 * size, 3)
    h, c = f32(state.reshape(1, -1)), f32(np.zeros((1, size)))
    for t in range(steps):
        z = bb.emit(relax.op.strided_slice(inputs, [0], [t], [t + 1]))
        z = bb.emit(relax.op.add(z, bb.emit(relax.op.matmul(h, recurrent))))
        i, f, g, o = (
            bb.emit(relax.op.strided_slice(z, [1], [k * size], [(k + 1) * size])) for k in range(4)
        )
        forget = bb.emit(relax.op.multiply(bb.emit(relax.op.sigmoid(f)), c))
        new = bb.emit(relax.op.multiply(bb.emit(relax.op.sigmoid(i)), bb.emit(relax.op.tanh(g))))
        c = bb.emit(relax.op.add(forget, new))
        h = bb.emit(relax.op.multiply(bb.emit(relax.op.sigmoid(o)), bb.emit(relax.op.tanh(c))))
    return h


def test_gates_and_steps_of_a_cell_share_one_order() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        return dense(bb, lstm(bb, x, steps=3, state=normal(5)), 2, 5)

    (group,) = groups_of(body, (3, 3)).free
    assert group.size == 5
    widths = {s.layer + s.side: s.index.shape[1] for s in group.sides}
    assert set(widths.values()) == {1, 4}
    gates = group.sides[0].index
    np.testing.assert_array_equal(gates, np.arange(20).reshape(4, 5).T)


def test_a_cell_whose_state_is_the_result_keeps_its_order() -> None:
    groups = groups_of(lambda bb, x: lstm(bb, x, steps=3, state=np.zeros(5)), (3, 3))
    assert not groups.free
    assert set(frozen(groups).values()) == {"it is a result of the network"}
