"""Channels that share one order: which layers a reordering touches, and where it is free."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr, GenericConst, IRModule, Tuple, Var

from ..layout import Permutation
from . import channel_moves, channel_views
from .channel_freedom import Entries, Index, Units
from .channel_layers import layer_of
from .channel_values import Channels, Effect, every
from .channel_views import Place
from .graph import MAIN, array_of, is_straight_line, live_bindings, op_name, static_shape, variables

RESULT = "it is a result of the network"
LAYERS = ("matmul", "nn.conv2d")


@dataclass(frozen=True, eq=False)
class Side:
    """The rows or the columns of a layer that a group of channels covers.

    Attributes:
        layer: the name of the layer's variable in the canonical module.
        side: ``"rows"``, its output channels, or ``"columns"``, its input channels (of all groups
            of a grouped convolution, counted through; without the taps).
        index: int [units, width]: unit i of the group is rows or columns ``index[i]``, several
            where they move as a whole: pixels of a flattened channel, gates of a cell, features
            of a head. They are not in order of their numbers, but the same way for all units.
    """

    layer: str
    side: Literal["rows", "columns"]
    index: Index


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Units of channels that share one order across all layers and tensors they are tied to.

    Attributes:
        name: ``"conv1 rows"``, after the first of its sides; unique in a network.
        size: how many units.
        depth: how many units of others, free or frozen, it lies within: 1 for features of heads.
        sides: the layers it covers, in order of computation; for every layer rows first.
        frozen: why it must keep its order; empty where any permutation of its units is allowed.
        places: per axis of the analysis, int [units, width], its entries in each unit.
    """

    name: str
    size: int
    depth: int
    sides: tuple[Side, ...]
    frozen: str
    places: Mapping[int, Index]


@dataclass(frozen=True)
class Edit:
    """A constant argument whose `axes`, counted together, follow the channels `number`.

    With `groups`, they are the columns of a grouped convolution, and `rows` its rows.
    """

    position: int
    axes: tuple[int, ...]
    number: int
    groups: int = 1
    rows: int = -1


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The channel groups of a canonical module.

    Attributes:
        mod: the module.
        groups: free and frozen ones, outer groups before those within their units. Each free one
            may be given any permutation, independently of the others.
        edits: for each binding, the constants that follow the order of channels.
        roots: the axis of the analysis that stands for each one.
        sizes: entries of each axis.
        layers: the axis of the rows and columns of layers, by ``(name, side)``.
    """

    mod: IRModule
    groups: tuple[ChannelGroup, ...] = ()
    edits: Mapping[Var, tuple[Edit, ...]] = field(default_factory=dict)
    roots: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    layers: Mapping[tuple[str, Literal["rows", "columns"]], int] = field(default_factory=dict)

    @property
    def free(self) -> tuple[ChannelGroup, ...]:
        """The groups that may be given another order."""
        return tuple(g for g in self.groups if not g.frozen)

    def orders(self, chosen: Mapping[str, Permutation]) -> dict[int, Index]:
        """The order of each axis, by its root: position i holds entry ``order[i]`` of before.

        Raises:
            ValueError: `chosen` names a group that does not exist or is frozen, or has a
                permutation of another size.
        """
        known = {g.name: g for g in self.groups}
        for name, permutation in chosen.items():
            group = known.get(name)
            if group is None or group.frozen or group.size != permutation.size:
                why = "no such group" if group is None else group.frozen or f"{group.size} units"
                raise ValueError(f"channel group {name!r} cannot be given this order: {why}")
        orders = {r: every(self.sizes[r]) for r in sorted(set(self.roots))}
        # Inner groups first: the units of outer ones then take along what is in them.
        for group in sorted(self.groups, key=lambda g: -g.depth):
            if group.name in chosen:
                order = chosen[group.name].order
                for axis, index in group.places.items():
                    before = orders[axis]
                    orders[axis] = before.copy()
                    orders[axis][index] = before[index[order]]
        return orders

    def order_of(
        self, layer: str, side: Literal["rows", "columns"], orders: Mapping[int, Index]
    ) -> Index | None:
        """The order of a layer's rows or columns in `orders`; None where they keep theirs."""
        axis = self.layers.get((layer, side))
        if axis is None:
            return None
        order = orders[self.roots[axis]]
        return None if np.array_equal(order, every(order.size)) else order


def find_channel_groups(mod: IRModule) -> ChannelGroups:
    """Which channels of a canonical module share one order, which groups are free, and why not.

    A group is free if its units may be permuted in any way by rewriting constants only: the rows
    of some layers, the columns of others, and biases, slopes and scales between them. Results of
    the network stay the same, bit for bit where channels are only moved and up to the order of
    summation where layers, softmax, norms or means sum over them. Groups do not overlap but for
    nested ones (the features of each attention head, and the heads), and may be permuted
    independently.

    - Inputs and results of `main` keep their order: groups that meet them are frozen.
    - Residual additions and the like join groups; each part of a concatenation is one of its own.
    - Depthwise convolutions join input and output; rows and columns of other grouped
      convolutions move within their group, and whole groups move together.
    - Channels move within the groups of a group norm, and groups of it as a whole.
    - Pixels of a flattened channel and gates of a recurrent cell move as one unit.
    - Layers that share one weight, as the steps of a recurrence do, share their order.
    - An operator that is not understood freezes what it reads.

    A module with branches has no groups.
    """
    if not is_straight_line(mod[MAIN]):
        return ChannelGroups(mod)
    walk = _Walk(mod[MAIN])
    entries = walk.entries
    roots = tuple(entries.root(a) for a in range(len(entries.sizes)))
    groups = _named(walk, [units for units in entries.units() if units.size > 1])
    edits = {var: tuple(made) for var, made in walk.edits.items()}
    layers = {(layer, side): axis for layer, side, axis in walk.sides}
    return ChannelGroups(mod, groups, edits, roots, tuple(entries.sizes), layers)


def _named(walk: _Walk, found: list[Units]) -> tuple[ChannelGroup, ...]:
    """The groups that cover rows or columns of layers."""
    on_axis: dict[int, list[tuple[int, str, Literal["rows", "columns"]]]] = defaultdict(list)
    for number, (layer, side, axis) in enumerate(walk.sides):
        on_axis[walk.entries.root(axis)].append((number, layer, side))
    groups, names = [], Counter[str]()
    for units in found:
        sides = [
            (number, Side(layer, side, index))
            for axis, index in units.places.items()
            for number, layer, side in on_axis.get(axis, ())
        ]
        if not sides:
            continue
        ordered = tuple(side for _, side in sorted(sides, key=lambda s: s[0]))
        name = f"{ordered[0].layer} {ordered[0].side}"
        names[name] += 1
        name += f" {names[name]}" if names[name] > 1 else ""
        groups.append(
            ChannelGroup(name, units.size, units.depth, ordered, units.frozen, units.places)
        )
    return tuple(groups)


class _Walk:
    """One pass over a function that notes where channels are and what ties them.

    Attributes:
        entries: the channels, axis by axis.
        sides: rows and columns of layers, and the axis of `entries` that they are.
        edits: the constants that follow, by binding.
    """

    def __init__(self, func: relax.Function) -> None:
        self.entries = Entries()
        self.sides: list[tuple[str, Literal["rows", "columns"], int]] = []
        self.edits: dict[Var, list[Edit]] = defaultdict(list)
        self._places: dict[Expr, Place] = {}
        self._single: dict[Expr, Place] = {}
        self._weights: dict[Expr, tuple[int, int | None]] = {}
        self._inputs = set(func.params)
        for self._var, value in live_bindings(func):
            out = self._visit(value)
            if out is not None:
                self._places[self._var] = out
        for v in variables(func.body.body):
            self._freeze(v, RESULT)

    # --- what rules ask and tell ---

    def known(self, expr: Expr) -> Place | None:
        """Where the channels of a tensor are."""
        return self._places.get(expr)

    def adopt(self, expr: Expr, axes: tuple[int, ...]) -> Place:
        """Channels of a tensor without known ones, on `axes`; they keep their order."""
        shape = static_shape(expr) or ()
        sizes = tuple(shape[a] for a in axes)
        place = Place(axes, sizes, self.entries.axis(int(np.prod(sizes))))
        if isinstance(expr, GenericConst):
            why = "it is joined with a constant"
        elif expr in self._inputs:
            why = f"it meets the input {expr.name} of the network"
        else:
            why = f"it meets {expr.name}, whose channels are not followed"
        self.entries.freeze(place.number, why)
        return place

    def edit(self, position: int, axes: tuple[int, ...], number: int) -> None:
        """A constant argument of the binding at hand follows the order of its channels."""
        self.edits[self._var].append(Edit(position, axes, number))

    # --- one binding ---

    def _visit(self, value: Expr) -> Place | None:
        if isinstance(value, Var):
            return self._places.get(value)
        if isinstance(value, Call):
            out = self._layer(value)
            if out is None and (rule := channel_views.RULES.get(op_name(value))) is not None:
                result = rule(self, value)
                if result is not None:
                    return result[0] if result else None
            out = out or self._moved(value)
            if out is not None:
                return out
        reason = f"it is read by {op_name(value)}, through which channels are not followed"
        for v in variables(value):
            self._freeze(v, RESULT if isinstance(value, Tuple) else reason)
        return None

    def _freeze(self, expr: Expr, reason: str) -> None:
        place = self._places.get(expr)
        if place is not None:
            self.entries.freeze(place.number, reason)

    def _on_one_axis(self, expr: Expr) -> Place | None:
        """Channels on one axis: where they lie on several, whole entries of the first."""
        place = self._places.get(expr)
        if place is None or len(place.axes) <= 1:
            return place
        if expr not in self._single:
            size = place.sizes[0]
            number = self.entries.axis(size)
            outer = every(place.size) // (place.size // size)
            self.entries.part(number, outer, place.number, every(place.size), ordered=True)
            self._single[expr] = Place(place.axes[:1], (size,), number)
        return self._single[expr]

    def _channels(self, expr: Expr) -> Channels | None:
        """As `channel_values` knows them, nothing known of their values."""
        place = self._on_one_axis(expr)
        return (
            Channels(place.axes[0], np.full(place.size, np.nan)) if place and place.axes else None
        )

    # --- layers ---

    def _layer(self, call: Call) -> Place | None:
        """A layer with constant weights: its rows are new channels."""
        if op_name(call) not in LAYERS or array_of(call.args[1]) is None:
            return None
        known = self._on_one_axis(call.args[0])
        layer = layer_of(call, self._channels)
        if layer is None:
            return self._grouped(call, known)
        if layer.depthwise:
            assert known is not None
            self._notes(call, known.number, known.number, ())
            self.edit(1, (0,), known.number)
            return known
        read = known if layer.columns is not None else None
        if known is not None and read is None:
            self._freeze(call.args[0], "a layer reads it along another axis")
        rows = self.entries.axis(layer.rows)
        dense = op_name(call) == "matmul"
        edits = [Edit(1, (1,) if dense else (0,), rows)]
        if read is not None:
            edits.append(Edit(1, (0,) if dense else (1,), read.number))
        self._notes(call, rows, None if read is None else read.number, edits)
        return Place((layer.axis,), (layer.rows,), rows)

    def _grouped(self, call: Call, known: Place | None) -> Place | None:
        """A grouped convolution: its groups are wholes, of input as of output channels."""
        weight = array_of(call.args[1]) if op_name(call) == "nn.conv2d" else None
        if weight is None or call.attrs.data_layout != "NCHW" or call.attrs.kernel_layout != "OIHW":
            return None
        groups, attrs = int(call.attrs.groups), call.attrs
        if groups == 1 or attrs.out_layout != "NCHW":
            return None
        if known is None or known.axes != (1,):
            self._freeze(call.args[0], "a layer reads it along another axis")
            known = self.adopt(call.args[0], (1,))
        rows, wholes = self.entries.axis(weight.shape[0]), self.entries.axis(groups)
        for number, size in ((known.number, known.size), (rows, weight.shape[0])):
            outer = every(size) // (size // groups)
            self.entries.part(wholes, outer, number, every(size), ordered=False)
        both = Edit(1, (1,), known.number, groups, rows)
        self._notes(call, rows, known.number, [Edit(1, (0,), rows), both])
        return Place((1,), (weight.shape[0],), rows)

    def _notes(
        self, call: Call, rows: int, columns: int | None, edits: list[Edit] | tuple[Edit, ...]
    ) -> None:
        """Note a layer; layers with the same weight have the same orders."""
        self.edits[self._var] += edits
        name = str(self._var.name)
        self.sides.append((name, "rows", rows))
        if columns is not None:
            self.sides.append((name, "columns", columns))
        first_rows, first_columns = self._weights.setdefault(call.args[1], (rows, columns))
        same = every(self.entries.sizes[rows])
        self.entries.same(first_rows, same, rows, same)
        if first_columns is not None and columns is not None:
            same = every(self.entries.sizes[columns])
            self.entries.same(first_columns, same, columns, same)
        alone = columns if first_columns is None else first_columns
        if alone is not None and None in (columns, first_columns):
            self.entries.freeze(
                alone, "its weight is shared with a layer whose input keeps its order"
            )

    # --- what `channel_moves` knows ---

    def _moved(self, call: Call) -> Place | None:
        name = op_name(call)
        rule = channel_moves.RULES.get(name)
        if name == "concat":
            self._adopt_parts(call)
        effect = None if rule is None else rule(call, self._channels)
        return None if effect is None else self._follow(effect)

    def _adopt_parts(self, call: Call) -> None:
        """Give the parts of a concatenation that have no channels those of the others' axis."""
        parts = call.args[0]
        places = [self._on_one_axis(f) for f in parts.fields] if isinstance(parts, Tuple) else []
        axes = {p.axes for p in places if p is not None}
        if len(axes) != 1:
            return
        (axis,) = axes
        for part, place in zip(parts.fields, places, strict=True):
            if place is None and static_shape(part) is not None:
                self._places[part] = self.adopt(part, axis)

    def _follow(self, effect: Effect) -> Place:
        size = len(effect.out.values)
        number = self.entries.axis(size)
        for tie in effect.ties:
            source = self._on_one_axis(tie.source)
            assert source is not None
            if np.unique(tie.inner).size < tie.inner.size:
                self.entries.part(source.number, tie.inner, number, tie.outer, ordered=True)
            elif np.unique(tie.outer).size < tie.outer.size:
                self.entries.part(number, tie.outer, source.number, tie.inner, ordered=True)
            else:
                self.entries.same(source.number, tie.inner, number, tie.outer)
        for position, axis in effect.constants:
            self.edit(position, (axis,), number)
        return Place((effect.out.axis,), (size,), number)
