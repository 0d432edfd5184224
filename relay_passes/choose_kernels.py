"""Choose how each layer's kernel is made: as a tuning record says, or else by the target's rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from tvm import s_tir, tirx
from tvm.ir import IRModule

from ..schedules.choices import Choice
from ..schedules.problems import Epilogue
from ..targets import PivotTarget
from .align_planes import align_planes
from .epilogues import fuse_epilogues
from .follow_in_bands import follow_in_bands
from .layer_kernels import rule_choice
from .layers import Layer, Plan, PlannedLayer
from .lead_in_bands import lead_in_bands
from .split_images import split_images
from .winograd_layers import choose_winograd


class Tuned(Protocol):
    """What is known from tuning.

    Attributes:
        notes: what the user is told about records that could not be used.
    """

    notes: list[str]

    def choose(
        self, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
    ) -> tuple[Plan, Choice, str] | None:
        """The plan, which may be another, the choice, and the record; None if none is known."""

    def schedule(
        self, func: tirx.PrimFunc, name: str, target: PivotTarget
    ) -> s_tir.Schedule | None:
        """How to schedule a function that is no layer, for one thread; None if none is known."""


def choose_kernels(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget, tuned: Tuned | None
) -> list[PlannedLayer]:
    """The layers with their choices."""
    fused = fuse_epilogues(mod, [p.layer for p in planned])
    epilogues = {f.layer.var: f.epilogue for f in fused}
    chosen = [
        _chosen(one, epilogues[one.layer.var], target, tuned) if one.alone else one
        for one in follow_in_bands(mod, planned, fused, target)
    ]
    chosen = split_images(mod, lead_in_bands(mod, chosen, fused, target), fused, target)
    return align_planes(mod, chosen, fused, target)


def _chosen(
    planned: PlannedLayer, epilogue: Epilogue, target: PivotTarget, tuned: Tuned | None
) -> PlannedLayer:
    layer, plan = planned.layer, planned.plan
    winograd = choose_winograd(planned, epilogue, target)
    if winograd is not None:
        return replace(planned, choice=winograd)
    found = None if tuned is None else tuned.choose(layer, plan, epilogue, target)
    if found is None:
        return replace(planned, choice=rule_choice(layer, plan, epilogue, target))
    plan, choice, record = found
    return replace(planned, plan=plan, choice=choice, record=record)
