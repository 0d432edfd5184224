"""Kernels and the rules that schedule TIR functions for a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tvm import s_tir, tirx

from ..targets import PivotTarget
from . import arm, contraction, cuda_rules, elementwise, fallback, reduction, x86
from .problems import Bands, PlanesProblem, PlanesTile, RowsProblem, RowsTile

Rule = Callable[[tirx.PrimFunc, PivotTarget], s_tir.Schedule | None]


def rules_for(target: PivotTarget) -> tuple[Rule, ...]:
    """The schedule rules of a target: the first that returns a schedule wins, the last always does.

    All of them take what they know about the machine from `target`, so every CPU shares them, and
    every GPU.
    """
    if target.family == "cuda":
        return (cuda_rules.apply,)
    return (elementwise.apply, contraction.apply, reduction.apply, fallback.apply)


class TileRule(Protocol):
    """What a target family decides about the block-sparse kernels; a module of this shape."""

    def choose_planes(
        self, problem: PlanesProblem, entries: int, target: PivotTarget, bands: int = 1
    ) -> tuple[PlanesTile, float]:
        """The tile for a layer with `entries` packed entries, or one of its `bands`, and its
        predicted cycles.
        """

    def choose_bands(
        self, problem: PlanesProblem, entries: int, target: PivotTarget
    ) -> Bands | None:
        """The bands in which a layer that reads padded planes lays them out, if it does."""

    def choose_rows(
        self, problem: RowsProblem, entries: int, target: PivotTarget
    ) -> tuple[RowsTile, float]:
        """The same for the rows form."""

    def planes_cycles(
        self,
        problem: PlanesProblem,
        tile: PlanesTile,
        entries: int,
        target: PivotTarget,
        bands: int = 1,
    ) -> float:
        """Predicted cycles of a tile on one core, for a layer or one of its `bands`."""


# Families without schedules of their own are ranked, for `inspect`, as x86 would be.
_TILE_RULES: dict[str, TileRule] = {"x86": x86, "arm": arm}


def tile_rule(target: PivotTarget) -> TileRule:
    """The rule that fits the block-sparse kernels to a target."""
    return _TILE_RULES.get(target.family, x86)
