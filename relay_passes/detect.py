"""Detect pruned layers, and decide how each one is run: which block, sparse or dense, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from tvm.ir import IRModule

from ..pack import kept_blocks, longest_first
from ..pivot import gather_rows, natural_rows
from ..pivot_planted import DIAGONAL, EQUAL, diagonal_parts
from ..schedules import tile_rule
from ..schedules.cost import packing_cycles
from ..schedules.cuda_rows import MOST_SUMS
from ..schedules.depthwise_tiles import depthwise_cycles, depthwise_problem
from ..schedules.lookup import can_look_up
from ..schedules.problems import Epilogue, PlanesProblem
from ..targets import PivotTarget
from ..windows import count_steps
from .cuda_layers import cuda_cycles, fits_tensor_cores
from .layers import Layer, Plan, PlannedLayer, find_layers, laid_out, rows_problem
from .pivot_layer import SearchTime, pivoted_plans
from .split_tokens import split_tokens

# A sparse plan must promise at least this much: what the prediction is off by, about.
MARGIN = 0.9
# Vectors of an input window: more find fewer zeros in a step, but take longer to search.
WINDOWS = (2, 3)
# What of level 2 the planes of an image may take if they are unfolded.
UNFOLDED_SHARE = 0.4
# For the general search in a network whose builder does not say.
PIVOT_SECONDS = 2.0


def detect(
    mod: IRModule, target: PivotTarget, *, sparse: bool = True, pivot_seconds: float = PIVOT_SECONDS
) -> list[PlannedLayer]:
    """A plan for every dense and conv2d layer of the canonical module `mod`, in order.

    Args:
        mod: the canonical module.
        target: decides which blocks are considered, and the predicted cycles that rank them.
        sparse: False plans every layer dense: the same kernels, with no zero skipped.
        pivot_seconds: for the general search for orders of rows, in all layers together.
    """
    seconds, planned = SearchTime(pivot_seconds), list[PlannedLayer]()
    for layer in split_tokens(list(find_layers(mod)), target):
        # The steps of an unrolled recurrent layer have the same weights.
        known = next((p for p in reversed(planned) if _alike(p.layer, layer)), None)
        found = plan_layer(layer, target, sparse, seconds) if known is None else known
        planned.append(replace(found, layer=layer))
    return planned


def _alike(one: Layer, other: Layer) -> bool:
    """Whether two layers are the same but for their inputs."""
    same = (one.op, one.geometry) == (other.op, other.geometry)
    return same and np.array_equal(one.matrix, other.matrix)


def planes_problem(layer: Layer, plan: Plan, epilogue: Epilogue) -> PlanesProblem:
    """The layer as the planes kernel sees it."""
    g = laid_out(layer, plan).geometry
    height, width = g.y.output, g.x.output
    if g.pitch == width:
        height, width = 1, height * width
    return PlanesProblem(
        batch=g.batch,
        image_floats=g.image_floats,
        columns=layer.matrix.shape[1],
        rows=g.outputs,
        row_blocks=plan.row_blocks,
        block_rows=plan.block_rows,
        height=height,
        width=width,
        pitch=width if height == 1 else g.pitch,
        epilogue=epilogue,
        taps=g.y.kernel * g.x.kernel,
        groups=g.groups,
        lines=len(g.y.phases) * g.x.kernel,
        reach=g.y.halo,
        planes=len(g.y.phases) * len(g.plane_starts),
        shifts=0 if g.unfolded else g.x.halo,
    )


def plan_layer(
    layer: Layer, target: PivotTarget, sparse: bool, seconds: SearchTime | None = None
) -> PlannedLayer:
    """The cheapest plan for one layer, by predicted cycles; a dense plan where `sparse` is off.

    Without `seconds`, planted structure is all that orders of the rows are looked for.
    """
    dense = min(candidates(layer, target, keep_all=True), key=lambda plan: plan.cycles)
    best = dense
    if sparse and not np.all(layer.matrix):
        plans = list(candidates(layer, target, keep_all=False))
        plans += _pivoted(layer, target, plans, MARGIN * dense.cycles, seconds or SearchTime(0.0))
        kept = min(plans, key=lambda plan: plan.cycles)
        best = kept if kept.cycles < MARGIN * dense.cycles else dense
    return PlannedLayer(layer, best, dense.cycles, sparse)


def _pivoted(
    layer: Layer, target: PivotTarget, plans: list[Plan], limit: float, seconds: SearchTime
) -> Iterator[Plan]:
    """Those of `plans` that have blocks, with better orders of their rows, where any pays."""
    blocks = [plan for plan in plans if not plan.own_columns]
    # What a plan costs beside its kernel does not depend on the order.
    beside = blocks[0].cycles - _cycles(layer, blocks[0], target)
    blocks = [replace(plan, cycles=plan.cycles - beside) for plan in blocks]
    limit = min(limit, *(plan.cycles for plan in plans)) - beside
    masks = [m != 0 for m in layer.group_matrices()]
    found = pivoted_plans(masks, blocks, lambda p: _cycles(layer, p, target), limit, seconds)
    return (replace(plan, cycles=plan.cycles + beside) for plan in found)


def _is_rows(layer: Layer, target: PivotTarget) -> bool:
    """Too few pixels to fill a vector of them, and the input is a plain matrix."""
    return layer.row_inputs is not None and layer.row_inputs < target.lanes // 2


def candidates(layer: Layer, target: PivotTarget, keep_all: bool) -> Iterator[Plan]:
    """Plans with the rows in their own order, or those of equal support together."""
    in_rows = _is_rows(layer, target)
    masks = [m != 0 for m in layer.group_matrices()]
    if target.family == "cuda":
        yield from _cuda_candidates(layer, masks, target, keep_all)
        return
    problem = depthwise_problem(layer.geometry, Epilogue(), target)
    copies = 0.0
    if problem is not None:
        copies = packing_cycles(layer.geometry.batch * layer.geometry.image_floats, target)
        if keep_all:
            plan = _blocks(masks, 1, "depthwise", keep_all)
            yield replace(plan, cycles=depthwise_cycles(problem, target))
    unfolded = (False, True) if not in_rows and _may_unfold(layer, target) else (False,)
    for rows in (target.lanes, target.lanes // 2) if in_rows else target.block_rows:
        blocks = _blocks(masks, rows, "rows" if in_rows else "planes", keep_all)
        for plan in (replace(blocks, unfolded=so) for so in unfolded):
            yield replace(plan, cycles=_cycles(layer, plan, target) + copies)
    if in_rows and not keep_all:
        for plan in _own_columns(masks[0], target):
            yield replace(plan, cycles=_cycles(layer, plan, target))


def _cuda_candidates(
    layer: Layer, masks: list[npt.NDArray[np.bool_]], target: PivotTarget, keep_all: bool
) -> Iterator[Plan]:
    """Every block height in all forms, where they fit."""
    for rows in target.block_rows:
        if fits_tensor_cores(layer, rows, target):
            plan = _blocks(masks, rows, "tensor_cores", keep_all)
            yield replace(plan, cycles=_cycles(layer, plan, target))
        if layer.row_inputs is not None and rows * layer.row_inputs <= MOST_SUMS:
            plan = _blocks(masks, rows, "rows", keep_all)
            yield replace(plan, cycles=_cycles(layer, plan, target))
        if rows <= max(1, layer.geometry.outputs // layer.geometry.groups):
            plan = _blocks(masks, rows, "planes", keep_all)
            yield replace(plan, cycles=_cycles(layer, plan, target))


def _own_columns(mask: npt.NDArray[np.bool_], target: PivotTarget) -> Iterator[Plan]:
    """Every row with columns of its own: anywhere, or in the windows that the target can search."""
    lanes = target.lanes
    slots = longest_first(mask, lanes)
    steps = int(np.count_nonzero(mask, axis=1)[slots].max(axis=1).sum())
    plan = Plan("rows", lanes, True, False, steps, 0.0, (slots.ravel(),))
    yield plan
    if can_look_up(target):
        for window in WINDOWS:
            if window * lanes <= mask.shape[1]:
                steps = count_steps(mask, lanes, window)
                yield replace(plan, entries=steps, window=window)


def _blocks(
    masks: list[npt.NDArray[np.bool_]],
    rows: int,
    form: Literal["planes", "rows", "depthwise", "tensor_cores"],
    keep_all: bool,
) -> Plan:
    """R x 1 blocks in the rows' own order, or in the gathered one where that has fewer."""
    slots, entries, in_order = [], 0, 0
    for mask in masks:
        natural = natural_rows(mask.shape[0], rows)
        if keep_all:
            slots.append(natural)
            entries += natural.size // rows * mask.shape[1]
            continue
        orders = [natural]
        gathered = gather_rows(mask, rows)
        if not np.array_equal(natural, gathered):
            orders.append(gathered)
        kept = [int(np.count_nonzero(kept_blocks(mask, order, rows))) for order in orders]
        entries, in_order = entries + min(kept), in_order + kept[0]
        slots.append(orders[kept.index(min(kept))])
    pivot = ""
    if entries < in_order:
        parts = [diagonal_parts(mask) for mask in masks]
        pivot = EQUAL if None in parts else DIAGONAL
    return Plan(
        form,
        rows,
        False,
        keep_all,
        entries,
        0.0,
        tuple(slots),
        pivot=pivot,
        natural_entries=in_order,
    )


def _cycles(layer: Layer, plan: Plan, target: PivotTarget) -> float:
    if target.family == "cuda":
        return cuda_cycles(layer, plan, target)
    rule = tile_rule(target)
    if plan.form == "planes":
        problem = planes_problem(layer, plan, Epilogue())
        cycles = rule.choose_planes(problem, plan.entries, target)[1]
        return cycles + (_unfolding_cycles(layer, target) if plan.unfolded else 0.0)
    return rule.choose_rows(rows_problem(layer, plan, Epilogue()), plan.entries, target)[1]


def _may_unfold(layer: Layer, target: PivotTarget) -> bool:
    """Whether planes unfolded along x are worth a look: those of an image stay in level 2."""
    g = replace(layer.geometry, unfolded=True)
    small = 4 * g.image_floats <= UNFOLDED_SHARE * target.l2_bytes
    return target.family == "x86" and layer.op != "dense" and not g.direct and small


def _unfolding_cycles(layer: Layer, target: PivotTarget) -> float:
    """What the copy to unfolded planes takes more than that to others."""
    g = layer.geometry
    more = replace(g, unfolded=True).image_floats - g.image_floats
    return packing_cycles(g.batch * more, target)
