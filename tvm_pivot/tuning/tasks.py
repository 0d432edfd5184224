"""What there is to tune in a network: one task for all layers that ask for the same kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from ..layout import FloatArray
from ..planes import ConvGeometry
from ..relay_passes.cuda_kernels import gpu_task
from ..relay_passes.cuda_layers import cuda_cycles
from ..relay_passes.detect import candidates
from ..relay_passes.epilogues import fuse_epilogues
from ..relay_passes.follow_in_bands import follow_in_bands
from ..relay_passes.layer_kernels import (
    fits,
    layer_choices,
    layer_kernel,
    problem_of,
    rule_choice,
)
from ..relay_passes.layers import Layer, Plan, PlannedLayer
from ..relay_passes.pack_layer import LayerKernel
from ..relay_passes.winograd_layers import choose_winograd
from ..schedules.choices import Choice
from ..schedules.problems import Epilogue
from ..targets import PivotTarget
from .records import TaskKey


@dataclass(frozen=True, eq=False)
class LayerTask:
    """One task: a layer as it is compiled, for one core of the target.

    It can be pickled, so that other processes build candidates.

    Attributes:
        key: of the problem that the rule's plan gives.
        names: the layers that it stands for.
        op, shape, matrix, geometry: as in `Layer`.
        plan: the rule's plan.
        epilogue: what is fused behind the sum.
        target: the machine, with one core.
    """

    key: TaskKey
    names: tuple[str, ...]
    op: Any
    shape: tuple[int, ...]
    matrix: FloatArray
    geometry: ConvGeometry
    plan: Plan
    epilogue: Epilogue
    target: PivotTarget = field(repr=False)

    @classmethod
    def of(cls, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> LayerTask:
        """The task of one layer."""
        one = replace(target, cores=1)
        key = task_key(layer, plan, epilogue, target)
        geometry = layer.geometry
        return cls(
            key, (layer.name,), layer.op, layer.shape, layer.matrix, geometry, plan, epilogue, one
        )

    @cached_property
    def layer(self) -> Layer:
        """The layer, apart from its network."""
        return Layer(relax.Var(self.names[0]), self.op, self.shape, self.matrix, self.geometry)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("layer", "plans", "choices")  # made again where they are needed
        return {name: value for name, value in self.__dict__.items() if name not in kept}

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The rule's plan, and the others that its layer may have, dense ones among them."""
        return (self.plan, *other_plans(self.layer, self.plan, self.target))

    @cached_property
    def choices(self) -> dict[Choice, float]:
        """The space, with predicted cycles. The rule's choice comes first."""
        space = layer_choices(self.layer, self.plans, self.epilogue, self.target)
        rule = self.rule
        return {rule: space.get(rule, min(space.values())), **space}

    @property
    def rule(self) -> Choice:
        """What the rule chooses."""
        return rule_choice(self.layer, self.plan, self.epilogue, self.target)

    def reduced(self, choice: Choice) -> LayerTask:
        """The task with the plan of a choice as its only one: enough to build its kernel."""
        if fits(choice, self.plan):
            return self
        return replace(self, plan=next(plan for plan in self.plans if fits(choice, plan)))

    def kernel(self, choice: Choice) -> LayerKernel:
        """The kernel of a choice."""
        plan = self.reduced(choice).plan
        return layer_kernel(self.layer, plan, self.epilogue, choice, self.target)


def task_key(layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget) -> TaskKey:
    """The key of a layer's records: what its rule's plan asks of one core, or of a GPU."""
    problem: Any = None
    if target.family == "cuda":
        problem = gpu_task(layer, plan, epilogue, target)
    else:
        problem = problem_of(layer, plan, epilogue)
    return TaskKey.of(plan.form, problem, plan.entries, replace(target, cores=1))


def other_plans(layer: Layer, plan: Plan, target: PivotTarget) -> list[Plan]:
    """Plans with other blocks than `plan`, or dense; for CPUs only those of its form."""
    found = [] if np.all(layer.matrix) else list(candidates(layer, target, keep_all=False))
    found += candidates(layer, target, keep_all=True)
    mine = _kind(plan)
    if target.family == "cuda":
        found = [_in_order_of(plan, other, layer, target) for other in found]
        return [other for other in found if _kind(other) != mine]
    return [other for other in found if other.form == plan.form and _kind(other) != mine]


def _in_order_of(plan: Plan, other: Plan, layer: Layer, target: PivotTarget) -> Plan:
    """`other` with the rows in the order of `plan`, where that gathers its blocks better."""
    alike = other.block_rows == plan.block_rows and other.keep_all == plan.keep_all
    if not alike or other.entries <= plan.entries:
        return other
    moved = replace(plan, form=other.form)
    return replace(moved, cycles=cuda_cycles(layer, moved, target))


def _kind(plan: Plan) -> tuple[Any, ...]:
    blocks = plan.form, plan.block_rows, plan.own_columns, plan.keep_all, plan.window
    return *blocks, plan.unfolded


def network_tasks(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget
) -> list[LayerTask]:
    """The tasks of a module with planned layers, each once, in the order they first run.

    Layers that share a kernel with what follows them, and those of minimal filtering, have none:
    their rule chooses it.
    """
    chains = fuse_epilogues(mod, [p.layer for p in planned])
    alone = {p.layer.var: p for p in follow_in_bands(mod, planned, chains, target) if p.alone}
    tasks: dict[TaskKey, LayerTask] = {}
    for fused in chains:
        one = alone.get(fused.layer.var)
        if one is None or choose_winograd(one, fused.epilogue, target) is not None:
            continue
        task = LayerTask.of(fused.layer, one.plan, fused.epilogue, target)
        if task.key in tasks:
            known = tasks[task.key]
            tasks[task.key] = replace(known, names=(*known.names, *task.names))
        else:
            tasks[task.key] = task
    return list(tasks.values())
