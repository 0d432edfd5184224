"""The kernel of a layer and its tables, once everything about it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
from tvm import tirx

from ..layout import BlockShape, IntArray, PackedWeight, SlicedWeight
from ..pack import pack, pack_sliced
from ..planes import WHOLE, Parts, aligned_floats, rows_of_part
from ..schedules import cpu_tiles, tile_rule
from ..schedules.aligned_planes import with_aligned
from ..schedules.bands import in_bands
from ..schedules.block_sparse import BEYOND, OUTPUT, planes_kernel, rows_kernel
from ..schedules.block_sparse_moves import schedule_planes, schedule_rows
from ..schedules.choices import (
    HOPELESS,
    WORST,
    Choice,
    Form,
    Tile,
    depthwise_choices,
    planes_choices,
    rows_choices,
)
from ..schedules.cost import packing_cycles, rows_cycles
from ..schedules.depthwise import depthwise_kernel
from ..schedules.depthwise_tiles import (
    DepthwiseProblem,
    DepthwiseTile,
    choose_depthwise,
    share_depthwise,
)
from ..schedules.isolated_tasks import isolate_tasks
from ..schedules.problems import Epilogue, PlanesProblem, PlanesTile, RowsProblem, RowsTile
from ..schedules.store_once import STORES_ONCE, store_freely
from ..targets import PivotTarget
from ..windows import pack_windows
from .cuda_kernels import cuda_choices, cuda_kernel, cuda_rule_choice
from .detect import planes_problem
from .layers import Handover, Layer, Lead, Plan, in_parts, laid_out, on_cache_lines, rows_problem
from .pack_layer import LayerKernel, pack_planes_layer, tables_of
from .winograd_layers import winograd_layer

Problem = PlanesProblem | RowsProblem | DepthwiseProblem

# Parameters of a kernel that are images as it writes them.
WRITTEN = (OUTPUT, "residual")
# Of level 2, for a residual that all cores hold: larger ones have mostly left it.
HELD_SHARE = 0.5


def problem_of(layer: Layer, plan: Plan, epilogue: Epilogue) -> Problem:
    """The layer as the kernel of its plan sees it, in whole images."""
    if plan.form == "depthwise":
        return DepthwiseProblem.of(layer.geometry, epilogue)
    make = rows_problem if plan.form == "rows" else planes_problem
    return make(layer, plan, epilogue)


def rule_choice(layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> Choice:
    """What the target's rule chooses for a plan, for one core."""
    if target.family == "cuda":
        return cuda_rule_choice(layer, plan, epilogue, target)
    one, rule = replace(target, cores=1), tile_rule(target)
    problem = problem_of(layer, plan, epilogue)
    if isinstance(problem, RowsProblem):
        rows, _ = rule.choose_rows(problem, plan.entries, one)
        return _choice(plan, rows)
    if isinstance(problem, DepthwiseProblem):
        return _choice(plan, choose_depthwise(problem, one))
    # Whether there are bands depends on the cores, which share them.
    bands = None if _direct(layer) else rule.choose_bands(problem, plan.entries, target)
    if bands is None:
        return _choice(plan, rule.choose_planes(problem, plan.entries, one)[0])
    count = cpu_tiles.band_count(problem, bands.rows)
    tile, _ = rule.choose_planes(problem.band(bands.rows), plan.entries, one, count)
    return replace(_choice(plan, tile), band_rows=bands.rows)


def _choice(plan: Plan, tile: Tile) -> Choice:
    form: Form = plan.form
    blocks = plan.block_rows, tile, plan.keep_all, plan.own_columns, plan.window
    return Choice(form, *blocks, unfolded=plan.unfolded)


def _direct(layer: Layer) -> bool:
    return layer.op == "dense" or layer.geometry.direct


def layer_choices(
    layer: Layer, plans: Sequence[Plan], epilogue: Epilogue, target: PivotTarget
) -> dict[Choice, float]:
    """The space of a layer: every choice for one of its plans, with predicted cycles on one core.

    Choices that are predicted to be much slower than the best are left out.
    """
    if target.family == "cuda":
        return cuda_choices(layer, plans, epilogue, target)
    found: dict[Choice, float] = {}
    # Their cycles are those of the rule's choice; no other is predicted to be faster by so much.
    hopeless = HOPELESS * min(plan.cycles for plan in plans)
    for plan in plans:
        if plan.cycles > hopeless:
            continue
        problem = problem_of(layer, plan, epilogue)
        if isinstance(problem, RowsProblem):
            points = rows_choices(problem, plan.entries, plan.keep_all, target)
        elif isinstance(problem, DepthwiseProblem):
            points = depthwise_choices(problem, target)
        else:
            points = planes_choices(problem, plan.entries, plan.keep_all, _direct(layer), target)
        unfolded = plan.unfolded
        found.update((replace(one, unfolded=unfolded), cycles) for cycles, one in points)
    limit = WORST * min(found.values())
    return {choice: cycles for choice, cycles in found.items() if cycles <= limit}


def fits(choice: Choice, plan: Plan) -> bool:
    """Whether a choice is for this plan."""
    same = ("block_rows", "keep_all", "own_columns", "window", "unfolded")
    alike = all(getattr(choice, name) == getattr(plan, name) for name in same)
    return alike and choice.plan_form == plan.form


def layer_kernel(
    layer: Layer,
    plan: Plan,
    epilogue: Epilogue,
    choice: Choice,
    target: PivotTarget,
    handover: Handover | None = None,
    lead: Lead | None = None,
    parts: Parts = WHOLE,
) -> LayerKernel:
    """The kernel of `choice`, on as many cores of the target as are worth it.

    With bands its input and output are images, in `parts` or whole; otherwise they are as the
    kernel's form has them. A `handover` needs bands, and so does a `lead`, whose input it reads.
    """
    if target.family == "cuda":
        return cuda_kernel(layer, plan, epilogue, choice, target)
    if choice.form == "winograd":
        return winograd_layer(layer, choice, epilogue, target, handover)
    layer = laid_out(layer, plan)
    if choice.band_rows:
        return _banded(layer, plan, epilogue, choice, target, handover, lead, parts)
    layer = in_parts(layer, parts.written)
    aligned = parts.written_aligned
    if aligned and layer.geometry.direct:
        layer, aligned = on_cache_lines(layer), False
    problem, tile = problem_of(layer, plan, epilogue), choice.tile
    if isinstance(problem, RowsProblem):
        assert isinstance(tile, RowsTile)
        return _rows(layer, plan, problem, tile, target)
    if isinstance(problem, DepthwiseProblem):
        assert isinstance(tile, DepthwiseTile)
        return _depthwise(layer, problem, tile, target)
    assert isinstance(tile, PlanesTile)
    cycles = tile_rule(target).planes_cycles(problem, tile, plan.entries, target)
    tile = cpu_tiles.share_planes(problem, tile, cycles, target)
    packed, more = pack_planes_layer(layer, plan, problem, tile)
    dtype = target.precision

    def make() -> tirx.PrimFunc:
        kernel = schedule_planes(planes_kernel(problem, tile, dtype), problem, tile)
        if kernel.attrs.get(STORES_ONCE) and _held_by_all(problem, tile, target):
            kernel = store_freely(kernel)
        kernel = with_aligned(kernel, WRITTEN) if aligned else kernel
        return isolate_tasks(kernel) if problem.block_rows == 1 else kernel

    tables, output = tables_of(packed, more, dtype, BEYOND), problem.output
    output = (*output[:2], aligned_floats(problem.pixels)) if aligned else output
    return LayerKernel((problem, tile, dtype, aligned), make, output, tables, dtype)


def _held_by_all(problem: PlanesProblem, tile: PlanesTile, target: PivotTarget) -> bool:
    """Whether every core may still hold the residual: then a kernel had better not write over it.

    Cores that share an image by its output channels do so in the layer that has read the residual
    before, too, and read all of it. Before a core writes a line, the others have to drop it.
    """
    by_channels = tile.parallel and problem.batch * tile.groups(problem) == 1
    return by_channels and 4 * problem.rows * problem.pixels <= HELD_SHARE * target.l2_bytes


def _banded(
    layer: Layer,
    plan: Plan,
    epilogue: Epilogue,
    choice: Choice,
    target: PivotTarget,
    handover: Handover | None,
    lead: Lead | None,
    parts: Parts,
) -> LayerKernel:
    """A convolution that goes some output rows at a time, for which it lays out planes if need be.

    A direct one does with a follower only.
    """
    g, follower = layer.geometry, None if handover is None else handover.follower
    tile, rows = choice.tile, choice.band_rows
    assert isinstance(tile, PlanesTile)
    problem, in_band = planes_problem(layer, plan, epilogue), replace(layer, geometry=g.band(rows))
    band = planes_problem(in_band, plan, epilogue)
    one, count = replace(target, cores=1), parts.written * g.batch
    part_rows = rows_of_part(g.y.output, parts.written)
    count *= -(-part_rows // rows)
    cycles = tile_rule(target).planes_cycles(band, tile, plan.entries, one, count)
    cycles += 0.0 if g.direct else packing_cycles(band.image_floats, target)
    bands = cpu_tiles.share_bands(rows, -(-count // target.cores) * cycles, target)
    packed, more = pack_planes_layer(layer if g.direct else in_band, plan, band, tile)
    others = () if handover is None else handover.tables
    leader = None if lead is None else lead.leader
    before = () if lead is None else _tables_before(lead)
    dtype = target.precision

    def make() -> tirx.PrimFunc:
        kernel = schedule_planes(planes_kernel(band, tile, dtype), band, tile)
        kernel = in_bands(kernel, g, bands, target.stored_lanes, follower, parts, leader)
        names = [*WRITTEN] * parts.written_aligned + ["X"] * parts.read_aligned
        kernel = with_aligned(kernel, names) if names else kernel
        return isolate_tasks(kernel) if band.block_rows == 1 else kernel

    images: tuple[int, ...] = (g.batch * parts.written, g.outputs, part_rows, g.x.output)
    output = images
    if follower is not None:
        output = (*images[:2], follower.y.output, follower.x.output)
    if parts.written_aligned:
        output = images = (*images[:2], aligned_floats(part_rows * g.x.output))
    residual = problem.output if g.direct else images
    key = (g, band, bands, tile, dtype, follower, parts, leader)
    tables = tables_of(packed, (*more, *others, *before), dtype, BEYOND)
    return LayerKernel(key, make, output, tables, dtype, residual)


def _tables_before(lead: Lead) -> tuple[npt.NDArray[Any], ...]:
    """The tables of the layer before the kernel's."""
    leader = lead.leader
    own = replace(lead.layer, geometry=leader.geometry.band(leader.problem.height))
    packed, more = pack_planes_layer(own, lead.plan, leader.problem, leader.tile)
    return tables_of(packed, more, beyond=BEYOND)(lead.bias)


def _rows(
    layer: Layer, plan: Plan, problem: RowsProblem, tile: RowsTile, target: PivotTarget
) -> LayerKernel:
    matrix = layer.matrix
    cycles = rows_cycles(problem, plan.entries, target)
    tile = cpu_tiles.share_rows(problem, tile, cycles, target)
    packed: PackedWeight | SlicedWeight
    more: tuple[IntArray, ...] = ()
    if plan.own_columns:
        packed = (
            pack_windows(matrix, plan.block_rows, plan.window, unroll=tile.unroll)
            if plan.window
            else pack_sliced(matrix, plan.block_rows, unroll=tile.unroll)
        )
        more = () if packed.starts is None else (packed.starts,)
    else:
        packed = pack(
            matrix,
            BlockShape(plan.block_rows),
            unroll=tile.unroll,
            slots=plan.slots[0],
            keep_all=plan.keep_all,
        )
    return LayerKernel(
        (problem, tile),
        lambda: schedule_rows(rows_kernel(problem, tile), problem, tile),
        problem.output,
        tables_of(replace(packed, index=packed.index.astype(problem.index_dtype)), more),
    )


def _depthwise(
    layer: Layer, problem: DepthwiseProblem, tile: DepthwiseTile, target: PivotTarget
) -> LayerKernel:
    tile = share_depthwise(problem, tile, target)
    return LayerKernel(
        (problem, tile),
        lambda: depthwise_kernel(problem, tile),
        problem.output,
        lambda bias: (layer.matrix, bias),
    )
