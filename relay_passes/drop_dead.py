"""Drop rows and columns that are dead, across layers, without changing the function.

A channel need not be computed if no consumer reads it, or if it is a constant that every
consumer can move into its bias. Channels tied by residual additions, concatenations, depthwise
convolutions and the like go or stay together; what stays only for the sake of others becomes
zero. One walk forwards finds the constants, one backwards what is needed, and since the graph
has no cycles the two suffice.

Activations are taken to be finite: zero times infinity counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tvm import relax
from tvm.ir import Expr, IRModule, Var

from .canonicalize import canonicalize
from .channel_layers import ChannelLayer, layer_of
from .channel_moves import RULES
from .channel_values import Channels, Effect, Index, Mask
from .graph import (
    MAIN,
    Rewriter,
    array_of,
    constant,
    dtype_of,
    is_straight_line,
    live_bindings,
    op_name,
    static_shape,
    variables,
)


@dataclass(frozen=True)
class LayerDrop:
    """What was dropped from one layer.

    Attributes:
        name: the variable of the layer in the module given to `drop_dead`.
        op: ``"dense"`` or ``"conv2d"``.
        rows: output channels before and after.
        columns: input channels before and after (per group, so 1 where depthwise).
        weights: weights before and after, zeros included.
    """

    name: str
    op: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    weights: tuple[int, int]


@dataclass(frozen=True)
class DropReport:
    """What `drop_dead` did, layer by layer in the order of computation."""

    layers: tuple[LayerDrop, ...] = ()

    @property
    def weights(self) -> tuple[int, int]:
        """Weights of all layers before and after, zeros included."""
        return (
            sum(layer.weights[0] for layer in self.layers),
            sum(layer.weights[1] for layer in self.layers),
        )

    @property
    def changed(self) -> tuple[LayerDrop, ...]:
        """The layers that lost something."""
        return tuple(d for d in self.layers if d.weights[0] != d.weights[1])

    def __str__(self) -> str:
        lines = [
            f"{d.name} {d.op}: rows {d.rows[0]} -> {d.rows[1]}, columns {d.columns[0]} -> "
            f"{d.columns[1]}, weights {d.weights[0]} -> {d.weights[1]}"
            for d in self.changed
        ]
        before, after = self.weights
        return "\n".join([*lines, f"weights {before} -> {after}"])


def drop_dead(mod: IRModule) -> tuple[IRModule, DropReport]:
    """The canonical module without dead rows and columns, and what was dropped.

    Parameters and results of `main` keep their shapes. A module that is not one straight line,
    or in which nothing is dead, comes back as it is.
    """
    if not is_straight_line(mod[MAIN]):
        return mod, DropReport()
    channels = _Analysis(mod[MAIN])
    report = channels.report()
    if not channels.anything_dead():
        return mod, report
    return canonicalize(Rewriter(mod).run(channels.rewrite)), report


@dataclass(frozen=True)
class _Tied:
    """Two tensors of which channels ``first[a[i]]`` and ``second[b[i]]`` go or stay together."""

    first: Var
    a: Index
    second: Var
    b: Index


@dataclass
class _Facts:
    """What is known of every tensor with channels."""

    channels: dict[Var, Channels] = field(default_factory=dict)
    layers: dict[Var, ChannelLayer] = field(default_factory=dict)
    effects: dict[Var, Effect] = field(default_factory=dict)

    def known(self, expr: Expr) -> Channels | None:
        """The channels of a variable."""
        return self.channels.get(expr) if isinstance(expr, Var) else None


class _Analysis:
    """Constant, needed and kept channels of a function, and the rewriting they lead to.

    Attributes:
        needed: per tensor, the channels whose values matter.
        keep: per tensor, the channels that stay: those, and all that are tied to them.
        settled: tensors of which all that matters is constant; nothing need be computed for them.
    """

    def __init__(self, func: relax.Function) -> None:
        self.bindings = live_bindings(func)
        self.facts = _Facts()
        for var, value in self.bindings:
            self._forward(var, value)
        self.needed = {v: np.zeros(len(c.values), bool) for v, c in self.facts.channels.items()}
        self.settled: set[Var] = set()
        self._need_all(func.body.body)
        for var, value in reversed(self.bindings):
            self._backward(var, value)
        self.keep = {v: mask.copy() for v, mask in self.needed.items()}
        self._close()

    def _forward(self, var: Var, value: Expr) -> None:
        """Find out what kind of operator this is, and its constant channels."""
        facts = self.facts
        layer = layer_of(value, facts.known)
        if layer is not None:
            facts.layers[var] = layer
            facts.channels[var] = Channels(layer.axis, layer.values())
            return
        rule = RULES.get(op_name(value))
        effect = rule(value, facts.known) if rule is not None else None
        if effect is not None:
            facts.effects[var] = effect
            facts.channels[var] = effect.out

    def _need_all(self, value: Expr) -> None:
        for v in variables(value):
            if v in self.needed:
                self.needed[v][:] = True

    def _backward(self, var: Var, value: Expr) -> None:
        """Pass on what is needed of a result to what it is computed from."""
        layer, effect = self.facts.layers.get(var), self.facts.effects.get(var)
        channels = self.facts.known(var)
        if channels is not None and not np.isnan(channels.values[self.needed[var]]).any():
            self.settled.add(var)
        elif layer is not None and layer.columns is not None:
            self.needed[layer.call.args[0]] |= layer.needed_columns(self.needed[var])
        elif effect is not None:
            for tie in effect.ties:
                np.logical_or.at(self.needed[tie.source], tie.inner, self.needed[var][tie.outer])
        else:
            self._need_all(value)

    def _ties(self) -> Iterator[_Tied]:
        """Every tie of the function, last binding first."""
        for var, _ in reversed(self.bindings):
            if var in self.settled:
                continue
            layer, effect = self.facts.layers.get(var), self.facts.effects.get(var)
            if layer is not None and layer.depthwise:
                every = np.arange(layer.rows, dtype=np.intp)
                yield _Tied(layer.call.args[0], every, var, every)
            for tie in effect.ties if effect is not None else ():
                yield _Tied(tie.source, tie.inner, var, tie.outer)

    def _close(self) -> None:
        """Keep whatever is tied to something kept, until nothing changes."""
        ties = list(self._ties())
        changed = True
        while changed:
            changed = False
            for tie in (*ties, *reversed(ties)):
                first, second = self.keep[tie.first], self.keep[tie.second]
                differ = first[tie.a] != second[tie.b]
                if differ.any():
                    first[tie.a[differ]] = True
                    second[tie.b[differ]] = True
                    changed = True

    def anything_dead(self) -> bool:
        """Whether rewriting would change anything."""
        folded = any(layer.offsets.any() for layer in self.facts.layers.values())
        unread = not all(mask.all() for mask in self.needed.values())
        return folded or unread or bool(self.settled)

    def _columns(self, layer: ChannelLayer) -> Mask | None:
        """Which columns of a layer are kept; None where its input has no known channels."""
        return None if layer.columns is None else self.keep[layer.call.args[0]]

    def rewrite(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """A binding without what is dead; nothing refers to one that is dead altogether."""
        keep = self.keep.get(var)
        if keep is None:
            return value
        if not keep.any():
            return relax.const(0.0, "float32")
        if var in self.settled:
            return self._constant(var, keep)
        layer = self.facts.layers.get(var)
        if layer is not None:
            columns = self._columns(layer)
            return layer.rebuild(value.args[0], keep, self.needed[var], columns, rw.emit)
        effect = self.facts.effects[var]
        masks = [self.keep[tie.source] for tie in effect.ties]
        if keep.all() and all(mask.all() for mask in masks):
            return value
        return effect.rebuild([rw.remap[tie.source] for tie in effect.ties], keep, masks)

    def _constant(self, var: Var, keep: Mask) -> Expr:
        """The kept channels of a tensor of which all that matters is constant."""
        channels, shape = self.facts.channels[var], list(static_shape(var) or ())
        shape[channels.axis] = int(keep.sum())
        values = np.where(self.needed[var], channels.values, 0)[keep]
        form = [-1 if i == channels.axis else 1 for i in range(len(shape))]
        return relax.op.broadcast_to(constant(values.reshape(form), dtype_of(var)), shape)

    def report(self) -> DropReport:
        """What is dropped from each layer."""
        dropped = (self._dropped(var, value) for var, value in self.bindings)
        return DropReport(tuple(d for d in dropped if d is not None))

    def _dropped(self, var: Var, value: Expr) -> LayerDrop | None:
        """The report on one binding, if it is a layer."""
        op = {"matmul": "dense", "nn.conv2d": "conv2d"}.get(op_name(value))
        weight = array_of(value.args[1]) if op is not None else None
        if op is None or weight is None or weight.ndim < 2:
            return None
        layer = self.facts.layers.get(var)
        if layer is None:  # left alone, as grouped convolutions are
            first, second = weight.shape[:2] if op == "conv2d" else weight.shape[:-3:-1]
            sizes = (first, first), (second, second), (weight.size, weight.size)
            return LayerDrop(str(var.name), op, *sizes)
        rows, columns, taps = layer.weight.shape
        kept = self._columns(layer)
        left = columns if kept is None or layer.depthwise else int(kept.sum())
        empty = var in self.settled
        after = 0 if empty else int(self.keep[var].sum())
        return LayerDrop(
            name=str(var.name),
            op=op,
            rows=(rows, after),
            columns=(columns, 0 if empty else left),
            weights=(rows * columns * taps, 0 if empty else after * left * taps),
        )
