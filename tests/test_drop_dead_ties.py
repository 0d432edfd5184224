"""Channels that go or stay together: residuals, concatenations, shortcuts, depthwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from dead_channels import bias, dropped, kept, relu, weights
from relax_nets import (
    calls,
    chained,
    conv,
    ops,
)
from tvm import relax
from tvm.ir import Expr

from tvm_pivot.relay_passes.graph import array_of, ints, static_shape

# --- channels that are tied ---------------------------------------------------------------------


def residual(
    first: np.ndarray, second: np.ndarray, third: np.ndarray, *also: int
) -> Callable[..., list[Expr]]:
    """third(relu(first(x) + second(x))), with results besides: 0 for first(x), 1 for second(x)."""

    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        a = bb.emit(bias(0.1, 0.2, 0.3, 0.4)(bb.emit(conv(first)(x))))
        b = bb.emit(conv(second)(x))
        y = bb.emit(relu(bb.emit(relax.op.add(a, b))))
        return [bb.emit(conv(third)(y)), *((a, b)[i] for i in also)]

    return body


def test_residual_drops_what_is_dead_in_both() -> None:
    both = weights(4, 3, 1, 1, dead_rows=[1])
    _, report = dropped(residual(both, both, weights(5, 4, 1, 1)), (1, 3, 4, 4))
    assert kept(report) == [(3, 3), (3, 3), (5, 3)]


def test_residual_keeps_what_is_dead_in_one() -> None:
    one = weights(4, 3, 1, 1, dead_rows=[1])
    _, report = dropped(residual(one, weights(4, 3, 1, 1), weights(5, 4, 1, 1)), (1, 3, 4, 4))
    assert report.changed == ()


def test_residual_drops_what_nobody_reads() -> None:
    unread = weights(5, 4, 1, 1, dead_columns=[0, 3])
    _, report = dropped(residual(weights(4, 3, 1, 1), weights(4, 3, 1, 1), unread), (1, 3, 4, 4))
    assert kept(report) == [(2, 3), (2, 3), (5, 2)]


def test_residual_keeps_unread_channels_of_a_result_and_zeroes_the_rest() -> None:
    unread = weights(5, 4, 1, 1, dead_columns=[0, 3])
    out, report = dropped(
        residual(weights(4, 3, 1, 1), weights(4, 3, 1, 1), unread, 0), (1, 3, 4, 4)
    )
    assert report.changed == ()
    second = array_of(calls(out, "nn.conv2d")[1].args[1])
    np.testing.assert_array_equal(second.any(axis=(1, 2, 3)), [False, True, True, False])


def test_column_read_by_another_consumer_stays() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        y = bb.emit(relu(bb.emit(conv(weights(4, 3, 1, 1))(x))))
        left = bb.emit(conv(weights(2, 4, 1, 1, dead_columns=[0, 1]))(y))
        right = bb.emit(conv(weights(2, 4, 1, 1, dead_columns=[1, 2]))(y))
        return [left, right]

    _, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(3, 3), (2, 3), (2, 3)]


def test_constant_that_one_consumer_cannot_fold_stays_for_it() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        y = bb.emit(bias(1, 1, 1, 1)(bb.emit(conv(weights(4, 3, 1, 1, dead_rows=[1, 2]))(x))))
        padded = bb.emit(conv(weights(2, 4, 3, 3, dead_columns=[2]), padding=1)(y))
        return [bb.emit(conv(weights(2, 4, 1, 1))(y)), padded]

    out, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(3, 3), (2, 3), (2, 3)]
    # the consumer that can fold it does not read it any more
    folded = array_of(calls(out, "nn.conv2d")[2].args[1])
    np.testing.assert_array_equal(folded[:, 1], 0)


def test_concatenation_passes_each_part_on() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        a = bb.emit(bias(1, 1, 1)(bb.emit(conv(weights(3, 3, 1, 1, dead_rows=[0]))(x))))
        b = bb.emit(conv(weights(2, 3, 1, 1))(x))
        return bb.emit(
            conv(weights(4, 5, 1, 1, dead_columns=[4]))(bb.emit(relax.op.concat([a, b], 1)))
        )

    _, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(2, 3), (1, 3), (4, 3)]


def test_concatenation_loses_a_part_that_is_dead() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        a = bb.emit(conv(weights(3, 3, 1, 1))(x))
        b = bb.emit(conv(weights(2, 3, 1, 1))(x))
        return bb.emit(
            conv(weights(4, 5, 1, 1, dead_columns=[3, 4]))(bb.emit(relax.op.concat([a, b], 1)))
        )

    out, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == [(3, 3), (0, 0), (4, 3)]
    assert "concat" not in ops(out)


def test_concatenation_with_an_input_is_left_alone() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        a = bb.emit(conv(weights(3, 3, 1, 1, dead_rows=[1]))(x))
        return bb.emit(conv(weights(4, 6, 1, 1))(bb.emit(relax.op.concat([a, x], 1))))

    _, report = dropped(body, (1, 3, 4, 4))
    assert report.changed == ()


def test_option_a_shortcut_pads_by_whole_channels() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(conv(weights(4, 3, 1, 1))(x))
        z = bb.emit(
            conv(weights(8, 4, 3, 3, dead_rows=[0, 7]), strides=2, padding=1)(bb.emit(relu(y)))
        )
        short = bb.emit(relax.op.strided_slice(y, [2, 3], [0, 0], [8, 8], [2, 2]))
        short = bb.emit(relax.op.nn.pad(short, [0, 0, 2, 2, 0, 0, 0, 0]))
        out = bb.emit(relu(bb.emit(relax.op.add(z, short))))
        return bb.emit(conv(weights(2, 8, 1, 1, dead_columns=[3]))(out))

    out, report = dropped(body, (1, 3, 8, 8))
    # channel 3 is not read, but it is channel 1 of the shortcut, which is
    assert kept(report) == [(4, 3), (6, 4), (2, 6)]
    assert ints(calls(out, "nn.pad")[0].attrs.pad_width)[2:4] == (1, 1)
    assert "nn.pad" in ops(out)


@pytest.mark.parametrize("stride", [1, 2])
def test_slices_of_channels(stride: int) -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        y = bb.emit(conv(weights(8, 3, 1, 1, dead_rows=[3]))(x))
        halves = [
            bb.emit(relax.op.strided_slice(y, [1], [begin], [begin + 4], [stride]))
            for begin in (0, 4)
        ]
        columns = static_shape(halves[0])[1]
        dead = weights(2, columns, 1, 1, dead_columns=[0])
        return [bb.emit(conv(dead)(halves[0])), bb.emit(conv(weights(2, columns, 1, 1))(halves[1]))]

    _, report = dropped(body, (1, 3, 4, 4))
    assert kept(report) == ([(6, 3), (2, 2), (2, 4)] if stride == 1 else [(3, 3), (2, 1), (2, 2)])


# --- depthwise and grouped convolutions ---------------------------------------------------------


def depthwise(w: np.ndarray, padding: int = 1) -> Callable[[Expr], Expr]:
    return conv(w, groups=w.shape[0], padding=padding)


def test_depthwise_passes_dead_channels_both_ways() -> None:
    out, report = dropped(
        chained(
            conv(weights(6, 3, 1, 1, dead_rows=[0])),  # zero: survives the padding
            depthwise(weights(6, 1, 3, 3, dead_rows=[1])),
            bias(1, 2, 3, 4, 5, 6),
            relu,
            conv(weights(4, 6, 1, 1, dead_columns=[2])),
        ),
        (1, 3, 6, 6),
    )
    assert kept(report) == [(3, 3), (3, 1), (4, 3)]
    assert int(calls(out, "nn.conv2d")[1].attrs.groups) == 3


def test_depthwise_keeps_a_constant_next_to_its_padding() -> None:
    def net(padding: int) -> tuple[int, int]:
        _, report = dropped(
            chained(
                conv(weights(3, 3, 1, 1, dead_rows=[0])),
                bias(1, 2, 3),
                depthwise(weights(3, 1, 3, 3), padding),
                conv(weights(4, 3, 1, 1)),
            ),
            (1, 3, 6, 6),
        )
        return kept(report)[1]

    assert net(padding=1) == (3, 1)
    assert net(padding=0) == (2, 1)


def test_depthwise_on_an_input_stays_whole() -> None:
    _, report = dropped(
        chained(
            depthwise(weights(3, 1, 3, 3, dead_rows=[1])),
            conv(weights(4, 3, 1, 1, dead_columns=[0])),
        ),
        (1, 3, 6, 6),
    )
    assert report.changed == ()


def test_grouped_convolutions_are_left_alone() -> None:
    _, report = dropped(
        chained(
            conv(weights(4, 3, 1, 1, dead_rows=[1])),
            conv(weights(6, 2, 3, 3, dead_rows=[2], dead_columns=[0]), groups=2),
            conv(weights(2, 6, 1, 1, dead_columns=[5])),
        ),
        (1, 3, 6, 6),
    )
    assert report.changed == ()


def test_channel_multiplier_is_left_alone() -> None:
    _, report = dropped(
        chained(
            conv(weights(2, 3, 1, 1)), conv(weights(4, 1, 3, 3, dead_rows=[0, 1]), groups=2), relu
        ),
        (1, 3, 6, 6),
    )
    assert report.changed == ()
