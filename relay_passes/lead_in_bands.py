"""Let a convolution that goes band by band compute what each band reads, with the layer before it.

The first layers of a network write large images, which leave level 2 before they are read. In the
bands of the next layer they do not, and they are never written as a whole (see `in_bands` and
`leaders`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tvm.ir import IRModule, Var

from ..schedules import tile_rule
from ..schedules.choices import Choice
from ..schedules.cost import packing_cycles, reading_cycles
from ..schedules.followers import Depthwise, Follower
from ..schedules.leaders import Leader
from ..schedules.problems import PlanesProblem, PlanesTile
from ..targets import PivotTarget
from .detect import planes_problem
from .epilogues import FusedLayer
from .graph import MAIN, count_uses, live_bindings
from .layers import Lead, Plan, PlannedLayer

# Of level 2, for what a band reads and computes, and the weights of its layer.
BAND_SHARE = 0.7
# Of what they take one after the other, both must be predicted to take less in bands.
MARGIN = 0.95


def lead_in_bands(
    mod: IRModule,
    planned: Sequence[PlannedLayer],
    fused: Sequence[FusedLayer],
    target: PivotTarget,
) -> list[PlannedLayer]:
    """The layers; those that are predicted to be faster with the layer before them are so chosen.

    Args:
        mod: the module.
        planned: its layers, with their choices.
        fused: what is fused behind each of them.
        target: the machine.
    """
    if target.family == "cuda" or target.precision != "float32":
        return list(planned)
    led: dict[Var, PlannedLayer] = {}
    within: dict[Var, str] = {}
    chains = {chain.layer.var: chain for chain in fused}
    for before, one in _pairs(mod, planned, fused):
        pair = _Pair(before, chains[before.layer.var], one, chains[one.layer.var], target)
        joined = pair.joined() if before.layer.var not in led else None
        if joined is not None:
            led[one.layer.var] = joined
            within[before.layer.var] = one.layer.name
    return [led.get(p.layer.var) or _within(p, within.get(p.layer.var, "")) for p in planned]


def _within(one: PlannedLayer, name: str) -> PlannedLayer:
    """A layer that the layer of that name computes, if there is one."""
    return replace(one, within=name, choice=None, record="") if name else one


def _pairs(
    mod: IRModule, planned: Sequence[PlannedLayer], fused: Sequence[FusedLayer]
) -> Iterator[tuple[PlannedLayer, PlannedLayer]]:
    """Convolutions of which the second one alone reads the first one's output."""
    uses, known = count_uses(mod[MAIN]), {p.layer.var: p for p in planned}
    ends = {chain.end: known[chain.layer.var] for chain in fused if not chain.epilogue.residual}
    for var, value in live_bindings(mod[MAIN]):
        if var in known and value.args[0] in ends and uses[value.args[0]] == 1:
            yield ends[value.args[0]], known[var]


@dataclass(frozen=True)
class _Bands:
    """Both layers in bands of so many output rows of the second one.

    Attributes:
        choice: of the second layer.
        leader: the first one.
        cycles: predicted for both, and all bands, on one core.
    """

    choice: Choice
    leader: Leader
    cycles: float


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer, the next one, and what is fused behind each of them."""

    before: PlannedLayer
    before_chain: FusedLayer
    one: PlannedLayer
    chain: FusedLayer
    target: PivotTarget

    def joined(self) -> PlannedLayer | None:
        """The second layer with the first one in its bands; None if that is not faster."""
        if not _may_lead(self.before) or not _may_be_led(self.one):
            return None
        g, target, choice = self.before.layer.geometry, self.target, self.one.choice
        read = reading_cycles(g.batch * g.outputs * g.y.output * g.x.output, target)
        if read == 0.0 or choice is None:
            return None
        if self.one.layer.geometry.band(choice.band_rows).y.size == 1:
            return None  # one row has no gaps
        bands = (self._bands(rows) for rows in self._heights(choice.band_rows))
        best = min(bands, key=lambda one: one.cycles)
        geometry, count = self.one.layer.geometry, self._count(choice.band_rows)
        copies = packing_cycles(geometry.band(choice.band_rows).image_floats, target)
        apart = count * (self._own(choice.band_rows)[1] + copies)
        if best.cycles >= MARGIN * (self.before.plan.cycles + read + apart):
            return None
        layer, chain = self.before.layer, self.before_chain
        inner = frozenset(chain.inner | {chain.end})
        lead = Lead(best.leader, layer, self._plan, chain.bias, inner)
        return replace(self.one, choice=best.choice, lead=lead, record="")

    @property
    def _plan(self) -> Plan:
        """The first layer's: bands lay out planes of their own."""
        return replace(self.before.plan, unfolded=False)

    @property
    def _follower(self) -> Follower | None:
        return None if self.one.handover is None else self.one.handover.follower

    def _count(self, rows: int) -> int:
        """Bands of all images."""
        g, follower = self.one.layer.geometry, self._follower
        if follower is None:
            return g.batch * -(-g.y.output // rows)
        return g.batch * -(-follower.y.output // follower.outputs_of(rows))

    def _heights(self, least: int) -> Iterator[int]:
        """Rows of a band from `least` on, with which both layers' stay in level 2.

        The first layer computes some for each band, however high it is.
        """
        yield least
        g, plan, follower = self.one.layer.geometry, self.one.plan, self._follower
        if isinstance(follower, Depthwise):  # its kernel is made for so many
            return
        room = BAND_SHARE * self.target.l2_bytes - 4 * plan.entries * (plan.block_rows + 1)
        for rows in range(least + 1, g.y.output + 1):
            band = g.band(rows)
            kept = 0 if follower is None else g.outputs * rows * g.x.output
            whole = follower is None or follower.rows_of(follower.outputs_of(rows)) == rows
            if whole and 4 * (band.image_floats + kept) <= room:
                yield rows

    def _own(self, rows: int) -> tuple[PlanesTile, float]:
        """The second layer's tile for a band, and its cycles."""
        in_band = replace(self.one.layer, geometry=self.one.layer.geometry.band(rows))
        problem = planes_problem(in_band, self.one.plan, self.chain.epilogue)
        return self._chosen(problem, self.one.plan.entries)

    def _bands(self, rows: int) -> _Bands:
        g, band = self.before.layer.geometry, self.one.layer.geometry.band(rows)
        new = min(self._advance(rows), band.y.size)
        own, kept = g.band(new), band.y.size - new
        first = replace(self.before.layer, geometry=own)
        problem = planes_problem(first, self._plan, self.before_chain.epilogue)
        tile, each = self._chosen(problem, self._plan.entries)
        each += packing_cycles(own.image_floats, self.target)
        ours, cycles = self._own(rows)
        cycles += packing_cycles(band.channels * kept * band.pitch, self.target)
        assert self.one.choice is not None
        choice = replace(self.one.choice, tile=ours, band_rows=rows)
        cycles = self._count(rows) * (each + cycles) + g.batch * -(-kept // new) * each
        return _Bands(choice, Leader(g, problem, tile), cycles)

    def _advance(self, rows: int) -> int:
        """How many rows further down than a band the next one begins, at most."""
        follower = self._follower
        return rows if follower is None else follower.outputs_of(rows) * follower.y.stride

    def _chosen(self, problem: PlanesProblem, entries: int) -> tuple[PlanesTile, float]:
        one = replace(self.target, cores=1)
        return tile_rule(self.target).choose_planes(problem, entries, one)


def _may_lead(one: PlannedLayer) -> bool:
    """Whether a layer's kernel can write into planes: rows by themselves, nothing beside it."""
    g, choice = one.layer.geometry, one.choice
    plain = one.alone and one.layer.op == "conv2d" and g.pitch != g.x.output
    return plain and choice is not None and choice.form == "planes"


def _may_be_led(one: PlannedLayer) -> bool:
    """Whether a layer goes in bands of planes that are the image with zeros around it."""
    g, choice = one.layer.geometry, one.choice
    if one.within or one.layer.op != "conv2d" or g.direct or choice is None:
        return False
    banded = choice.form == "planes" and choice.band_rows > 0 and not choice.unfolded
    return banded and g.y.stride == g.x.stride == 1
