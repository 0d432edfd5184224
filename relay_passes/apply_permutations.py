"""Give channel groups another order, by rewriting constants only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm.ir import Call, Expr, IRModule, Var

from ..layout import Permutation
from .channel_freedom import Index
from .channel_groups import ChannelGroups, Edit
from .graph import Array, Rewriter, array_of, constant


def apply_permutations(groups: ChannelGroups, chosen: Mapping[str, Permutation]) -> IRModule:
    """The module of `groups` with the units of some of them in another order.

    It has the same operators in the same order, and computes the same; only constants differ.

    Args:
        groups: what `find_channel_groups` found.
        chosen: a permutation of the units of each group that shall have one, by its name.

    Raises:
        ValueError: see `ChannelGroups.orders`.
    """
    orders = groups.orders(chosen)
    moved = {axis for axis, order in orders.items() if (order != np.arange(order.size)).any()}
    if not moved:
        return groups.mod
    # One new constant for all layers that share one: steps of a recurrence share their weights.
    written: dict[object, Expr] = {}

    def visit(_: Rewriter, var: Var, value: Expr) -> Expr:
        edits = [e for e in groups.edits.get(var, ()) if moved & _axes(groups, e)]
        if not edits or not isinstance(value, Call):
            return value
        args = list(value.args)
        for position in sorted({e.position for e in edits}):
            own = tuple(e for e in edits if e.position == position)
            roots = tuple(tuple(sorted(_axes(groups, e))) for e in own)
            key = (args[position], tuple((e.axes, e.groups) for e in own), roots)
            if key not in written:
                written[key] = _write(groups, args[position], own, orders)
            args[position] = written[key]
        return Call(value.op, args, value.attrs, list(value.ty_args))

    return Rewriter(groups.mod).run(visit)


def _axes(groups: ChannelGroups, edit: Edit) -> set[int]:
    """The axes of the analysis that a constant follows."""
    own = {groups.roots[edit.number]}
    return own if edit.groups == 1 else own | {groups.roots[edit.rows]}


def _write(
    groups: ChannelGroups, old: Expr, edits: tuple[Edit, ...], orders: dict[int, Index]
) -> Expr:
    value = array_of(old)
    assert value is not None
    for edit in edits:
        order = orders[groups.roots[edit.number]]
        if edit.groups > 1:
            value = _grouped_columns(value, edit.groups, order)
        else:
            value = _take(value, order, edit.axes)
    return constant(value)


def _take(value: Array, order: Index, axes: tuple[int, ...]) -> Array:
    """The array with its entries along some axes, counted together, in another order."""
    if len(axes) == 1:
        return np.take(value, order, axes[0])
    front = np.moveaxis(value, axes, range(len(axes)))
    flat = front.reshape(order.size, -1)[order].reshape(front.shape)
    return np.moveaxis(flat, range(len(axes)), axes)


def _grouped_columns(weight: Array, groups: int, order: Index) -> Array:
    """Weights [rows, columns of a group, ...], rows in order already, with columns in theirs."""
    columns = weight.shape[1]
    within = np.repeat((order % columns).reshape(groups, columns), len(weight) // groups, axis=0)
    return np.take_along_axis(weight, within.reshape(*within.shape, *[1] * (weight.ndim - 2)), 1)
