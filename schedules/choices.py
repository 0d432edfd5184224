"""What can be chosen about a layer's kernel: the rule's choice, and the space that tuning searches.

The rule's choice is a point of the space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..targets import PivotTarget
from . import arm, cpu_tiles, tile_rule
from .core_costs import core_costs
from .cost import packing_cycles, rows_cycles
from .cuda_planes import CudaTile
from .cuda_rows import CudaRowsTile
from .depthwise_tiles import DepthwiseProblem, DepthwiseTile, depthwise_space, tile_cycles
from .problems import PlanesProblem, PlanesTile, RowsProblem, RowsTile
from .tensor_cores import Loader, TensorCoreTile
from .tile_space import RULE, Reach, planes_tiles

# Beyond the rule's reach: columns of high blocks cut, more register tiles beside a panel.
WIDE = Reach(16, 8, 4, (0.25, 0.5, 0.85, 1.4))
UNROLLS = (1, 2, 4, 8)
# Into how many bands a layer is cut.
BANDS = (1, 2, 3, 4, 5, 6, 8, 11, 14)
# Predicted cycles, over the fewest, of a choice that is worth a look: predictions are not that far
# off.
WORST = 1.6
# The same for the plans of a layer, each at its best.
HOPELESS = 2.0

Form = Literal[
    "planes", "rows", "cuda_planes", "cuda_rows", "tensor_cores", "depthwise", "winograd"
]
Tile = PlanesTile | RowsTile | CudaTile | CudaRowsTile | TensorCoreTile | DepthwiseTile
_TILES: dict[str, Any] = dict(zip(get_args(Form), (*get_args(Tile), PlanesTile), strict=True))
_LOADERS: tuple[str, ...] = get_args(Loader)


@dataclass(frozen=True)
class Choice:
    """How a layer's kernel is made, but for what its shape dictates: one point of the space.

    Attributes:
        form: which kernel. ``"winograd"`` has planes for mixtures of rows, in bands of as many
            output rows as tiles have, and is the rule's to choose (see `winograd`).
        block_rows: R.
        tile: its schedule, for one core.
        keep_all: blocks of zeros are kept: dense.
        own_columns: rows form: every row of a block has columns of its own.
        window: with own columns, vectors of the input that hold the columns of a step, or 0.
        band_rows: planes form: output rows of a band (see `in_bands`); 0: no bands.
        unfolded: planes form: the planes are unfolded along x (see `ConvGeometry`).
    """

    form: Form
    block_rows: int
    tile: Tile
    keep_all: bool = False
    own_columns: bool = False
    window: int = 0
    band_rows: int = 0
    unfolded: bool = False

    @property
    def plan_form(self) -> str:
        """The form of the plans that it can be a choice for."""
        return self.form.removeprefix("cuda_")

    def decisions(self) -> dict[str, Any]:
        """The choice as one flat object of numbers, and the form."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tile"}
        tile = {name: value for name, value in asdict(self.tile).items() if name != "parallel"}
        if "loader" in tile:
            tile["loader"] = _LOADERS.index(tile["loader"])
        return {name: value if name == "form" else int(value) for name, value in own.items()} | tile

    def numbers(self) -> dict[str, int]:
        """The decisions with the form as a number too."""
        return self.decisions() | {"form": list(_TILES).index(self.form)}

    @classmethod
    def of(cls, decisions: Mapping[str, Any]) -> Choice:
        """The choice that `decisions` describes.

        Raises:
            ValueError: they describe none, whatever they are.
        """
        form = decisions.get("form")
        kind = _TILES.get(str(form))
        if kind is None:
            raise ValueError(f"no kernel has the form {form!r:.20}")
        of_tile = {f.name for f in fields(kind)}
        fixed = {"parallel": False} if "parallel" in of_tile else {}
        of_tile -= fixed.keys()
        of_self = {f.name for f in fields(cls)} - {"tile", "form"}
        numbers = {name: value for name, value in decisions.items() if name != "form"}
        if numbers.keys() != of_tile | of_self:
            odd = ", ".join(sorted(numbers.keys() ^ (of_tile | of_self)))
            raise ValueError(f"not the decisions of a {form} kernel: {odd:.60}")
        if not all(type(value) is int and 0 <= value <= 1 << 30 for value in numbers.values()):
            raise ValueError("decisions must be whole numbers")
        of_kind: dict[str, Any] = {name: numbers[name] for name in of_tile}
        if "loader" in of_kind:
            if of_kind["loader"] >= len(_LOADERS):
                raise ValueError(f"no loader has the number {of_kind['loader']}")
            of_kind["loader"] = _LOADERS[of_kind["loader"]]
        tile = kind(**of_kind, **fixed)
        own = {name: numbers[name] for name in of_self}
        flags = {name: bool(own[name]) for name in ("keep_all", "own_columns", "unfolded")}
        return cls(form=str(form), tile=tile, **{**own, **flags})  # type: ignore[arg-type]


def planes_choices(
    problem: PlanesProblem, entries: int, keep_all: bool, direct: bool, target: PivotTarget
) -> Iterator[tuple[float, Choice]]:
    """The space of a layer in the planes form, with predicted cycles for one core.

    Args:
        problem: the layer, in whole images.
        entries: packed entries.
        keep_all: they are all blocks there are.
        direct: the layer's input is the planes; else copying it counts, and there may be bands.
        target: the machine.
    """
    one, rule = replace(target, cores=1), tile_rule(target)
    copies = 0.0 if direct else packing_cycles(problem.batch * problem.image_floats, target)
    for tile in planes_space(problem, one):
        cycles = rule.planes_cycles(problem, tile, entries, one) + copies
        yield cycles, Choice("planes", problem.block_rows, tile, keep_all)
    if direct or problem.compact:
        return
    heights = {-(-problem.height // count) for count in BANDS}
    bands = rule.choose_bands(problem, entries, one)
    heights |= {bands.rows} if bands else set()
    for height in sorted(heights):
        band, count = problem.band(height), cpu_tiles.band_count(problem, height)
        for tile in planes_space(band, one):
            kernel = rule.planes_cycles(band, tile, entries, one, count)
            cycles = cpu_tiles.bands_cycles(problem, height, kernel, one)
            yield cycles, Choice("planes", problem.block_rows, tile, keep_all, band_rows=height)


def planes_space(problem: PlanesProblem, target: PivotTarget) -> Iterator[PlanesTile]:
    """The tiles of a layer, or a band of it, each once: what the rule considers, and more."""
    seen = set[PlanesTile]()
    x86 = target.family != "arm"  # there sums are held otherwise
    for reach in (RULE, WIDE):
        for tile in planes_tiles(problem, target, replace(reach, slides=x86, singles=x86)):
            if tile in seen:
                continue
            seen.add(tile)
            if target.family == "arm":
                yield arm.with_operands(problem, tile, target)
            else:
                yield from cpu_tiles.prefetches(problem, tile, target)


def rows_choices(
    problem: RowsProblem, entries: int, keep_all: bool, target: PivotTarget
) -> Iterator[tuple[float, Choice]]:
    """The space of a layer in the rows form, with predicted cycles for one core."""
    cycles = rows_cycles(problem, entries, target)
    own = problem.own_columns
    for tile in rows_space(problem, target):
        yield cycles, Choice("rows", problem.block_rows, tile, keep_all, own, problem.window)


def rows_space(problem: RowsProblem, target: PivotTarget) -> Iterator[RowsTile]:
    """The tiles of a layer in the rows form."""
    ahead = cpu_tiles.ahead_of(problem.block_rows)
    rule = cpu_tiles.ahead_of(problem.block_rows, core_costs(target).stream_ahead)
    for unroll in UNROLLS:
        for distance in sorted({0, ahead // 4, ahead // 2, ahead, 2 * ahead, rule}):
            yield RowsTile(unroll, False, distance)


def depthwise_choices(
    problem: DepthwiseProblem, target: PivotTarget
) -> Iterator[tuple[float, Choice]]:
    """The space of a depthwise layer, with predicted cycles for one core."""
    for tile in depthwise_space(problem, target):
        yield tile_cycles(problem, tile, target), Choice("depthwise", 1, tile, keep_all=True)


# What decides most comes first: where a combination is not possible, the later ones give way.
ORDER = (
    "form", "keep_all", "own_columns", "window", "block_rows", "unfolded", "band_rows", "vectors",
    "singles", "panel_pitch", "slides", "lanes", "group_rows", "tiles", "k_tiles", "stretches",
    "loader", "cluster", "pixels", "vector", "warp_pixels", "blocks", "warp_rows", "warp_columns",
    "slab", "slots", "splits", "warps", "unroll", "ahead", "inputs_ahead",
)  # fmt: skip


def nearest(points: Sequence[Mapping[str, int]], wanted: Mapping[str, int]) -> int:
    """Which of some points (see `Choice.numbers`) has the most important ones as wanted, nearly."""
    left: Sequence[int] = range(len(points))
    for name in ORDER:
        values = {points[i][name] for i in left if name in points[i]}
        if len(values) > 1:
            target = wanted.get(name, 0)
            best = min(values, key=lambda value: (_apart(value, target), value))
            left = [i for i in left if points[i][name] == best]
    return left[0]


def _apart(a: int, b: int) -> float:
    """Half as many is as far as twice as many."""
    return abs(math.log2((a + 0.5) / (b + 0.5)))
