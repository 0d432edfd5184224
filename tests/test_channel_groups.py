"""Which channels share an order, which may be given another one, and which not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from channel_orders import free, frozen, groups_of, shuffled, sides
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_nets import RandomNet, add, calls, chained, conv, f32, make, normal, times
from tvm import relax
from tvm.ir import Expr

from tvm_pivot.layout import Permutation
from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.channel_groups import find_channel_groups

RESULT = "it is a result of the network"


def dense(rows: int, columns: int) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.matmul(x, f32(normal(columns, rows)))


def point(rows: int, columns: int) -> Callable[[Expr], Expr]:
    return conv(normal(rows, columns, 1, 1))


def relu(x: Expr) -> Expr:
    return relax.op.nn.relu(x)


# --- layers, inputs and results -----------------------------------------------------------------


def test_rows_of_one_layer_are_columns_of_the_next() -> None:
    groups = groups_of(
        chained(conv(normal(6, 3, 3, 3), padding=1), relu, point(4, 6)), (2, 3, 5, 5)
    )
    first, last = groups.groups
    assert sides(first) == ["conv2d_1 rows", "conv2d_11 columns"] and not first.frozen
    assert sides(last) == ["conv2d_11 rows"] and last.frozen == RESULT
    np.testing.assert_array_equal(first.sides[0].index, np.arange(6)[:, None])


def test_inputs_and_results_keep_their_order() -> None:
    groups = groups_of(lambda bb, x: relax.op.add(bb.emit(point(3, 3)(x)), x), (1, 3, 4, 4))
    assert not groups.free
    groups = groups_of(chained(dense(5, 4), dense(3, 5)), (2, 4))
    assert free(groups) == {"matmul_1 rows": 5}


def test_channels_that_meet_an_input_are_frozen() -> None:
    def body(bb: relax.BlockBuilder, x: Expr, y: Expr) -> Expr:
        return bb.emit(point(2, 4)(bb.emit(relax.op.multiply(bb.emit(point(4, 3)(x)), y))))

    groups = groups_of(body, (1, 3, 4, 4), (1, 4, 4, 4))
    assert frozen(groups)["conv2d_1 rows"] == "it meets the input x1 of the network"
    # one that is the same for all channels does not matter
    assert free(groups_of(body, (1, 3, 4, 4), (1, 1, 4, 4))) == {"conv2d_1 rows": 4}


def test_an_operator_that_is_not_understood_freezes_what_it_reads() -> None:
    groups = groups_of(
        chained(point(4, 3), lambda x: relax.op.cumsum(x, 1), point(2, 4)), (1, 3, 4, 4)
    )
    assert "cumsum" in frozen(groups)["conv2d_1 rows"]


def test_layers_that_share_a_weight_share_their_order() -> None:
    weight = f32(normal(4, 4))

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        h = bb.emit(dense(4, 3)(x))
        for _ in range(3):
            h = bb.emit(relax.op.tanh(bb.emit(relax.op.matmul(h, weight))))
        return bb.emit(dense(2, 4)(h))

    groups = groups_of(body, (2, 3))
    (group,) = groups.free
    assert group.size == 4 and len(group.sides) == 8
    _, *used, _ = (call.args[1] for call in calls(shuffled(groups), "matmul"))
    assert len(used) == 3 and all(w.same_as(used[0]) for w in used)


def test_a_weight_shared_with_a_layer_at_the_input_is_frozen() -> None:
    weight = f32(normal(3, 3))

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        h = bb.emit(relax.op.tanh(bb.emit(relax.op.matmul(x, weight))))
        return bb.emit(dense(2, 3)(bb.emit(relax.op.matmul(h, weight))))

    reasons = frozen(groups_of(body, (2, 3)))
    assert "shared" in reasons["matmul_1 rows"]


# --- tied tensors -------------------------------------------------------------------------------


def test_a_residual_joins_both_producers() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(relax.op.add(bb.emit(point(4, 3)(x)), bb.emit(point(4, 3)(x))))
        return bb.emit(point(2, 4)(bb.emit(relu(y))))

    groups = groups_of(body, (1, 3, 4, 4))
    (group,) = groups.free
    assert sides(group) == ["conv2d_1 rows", "conv2d_11 rows", "conv2d_12 columns"]


def test_each_part_of_a_concatenation_is_a_group() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        parts = [bb.emit(point(n, 3)(x)) for n in (4, 2)]
        return bb.emit(point(5, 9)(bb.emit(relax.op.concat([*parts, x], 1))))

    groups = groups_of(body, (1, 3, 4, 4))
    assert free(groups) == {"conv2d_1 rows": 4, "conv2d_11 rows": 2}
    part = groups.free[1].sides[1]
    assert part.side == "columns"
    np.testing.assert_array_equal(part.index.ravel(), [4, 5])
    assert "input x0" in frozen(groups)["conv2d_12 columns"]


def test_densely_connected_layers_keep_a_group_each() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(point(4, 3)(x))
        for i in range(3):
            new = bb.emit(point(2, 4 + 2 * i)(bb.emit(relu(y))))
            y = bb.emit(relax.op.concat([y, new], 1))
        return bb.emit(point(3, 10)(y))

    groups = groups_of(body, (1, 3, 4, 4))
    assert sorted(g.size for g in groups.free) == [2, 2, 2, 4]
    assert len(groups.free[0].sides) == 5


def test_a_concatenation_along_another_axis_joins() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        parts = [bb.emit(point(4, 3)(x)) for _ in range(2)]
        return bb.emit(point(2, 4)(bb.emit(relax.op.concat(parts, 2))))

    assert list(free(groups_of(body, (1, 3, 4, 4))).values()) == [4]


def test_halves_of_a_split_that_meet_move_together() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(point(8, 3)(x))
        a, b = (bb.emit(relax.op.strided_slice(y, [1], [begin], [begin + 4])) for begin in (0, 4))
        gated = bb.emit(relax.op.multiply(a, bb.emit(relax.op.sigmoid(b))))
        return bb.emit(point(2, 4)(gated))

    (group,) = groups_of(body, (1, 3, 4, 4)).free
    assert group.size == 4
    np.testing.assert_array_equal(group.sides[0].index, [[0, 4], [1, 5], [2, 6], [3, 7]])


def test_halves_of_a_split_that_do_not_meet_are_two_groups() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        y = bb.emit(point(8, 3)(x))
        ends = [(0, 3), (3, 8)]
        cut = [bb.emit(relax.op.strided_slice(y, [1], [i], [j])) for i, j in ends]
        return [bb.emit(point(2, j - i)(c)) for c, (i, j) in zip(cut, ends, strict=True)]

    assert sorted(free(groups_of(body, (1, 3, 4, 4))).values()) == [3, 5]


def test_padding_by_whole_channels_leaves_the_others_where_they_are() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(point(4, 3)(x))
        short = bb.emit(relax.op.nn.pad(y, [0, 0, 2, 2, 0, 0, 0, 0]))
        z = bb.emit(relax.op.add(bb.emit(point(8, 4)(y)), short))
        return bb.emit(point(2, 8)(z))

    groups = groups_of(body, (1, 3, 8, 8))
    inside, outside = groups.free
    assert (inside.size, outside.size) == (4, 4)
    assert sorted(outside.sides[0].index.ravel()) == [0, 1, 6, 7]


# --- depthwise and grouped convolutions ---------------------------------------------------------


def test_depthwise_ties_input_and_output() -> None:
    groups = groups_of(
        chained(point(6, 3), conv(normal(6, 1, 3, 3), groups=6, padding=1), point(4, 6)),
        (1, 3, 6, 6),
    )
    (group,) = groups.free
    assert len(group.sides) == 4


def test_depthwise_on_an_input_keeps_its_order() -> None:
    groups = groups_of(chained(conv(normal(3, 1, 3, 3), groups=3), point(4, 3)), (1, 3, 6, 6))
    assert not groups.free


def test_groups_move_as_wholes_and_channels_within_them() -> None:
    groups = groups_of(
        chained(point(6, 3), relu, conv(normal(9, 2, 3, 3), groups=3, padding=1), point(4, 9)),
        (1, 3, 6, 6),
    )
    whole, *inner = groups.free
    assert (whole.size, whole.depth) == (3, 0)
    assert {tuple(s.index.shape) for s in whole.sides} == {(3, 2), (3, 3)}
    assert sorted((g.size, g.depth) for g in inner) == [(2, 1)] * 3 + [(3, 1)] * 3


def test_a_grouped_convolution_of_the_input_keeps_its_groups() -> None:
    groups = groups_of(chained(conv(normal(6, 2, 1, 1), groups=2), point(4, 6)), (1, 4, 6, 6))
    assert sorted((g.size, g.depth) for g in groups.free) == [(3, 1), (3, 1)]


def test_a_channel_shuffle_freezes_the_groups_it_mixes() -> None:
    def shuffle(x: Expr) -> Expr:
        return relax.op.reshape(x, (1, 2, 4, 5, 5))

    groups = groups_of(
        chained(
            point(8, 3),
            conv(normal(8, 4, 1, 1), groups=2),
            shuffle,
            lambda x: relax.op.permute_dims(x, [0, 2, 1, 3, 4]),
            lambda x: relax.op.reshape(x, (1, 8, 5, 5)),
            conv(normal(8, 4, 1, 1), groups=2),
            point(3, 8),
        ),
        (1, 3, 5, 5),
    )
    # what both layers see are the four quarters; before the first and after the second all is free
    assert sorted(g.size for g in groups.free) == [2, 2, 2, 2, 4, 4, 4, 4]


# --- what lies between layers -------------------------------------------------------------------

BETWEEN: dict[str, Callable[[Expr], Expr]] = {
    "scale per channel": times(normal(6, 1, 1)),
    "shift per channel and pixel": add(normal(1, 6, 5, 5)),
    "a shift for all": add(0.5),
    "prelu": lambda x: relax.op.nn.prelu(x, f32(normal(6))),
    "prelu with one slope": lambda x: relax.op.nn.prelu(x, f32([0.1])),
    "max pool": lambda x: relax.op.nn.max_pool2d(x, (3, 3), padding=1),
    "average pool": lambda x: relax.op.nn.avg_pool2d(x, (3, 3), padding=1),
    "global average": lambda x: relax.op.mean(x, [2, 3], True),
    "softmax over channels": lambda x: relax.op.nn.softmax(x, 1),
    "softmax over pixels": lambda x: relax.op.nn.softmax(x, 3),
    "resize": lambda x: relax.op.image.resize2d(x, (9, 9), layout="NCHW"),
    "layer norm over all": lambda x: relax.op.nn.layer_norm(
        x, f32(normal(6, 5, 5)), f32(normal(6, 5, 5)), [1, 2, 3]
    ),
    "layer norm over pixels": lambda x: relax.op.nn.layer_norm(
        x, f32(normal(5)), f32(normal(5)), [-1]
    ),
    "padding": lambda x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_channels_pass(name: str) -> None:
    groups = groups_of(
        chained(conv(normal(6, 3, 1, 1)), relu, BETWEEN[name], point(4, 6)), (1, 3, 5, 5)
    )
    assert free(groups) == {"conv2d_1 rows": 6}


@pytest.mark.parametrize(
    ("step", "columns"),
    [
        (lambda x: relax.op.cumsum(x, 1), 6),
        (lambda x: relax.op.permute_dims(x, [0, 2, 1, 3]), 5),
        (lambda x: relax.op.strided_slice(x, [1], [0], [6], [2]), 3),
        (lambda x: relax.op.nn.group_norm(x, f32(normal(6)), f32(normal(6)), 3, 1, [2, 3]), 6),
    ],
    ids=["running sum", "columns elsewhere", "every other channel", "group norm"],
)
def test_not_all_channels_pass(step: Callable[[Expr], Expr], columns: int) -> None:
    groups = groups_of(chained(point(6, 3), relu, step, point(4, columns)), (1, 3, 5, 5))
    assert 6 not in free(groups).values()


def test_squeeze_and_excite() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(point(8, 3)(x))
        s = bb.emit(point(2, 8)(bb.emit(relax.op.mean(y, [2, 3], True))))
        s = bb.emit(relax.op.sigmoid(bb.emit(point(8, 2)(bb.emit(relu(s))))))
        return bb.emit(point(4, 8)(bb.emit(relax.op.multiply(y, s))))

    groups = groups_of(body, (1, 3, 5, 5))
    assert sorted(free(groups).values()) == [2, 8]


def test_sums_over_channels_do_not_freeze_them() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(point(4, 3)(x))
        y = bb.emit(relax.op.multiply(y, bb.emit(relax.op.rsqrt(_mean_square(bb, y)))))
        return bb.emit(point(2, 4)(y))

    assert free(groups_of(body, (1, 3, 5, 5))) == {"conv2d_1 rows": 4}


def _mean_square(bb: relax.BlockBuilder, y: Expr) -> Expr:
    mean = bb.emit(relax.op.mean(bb.emit(relax.op.multiply(y, y)), [1], True))
    return bb.emit(relax.op.add(mean, f32(0.1)))


@pytest.mark.parametrize("last", [False, True], ids=["pixels within channels", "channels last"])
def test_a_flattened_channel_moves_with_its_pixels(last: bool) -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(relu(bb.emit(point(5, 3)(x))))
        y = bb.emit(relax.op.permute_dims(y, [0, 2, 3, 1])) if last else y
        return bb.emit(dense(4, 20)(bb.emit(relax.op.reshape(y, (2, 20)))))

    (group,) = groups_of(body, (2, 3, 2, 2)).free
    whole = np.arange(20).reshape(4, 5).T if last else np.arange(20).reshape(5, 4)
    np.testing.assert_array_equal(group.sides[1].index, whole)


def test_flattened_and_cut_again_elsewhere_is_frozen() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        flat = bb.emit(relax.op.reshape(bb.emit(point(6, 3)(x)), (1, 24)))
        return bb.emit(dense(2, 8)(bb.emit(relax.op.reshape(flat, (1, 3, 8)))))

    assert not groups_of(body, (1, 3, 2, 2)).free


# --- bit for bit --------------------------------------------------------------------------------


def test_moving_data_is_exact() -> None:
    """Rows of the layers are moved, nothing but the maximum over them is taken."""

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(relax.op.add(bb.emit(point(6, 3)(x)), bb.emit(point(6, 3)(x))))
        y = bb.emit(conv(normal(6, 1, 3, 3), groups=6)(bb.emit(relu(y))))
        y = bb.emit(relax.op.nn.max_pool2d(bb.emit(add(normal(6, 1, 1))(y)), (2, 2)))
        y = bb.emit(relax.op.concat([y, bb.emit(relax.op.nn.prelu(y, f32(normal(6))))], 1))
        return bb.emit(relax.op.max(y, [1]))

    groups = groups_of(body, (1, 3, 6, 6), exact=True)
    assert free(groups) == {"conv2d_1 rows": 6}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(0, 2**16))
def test_random_networks_keep_their_function(choose: random.Random, seed: int) -> None:
    shuffled(find_channel_groups(canonicalize(RandomNet(choose, seed, steps=9).build())))


def test_a_function_with_branches_has_no_groups() -> None:
    bb = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 2), "float32"))
    which = relax.Var("which", relax.TensorType((), "bool"))
    with bb.function("main", [x, which]):
        bb.emit_func_output(bb.emit(relax.If(which, relax.op.nn.relu(x), x)))
    assert find_channel_groups(bb.get()).groups == ()


def test_only_free_groups_take_a_permutation() -> None:
    groups = find_channel_groups(canonicalize(make(chained(dense(5, 4), dense(3, 5)), (2, 4))))
    for name, size, why in (
        ("matmul_1 rows", 4, "5 units"),
        ("matmul_11 rows", 3, RESULT),
        ("nothing", 3, "no such group"),
    ):
        with pytest.raises(ValueError, match=why):
            groups.orders({name: Permutation.identity(size)})
