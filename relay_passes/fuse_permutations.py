"""Choose one order for each group of channels, where that makes layers faster.

Kernels reach rows and columns through tables, so most plans run as fast in any order of the
channels, and their tables take the inverse along. What an order changes is how many steps a
matrix-vector layer makes that looks its inputs up in windows; its columns are the rows of the
layers before it, whose weights take the order for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tvm.ir import Expr, IRModule

from ..column_order import Counts, even_order
from ..layout import IntArray, Permutation
from ..report import SharedOrder
from ..schedules import tile_rule
from ..schedules.problems import Epilogue
from ..targets import PivotTarget
from ..windows import count_steps
from .apply_permutations import apply_permutations
from .channel_freedom import Index
from .channel_groups import ChannelGroup, ChannelGroups, find_channel_groups
from .graph import MAIN, live_bindings, op_name
from .layers import Layer, Plan, PlannedLayer, find_layers, rows_problem

# An order must promise this much in the layers that look up; elsewhere it costs nothing.
GAIN = 0.99
# Layers that look up and take less than this of a network's time are not worth the search.
WORTH = 0.01


def fuse_permutations(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget
) -> tuple[IRModule, list[PlannedLayer]]:
    """The module and its plans with an order for each channel group that gains by one.

    Only constants are rewritten: the result has the same operators. It is predicted to be faster as
    a whole, or is the module itself. Groups without a promise keep their order.

    Args:
        mod: the canonical module.
        planned: its layers, as `detect` planned them.
        target: what it is compiled for.
    """
    readers = _readers(mod, planned)
    if not readers:
        return mod, list(planned)
    groups = find_channel_groups(mod)
    choice = _Choice(groups, readers, target)
    for group in groups.free:
        choice.consider(group)
    if not choice.gains():
        return mod, list(planned)
    fused = apply_permutations(groups, choice.chosen)
    layers = {layer.name: layer for layer in find_layers(fused)}
    return fused, [choice.moved(_moved(p, layers[p.layer.name])) for p in planned]


def _moved(planned: PlannedLayer, layer: Layer) -> PlannedLayer:
    """A plan for the layer as it is found with its channels in another order."""
    return replace(planned, layer=replace(layer, geometry=planned.layer.geometry))


@dataclass(eq=False)
class _Reader:
    """A weight matrix that looks its inputs up in windows, in one way.

    Attributes:
        planned: the first layer that has it.
        mask: bool [N, K], its non-zeros in their own order.
        uses: how many layers have it.
        plan: the plan in the order chosen so far.
    """

    planned: PlannedLayer
    mask: npt.NDArray[np.bool_]
    uses: int
    plan: Plan


def _readers(mod: IRModule, planned: Sequence[PlannedLayer]) -> dict[str, _Reader]:
    """The readers, by the names of their layers, if worth it; steps of a recurrence share one."""
    looking_up = [p for p in planned if p.plan.window]
    cycles = sum(p.plan.cycles for p in looking_up)
    if not looking_up or cycles < WORTH * sum(p.plan.cycles for p in planned):
        return {}
    weights = {
        str(var.name): value.args[1]
        for var, value in live_bindings(mod[MAIN])
        if op_name(value) in ("matmul", "nn.conv2d")
    }
    alike: dict[tuple[Expr, int, int | None], _Reader] = {}
    found: dict[str, _Reader] = {}
    for p in looking_up:
        key = weights[p.layer.name], p.plan.window, p.layer.row_inputs
        if key not in alike:
            alike[key] = _Reader(p, p.layer.matrix != 0, 0, p.plan)
        found[p.layer.name] = alike[key]
        alike[key].uses += 1
    return found


class _Choice:
    """The orders chosen so far, group by group, and what the plans make of them.

    Attributes:
        chosen: by the names of the groups.
        shared: what to tell of each layer.
    """

    def __init__(
        self, groups: ChannelGroups, readers: Mapping[str, _Reader], target: PivotTarget
    ) -> None:
        self.groups = groups
        self.readers = readers
        self.target = target
        self.chosen: dict[str, Permutation] = {}
        self.orders = groups.orders({})
        self.shared: dict[str, tuple[SharedOrder, ...]] = {}

    def consider(self, group: ChannelGroup) -> None:
        """Choose an order for a group if the layers that look its channels up gain by it."""
        sides = {id(r): (r, s.index) for s in group.sides if (r := self._reads(s.layer, s.side))}
        if not sides:
            return
        order = even_order([_counts(reader, index) for reader, index in sides.values()])
        if order is None:
            return
        chosen = {**self.chosen, group.name: Permutation(order)}
        orders = self.groups.orders(chosen)
        plans = [(reader, self._plan(reader, orders)) for reader, _ in sides.values()]
        before = sum(reader.uses * reader.plan.cycles for reader, _ in plans)
        after = sum(reader.uses * plan.cycles for reader, plan in plans)
        if after >= GAIN * before:
            return
        self.chosen, self.orders = chosen, orders
        for reader, plan in plans:
            reader.plan = plan
        for s in group.sides:
            told = SharedOrder(group.name, s.side, round(before / after, 4))
            self.shared[s.layer] = (*self.shared.get(s.layer, ()), told)

    def gains(self) -> bool:
        """Whether all orders together pay: those of rows, too, change how rows meet in slices."""
        if not self.chosen:
            return False
        unique = {id(r): r for r in self.readers.values()}.values()
        for reader in unique:
            if self.groups.order_of(reader.planned.layer.name, "rows", self.orders) is not None:
                reader.plan = self._plan(reader, self.orders)
        before = sum(r.uses * r.planned.plan.cycles for r in unique)
        return sum(r.uses * r.plan.cycles for r in unique) < GAIN * before

    def _reads(self, layer: str, side: str) -> _Reader | None:
        return self.readers.get(layer) if side == "columns" else None

    def _plan(self, reader: _Reader, orders: Mapping[int, Index]) -> Plan:
        """A reader's plan with its rows and columns in these orders."""
        layer, plan = reader.planned.layer, reader.planned.plan
        mask = reader.mask
        rows = self.groups.order_of(layer.name, "rows", orders)
        columns = self.groups.order_of(layer.name, "columns", orders)
        mask = mask if rows is None else mask[rows]
        mask = mask if columns is None else mask[:, columns]
        steps = count_steps(mask, self.target.lanes, plan.window)
        problem = rows_problem(layer, plan, Epilogue())
        _, cycles = tile_rule(self.target).choose_rows(problem, steps, self.target)
        return replace(plan, entries=steps, cycles=cycles)

    def moved(self, planned: PlannedLayer) -> PlannedLayer:
        """A layer of the new module with the plan it had, its tables in the new order of rows."""
        name = planned.layer.name
        plan = self.readers[name].plan if name in self.readers else planned.plan
        order = self.groups.order_of(name, "rows", self.orders)
        if order is not None and not plan.keep_all:
            plan = replace(plan, slots=_slots(plan.slots, order))
        return replace(planned, plan=plan, shared=self.shared.get(name, ()))


def _counts(reader: _Reader, index: Index) -> Counts:
    """The non-zeros of each row in each unit of columns."""
    first, *more = index.T
    counts = reader.mask[:, first].astype(np.uint16)
    for places in more:
        counts += reader.mask[:, places]
    return counts


def _slots(slots: Sequence[IntArray], order: Index) -> tuple[IntArray, ...]:
    """The same blocks of rows, for each channel group, where position i holds row ``order[i]``."""
    rows = order.size // len(slots)
    place = np.empty(order.size, np.int32)
    place[order] = np.arange(order.size, dtype=np.int32) % rows
    came = order[::rows] // rows
    return tuple(place[group * rows + slots[group]] for group in came)
