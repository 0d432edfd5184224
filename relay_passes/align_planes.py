"""Choose which layers store images with planes that begin with cache lines.

Planes of 14 x 14 pixels take twelve cache lines and a quarter. One right behind the other, their
vectors straddle lines, which kernels of few rows per block, that mostly load, avoid by a copy of
all they read; and cores that share a layer by its outputs take lines from each other. With room
behind each plane there is neither. Higher blocks multiply more than they load: for them what counts
is that they compute no pixels that are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm.ir import IRModule, Var

from ..planes import LINE_FLOATS, aligned_floats, rows_of_part
from ..schedules import tile_rule
from ..schedules.core_costs import core_costs
from ..targets import PivotTarget
from .detect import planes_problem
from .epilogues import FusedLayer
from .image_readers import groups, has_own_kernel, together
from .layers import PlannedLayer, in_parts, on_cache_lines

# Block rows up to which loads are what binds.
MOST_BLOCK_ROWS = 2
# How much larger planes may get.
MOST_ROOM = 1.35


def align_planes(
    mod: IRModule,
    planned: Sequence[PlannedLayer],
    fused: Sequence[FusedLayer],
    target: PivotTarget,
) -> list[PlannedLayer]:
    """The layers, with those whose planes begin with cache lines, and tiles for these."""
    if not core_costs(target).far_lines or target.lanes != LINE_FLOATS:
        return list(planned)
    chains = {one.layer.var: one for one in fused}
    found = _found(mod, planned, fused)
    return [
        _aligned(p, chains[p.layer.var], target) if p.layer.var in found else p for p in planned
    ]


def _found(mod: IRModule, planned: Sequence[PlannedLayer], fused: Sequence[FusedLayer]) -> set[Var]:
    """The layers that gain by it, most of the work of each group, and those that go with them."""
    direct = [one for one in planned if one.layer.geometry.direct]
    work = {one.layer.var: one.plan.entries * one.plan.block_rows for one in direct}
    bound = {one.layer.var for one in direct if one.plan.block_rows <= MOST_BLOCK_ROWS}
    fitting = together(mod, planned, fused, {one.layer.var for one in planned if _fits(one)})
    found: set[Var] = set()
    for group in groups(mod, planned, fused, fitting):
        gaining = sum(work[var] for var in group & bound)
        if gaining > sum(work.get(var, 0) for var in group) / 2:
            found |= group
    return found


def _fits(one: PlannedLayer) -> bool:
    """Whether a layer's own kernel can store its planes so, and with little room between them."""
    if not has_own_kernel(one):
        return False
    g = one.layer.geometry
    pixels = rows_of_part(g.y.output, one.parts) * g.x.output
    return pixels < aligned_floats(pixels) <= MOST_ROOM * pixels


def _aligned(one: PlannedLayer, chain: FusedLayer, target: PivotTarget) -> PlannedLayer:
    """A layer whose planes begin with cache lines, and the tile for that."""
    layer = one.layer
    if one.choice is None or not layer.geometry.direct:
        return replace(one, aligned=True)
    layer = on_cache_lines(in_parts(layer, one.parts))
    problem, alone = planes_problem(layer, one.plan, chain.epilogue), replace(target, cores=1)
    tile, _ = tile_rule(target).choose_planes(problem, one.plan.entries, alone)
    return replace(one, aligned=True, choice=replace(one.choice, tile=tile), record="")
