"""Layers with dead rows and columns, and the checks common to the tests of `drop_dead`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from relax_nets import (
    add,
    assert_same_function,
    calls,
    f32,
    make,
    normal,
    ops,
)
from tvm import relax
from tvm.ir import Expr, IRModule

from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.drop_dead import DropReport, drop_dead
from tvm_pivot.relay_passes.graph import array_of, static_shape


def weights(
    rows: int,
    columns: int,
    *taps: int,
    dead_rows: Sequence[int] = (),
    dead_columns: Sequence[int] = (),
) -> np.ndarray:
    """Weights [rows, columns, *taps] without zeros but for whole rows and columns."""
    w = normal(rows, columns, *taps)
    w[w == 0] = 1
    w[list(dead_rows)] = 0
    w[:, list(dead_columns)] = 0
    return w


def dense(w: np.ndarray) -> Callable[[Expr], Expr]:
    """A dense layer with weights [rows, columns]."""
    return lambda x: relax.op.matmul(x, f32(w.T))


def bias(*values: float) -> Callable[[Expr], Expr]:
    """A bias per channel of an NCHW tensor."""
    return add(np.array(values).reshape(1, -1, 1, 1))


def relu(x: Expr) -> Expr:
    return relax.op.nn.relu(x)


def flatten(x: Expr) -> Expr:
    return relax.op.reshape(x, (static_shape(x)[0], -1))


def dropped(
    body: Callable[..., Expr | Sequence[Expr]], *shapes: Sequence[int]
) -> tuple[IRModule, DropReport]:
    """The net without what is dead, after a check that it computes the same and is stable."""
    mod = make(body, *shapes)
    out, report = drop_dead(canonicalize(mod))
    assert_same_function(mod, out)
    again, second = drop_dead(out)
    assert second.changed == () and ops(again) == ops(out)
    assert report.weights[1] == sum(
        array_of(c.args[1]).size for name in ("matmul", "nn.conv2d") for c in calls(out, name)
    )
    return out, report


def kept(report: DropReport) -> list[tuple[int, int]]:
    """(rows, columns) of each layer afterwards."""
    return [(d.rows[1], d.columns[1]) for d in report.layers]
