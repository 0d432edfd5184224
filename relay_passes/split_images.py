"""Choose which layers store images in parts: a stretch of rows for every core.

Lines that another core has written last come from its cache, much more slowly than from the own
one. Cores that share a layer by its output channels read all of its input, most of which others
have written. Where each core computes the same stretch of rows of layer after layer instead, it
reads what it has written itself. For that the rows of a stretch must lie together,
[image, part, channel, row, column]: neighbouring stretches of a channel share cache lines, and
prefetchers run from one into the other.

What reads windows of an image lays out padded planes anyhow, from whole images or from parts, and
fetches the few rows that it needs of the part beside. So nothing is moved to split images or to
join them, if layers that read them as they lie in memory are all in parts or all not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tvm.ir import IRModule, Var

from ..planes import rows_of_part
from ..schedules import tile_rule
from ..schedules.core_costs import core_costs
from ..schedules.cpu_tiles import band_count
from ..targets import PivotTarget
from .detect import planes_problem
from .epilogues import FusedLayer
from .graph import MAIN, live_bindings, variables
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
            found |= dict.fromkeys(_splittable(mod, planned, fused, fit), parts)
    chains = {one.layer.var: one for one in fused}
    return [_split(p, chains[p.layer.var], found.get(p.layer.var, 1), target) for p in planned]


def _splittable(
    mod: IRModule, planned: Sequence[PlannedLayer], fused: Sequence[FusedLayer], found: set[Var]
) -> set[Var]:
    """Those of the layers `found`, by the variables of their sums, that nobody moves elements for
    if just they store images in parts.
    """
    chains = {one.layer.var: one for one in fused}
    ends = {one.end: one.layer.var for one in fused}
    values, uses = dict(live_bindings(mod[MAIN])), dict(_uses(mod, fused))
    direct = {p.layer.var for p in planned if p.layer.geometry.direct}
    windows = {p.layer.var for p in planned if _lays_out_planes(p)}

    def stays(var: Var) -> bool:
        chain = chains[var]
        given = [] if chain.residual is None else [chain.residual]
        given += [values[var].args[0]] if var in direct else []
        if any(ends.get(x) not in found for x in given):
            return False
        return all(
            user in found if added or user in direct else user in windows
            for user, added in uses[chain.end]
        )

    while dropped := {var for var in found if not stays(var)}:
        found = found - dropped
    return found


def _fits(one: PlannedLayer, parts: int, target: PivotTarget) -> bool:
    """Whether a layer's own kernel can run on parts, and not much longer than on whole images."""
    g, weights = one.layer.geometry, 4 * one.plan.entries * (one.plan.block_rows + 1)
    if not _has_own_kernel(one) or g.batch % parts == 0:
        return False
    if weights > WEIGHTS_SHARE * target.l2_bytes:
        return False
    rows = rows_of_part(g.y.output, parts)
    pixels = rows * g.x.output
    filled = -(-g.y.output // rows) == parts and LEAST_PIXELS <= pixels <= MOST_PIXELS
    return filled and g.in_parts(parts).direct == g.direct


def _has_own_kernel(one: PlannedLayer) -> bool:
    """Whether a layer is a convolution with a kernel by itself that knows parts."""
    own = one.alone and one.layer.op == "conv2d"
    return own and one.choice is not None and one.choice.form == "planes"


def _lays_out_planes(one: PlannedLayer) -> bool:
    """Whether a layer copies what it reads to padded planes."""
    return _has_own_kernel(one) and not one.layer.geometry.direct


def _uses(
    mod: IRModule, fused: Sequence[FusedLayer]
) -> Iterator[tuple[Var, list[tuple[Var | None, bool]]]]:
    """For each layer's result, who reads it: a layer, and whether it adds it; None: another."""
    inside = {var: one.layer.var for one in fused for var in (*one.inner, one.end)}
    users: dict[Var, list[tuple[Var | None, bool]]] = {one.end: [] for one in fused}
    result = [(None, value) for value in variables(mod[MAIN].body.body)]
    for var, value in [*live_bindings(mod[MAIN]), *result]:
        for read in variables(value):
            if read in users:
                user = inside.get(var)
                users[read].append((user, user != var))
    yield from users.items()


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
