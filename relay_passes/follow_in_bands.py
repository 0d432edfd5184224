"""Let a convolution go band by band with what follows it: a max pooling or a depthwise layer.

The output of a large convolution leaves level 2 before the next kernel reads it. In bands it does
not, and it is never written as a whole (see `in_bands` and `followers`). Neighbouring bands compute
the rows that both of their followers read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tvm.ir import IRModule, Var

from ..layout import FloatArray
from ..schedules import tile_rule
from ..schedules.choices import Choice
from ..schedules.cost import packing_cycles, reading_cycles
from ..schedules.depthwise_tiles import (
    LEAST_LANES,
    DepthwiseProblem,
    choose_depthwise,
    depthwise_cycles,
)
from ..schedules.followers import Depthwise, Follower, Pool
from ..schedules.max_pool import is_supported
from ..schedules.problems import Epilogue, PlanesProblem
from ..schedules.winograd import RowFilter
from ..targets import PivotTarget
from .detect import planes_problem
from .epilogues import FusedLayer
from .graph import MAIN, count_uses, live_bindings, op_name
from .layers import Handover, Layer, Plan, PlannedLayer
from .legalize_pooling import pooled_axes
from .winograd_layers import Band, best_band, row_filter, winograd_cycles

# Of level 2, for what a band reads and computes, and the weights: the rest is for what comes out.
BAND_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Candidate:
    """What may follow a layer in its bands.

    Attributes:
        whole: the follower, as it is for all rows.
        make: from a number of output rows per band, what it is for those.
        end: the variable that its result is bound to.
        inner: those between the layer's sum and that one, but for those of the layer's epilogue.
        tables: constants that its kernel takes.
        layer: its name, if it is a layer itself.
        cycles: predicted cycles of a layer on one core.
    """

    whole: Follower
    make: Callable[[int], Follower]
    end: Var
    inner: frozenset[Var]
    tables: tuple[FloatArray, ...] = ()
    layer: str = ""
    cycles: float = 0.0


def follow_in_bands(
    mod: IRModule,
    planned: Sequence[PlannedLayer],
    fused: Sequence[FusedLayer],
    target: PivotTarget,
) -> list[PlannedLayer]:
    """The layers; those that are predicted to be faster with what follows them are so chosen."""
    if target.family == "cuda" or target.precision != "float32":
        return list(planned)
    found = dict(_candidates(mod, planned, fused, target))
    epilogues = {one.layer.var: one.epilogue for one in fused}
    within: dict[str, str] = {}
    leading: dict[Var, PlannedLayer] = {}
    for one in planned:
        candidate = found.get(one.layer.var)
        if candidate is None:
            continue
        plan = replace(one.plan, unfolded=False)  # bands lay out planes of their own
        chosen = _choice(one.layer, plan, epilogues[one.layer.var], candidate, target)
        if chosen is not None:
            choice, follower = chosen
            handover = Handover(follower, candidate.end, candidate.inner, candidate.tables)
            leading[one.layer.var] = replace(one, plan=plan, choice=choice, handover=handover)
            if candidate.layer:
                within[candidate.layer] = one.layer.name
    return [
        leading.get(p.layer.var) or replace(p, within=within.get(p.layer.name, "")) for p in planned
    ]


def _candidates(
    mod: IRModule,
    planned: Sequence[PlannedLayer],
    fused: Sequence[FusedLayer],
    target: PivotTarget,
) -> Iterator[tuple[Var, Candidate]]:
    """What alone uses the output of a layer and could follow it, by the variable of its sum."""
    uses, ends = count_uses(mod[MAIN]), {one.end: one.layer.var for one in fused}
    chains = {one.layer.var: one for one in fused}
    plans = {p.layer.var: p.plan for p in planned}
    for var, value in live_bindings(mod[MAIN]):
        before = value.args[0] if op_name(value) in ("nn.max_pool2d", "nn.conv2d") else None
        if before not in ends or uses[before] != 1:
            continue
        if op_name(value) == "nn.max_pool2d":
            axes = pooled_axes(value)
            if axes is not None and is_supported(*axes):
                pool = Pool(*axes, target.lanes)
                yield ends[before], Candidate(pool, _always(pool), var, frozenset({before}))
        elif var in plans and plans[var].form == "depthwise":
            chain, g = chains[var], chains[var].layer.geometry
            if g.outputs == g.channels and not chain.epilogue.residual:
                cycles = plans[var].cycles
                yield ends[before], _depthwise(chain, frozenset({before}), cycles, target)


def _always(follower: Follower) -> Callable[[int], Follower]:
    return lambda outputs: follower


def _depthwise(
    chain: FusedLayer, before: frozenset[Var], cycles: float, target: PivotTarget
) -> Candidate:
    """A depthwise layer with what is fused behind it, of so many predicted cycles."""
    layer, one = chain.layer, replace(target, cores=1)
    tile = choose_depthwise(DepthwiseProblem.of(layer.geometry, chain.epilogue), one)
    y, x, channels = layer.geometry.y, layer.geometry.x, layer.geometry.channels
    whole = Depthwise(y, x, channels, chain.epilogue, tile)

    def make(outputs: int) -> Follower:
        problem = whole.problem(whole.rows_of(outputs))
        return replace(whole, tile=choose_depthwise(problem, one))

    inner = (before | chain.inner | {layer.var}) - {chain.end}
    tables = (layer.matrix, chain.bias)
    return Candidate(whole, make, chain.end, inner, tables, layer.name, cycles)


@dataclass(frozen=True)
class _Way:
    """A way to compute a band of a layer's rows.

    Attributes:
        heights: how many rows at a time.
        floats: what is laid out for so many, or read where it lies.
        cycles: predicted cycles on one core.
        choice: how the kernel is made; None where it cannot have a follower.
    """

    heights: Sequence[int]
    floats: Callable[[int], int]
    cycles: Callable[[int], float]
    choice: Callable[[int], Choice | None]


def _choice(
    layer: Layer, plan: Plan, epilogue: Epilogue, candidate: Candidate, target: PivotTarget
) -> tuple[Choice, Follower] | None:
    """How the layer goes with its follower; None where that is not predicted to be faster."""
    g, whole = layer.geometry, candidate.whole
    gaps = g.pitch != g.x.output
    if plan.form != "planes" or layer.op == "dense" or not (gaps or g.direct):
        return None
    read = reading_cycles(g.batch * g.outputs * g.y.output * g.x.output, target)
    if read == 0.0:
        return None
    one = replace(target, cores=1)
    room = BAND_SHARE * target.l2_bytes - 4 * plan.entries * (plan.block_rows + 1)

    def fits(way: _Way, rows: int) -> bool:
        outputs = whole.outputs_of(rows)
        floats = way.floats(rows) + g.outputs * rows * g.x.output
        vectors = outputs * whole.x.output >= LEAST_LANES
        return vectors and rows <= g.y.output and 4 * floats <= room

    def cycles(way: _Way, rows: int) -> float:
        """On all cores."""
        outputs = whole.outputs_of(rows)
        follower, each = candidate.make(outputs), way.cycles(rows)
        if isinstance(follower, Depthwise):
            each += depthwise_cycles(follower.problem(rows), one)
        return -(-g.batch * -(-whole.y.output // outputs) // target.cores) * each

    ways = [_planes_way(layer, plan, epilogue, whole, target)]
    apart = plan.cycles
    found = row_filter(layer, plan, epilogue, target)
    if found is not None:
        ways.append(_winograd_way(found, target))
        apart = min(apart, winograd_cycles(found, target)[1])
    points = []
    for way in ways:
        heights = [rows for rows in way.heights if fits(way, rows)]
        points += [(way, rows) for rows in heights if 2 * rows >= heights[-1]]
    best = min(points, key=lambda point: cycles(*point), default=None)
    if best is None or cycles(*best) * target.cores >= apart + candidate.cycles + read:
        return None
    way, rows = best
    choice = way.choice(rows)
    return None if choice is None else (choice, candidate.make(whole.outputs_of(rows)))


def _planes_way(
    layer: Layer, plan: Plan, epilogue: Epilogue, whole: Follower, target: PivotTarget
) -> _Way:
    """Planes of a band, or pixels as they lie in memory."""
    g, rule, one = layer.geometry, tile_rule(target), replace(target, cores=1)

    def problem(rows: int) -> PlanesProblem:
        return planes_problem(replace(layer, geometry=g.band(rows)), plan, epilogue)

    def cycles(rows: int) -> float:
        each = rule.choose_planes(problem(rows), plan.entries, one)[1]
        return each + (0.0 if g.direct else packing_cycles(problem(rows).image_floats, target))

    def choice(rows: int) -> Choice | None:
        tile = rule.choose_planes(problem(rows), plan.entries, one)[0]
        if tile.masked(problem(rows)) and g.direct:  # it may read a whole vector behind the band
            return None
        return Choice("planes", plan.block_rows, tile, plan.keep_all, band_rows=rows)

    heights = [whole.rows_of(outputs) for outputs in range(1, whole.y.output + 1)]
    return _Way(heights, lambda rows: problem(rows).image_floats, cycles, choice)


def _winograd_way(found: RowFilter, target: PivotTarget) -> _Way:
    """Tiles of rows, of which the follower may leave the last few to the next band."""

    def band(rows: int) -> Band:
        return best_band(found, rows // found.rows, target)

    most = found.geometry.y.output // found.rows
    return _Way(
        [tiles * found.rows for tiles in range(1, most + 1)],
        lambda rows: band(rows).floats,
        lambda rows: band(rows).cycles,
        lambda rows: band(rows).choice,
    )
