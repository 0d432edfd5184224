"""The x86 schedule rule of the block-sparse kernels: tiles by the cycles that `cost` predicts."""

from __future__ import annotations

from ..targets import PivotTarget
from . import cpu_tiles
from .cost import planes_cycles as planes_cycles
from .cpu_tiles import choose_rows as choose_rows
from .problems import Bands, PlanesProblem, PlanesTile


def choose_planes(
    problem: PlanesProblem, entries: int, target: PivotTarget, bands: int = 1
) -> tuple[PlanesTile, float]:
    """The tile with the fewest predicted cycles for `entries` packed entries, and those cycles.

    The problem is the whole layer, or one of its `bands`.
    """
    tile, cycles = cpu_tiles.choose_planes(problem, entries, target, planes_cycles, bands=bands)
    return cpu_tiles.prefetching(problem, tile, target, bands), cycles


def choose_bands(problem: PlanesProblem, entries: int, target: PivotTarget) -> Bands | None:
    """The bands in which a layer lays out its planes; see `cpu_tiles.choose_bands`."""
    return cpu_tiles.choose_bands(problem, entries, target, planes_cycles)
