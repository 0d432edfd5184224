"""Choose which layers store images in parts: a stretch of rows for every core.

Lines that another core has written last come from its cache, much more slowly than from the own
one. Cores that share a layer by its output channels read all of its input, most of which others
have written. Where each core computes the same stretch of rows of layer after layer instead, it
reads what it has written itself. For that the rows of a stretch must lie together,
[image, part, channel, row, column]: neighbouring stretches of a channel share cache lines, and
prefetchers run from one into the other.

Who reads windows of an image fetches the few rows that it needs of the part beside; nothing else is
moved (see `image_readers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tvm.ir import IRModule, Var

from ..planes import rows_of_part
from ..schedules import tile_rule
from ..schedules.core_costs import core_costs
from ..schedules.cpu_tiles import band_count
from ..targets import PivotTarget
from .detect import planes_problem
from .epilogues import FusedLayer
from .image_readers import has_own_kernel, together
from .layers import PlannedLayer, in_parts, laid_out

# Larger images are shared by pixels: lines are then few that neighbouring stretches share.
MOST_PIXELS = 1024
# Of a part. In less the last vector is too much of it, and all cores fetch the same weights.
LEAST_PIXELS = 64
# Of level 2, for a layer's weights: every core reads all of them.
WEIGHTS_SHARE = 0.25


def split_images(
    mod: IRModule,
    planned: Sequence[PlannedLayer],
    fused: Sequence[FusedLayer],
    target: PivotTarget,
) -> list[PlannedLayer]:
    """The layers, with the number of parts that each stores its images in, and tiles for those."""
    if target.family != "x86" or not core_costs(target).far_lines:
        return list(planned)
    found: dict[Var, int] = {}
    for parts in range(target.cores, 1, -1):
        if target.cores % parts == 0:
            fit = {p.layer.var for p in planned if _fits(p, parts, target)} - found.keys()
            found |= dict.fromkeys(together(mod, planned, fused, fit), parts)
    chains = {one.layer.var: one for one in fused}
    return [_split(p, chains[p.layer.var], found.get(p.layer.var, 1), target) for p in planned]


def _fits(one: PlannedLayer, parts: int, target: PivotTarget) -> bool:
    """Whether a layer's own kernel can run on parts, and not much longer than on whole images."""
    g, weights = one.layer.geometry, 4 * one.plan.entries * (one.plan.block_rows + 1)
    if not has_own_kernel(one) or g.batch % parts == 0:
        return False
    if weights > WEIGHTS_SHARE * target.l2_bytes:
        return False
    rows = rows_of_part(g.y.output, parts)
    pixels = rows * g.x.output
    filled = -(-g.y.output // rows) == parts and LEAST_PIXELS <= pixels <= MOST_PIXELS
    return filled and g.in_parts(parts).direct == g.direct


def _split(one: PlannedLayer, chain: FusedLayer, parts: int, target: PivotTarget) -> PlannedLayer:
    """A layer that stores images in parts, and the tile for that."""
    if parts == 1 or one.choice is None:
        return one
    layer, rule = in_parts(laid_out(one.layer, one.plan), parts), tile_rule(target)
    problem, alone = planes_problem(layer, one.plan, chain.epilogue), replace(target, cores=1)
    bands = None if layer.geometry.direct else rule.choose_bands(problem, one.plan.entries, target)
    rows, count = 0, 1
    if bands is not None:
        rows, count = bands.rows, band_count(problem, bands.rows)
        problem = problem.band(rows)
    tile, _ = rule.choose_planes(problem, one.plan.entries, alone, count)
    choice = replace(one.choice, tile=tile, band_rows=rows)
    return replace(one, parts=parts, choice=choice, record="")
