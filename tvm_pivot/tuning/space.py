"""MetaSchedule's view of a task: a module that says which one it is, and sampled decisions.

The decisions of a candidate are those of its trace, in the order of `Points.names`; what they stand
for is an annotation of the module's only block. A kernel is made from it when a candidate is built,
not before: a schedule of the kernel itself would take longer to sample and mutate than the kernel
takes to run.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, te
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.mutator import PyMutator
from tvm.s_tir.meta_schedule.postproc import PyPostproc

from ..schedules.choices import ORDER, Choice, nearest
from .records import TaskKey, canonical
from .tasks import LayerTask

TASK = "pivot.task"
CHOICE = "pivot.choice"
_BLOCK = "choice"


def task_module(key: TaskKey) -> tvm.IRModule:
    """A module that stands for a task: equal for equal keys, and for no others."""
    stated = asdict(key)
    del stated["target"]["name"]  # says nothing about the machine
    nothing = te.compute((1,), lambda i: tvm.tirx.const(0, "float32"), name=_BLOCK)
    func = te.create_prim_func([nothing]).with_attr("global_symbol", "main")
    return tvm.IRModule({"main": func.with_attr(TASK, canonical(stated).decode())})


class Points:
    """The points of a task's space, and which of them some decisions stand for."""

    def __init__(self, choices: Iterable[Choice]) -> None:
        self.choices = tuple(choices)
        self.decisions = [choice.numbers() for choice in self.choices]
        # A decision that a kernel does not have is 0 where other kernels of the space have it.
        found = {name: {point.get(name, 0) for point in self.decisions} for name in ORDER}
        self.values = {name: sorted(values) for name, values in found.items() if len(values) > 1}
        self.names = list(self.values)
        rows = [tuple(point.get(name, 0) for name in self.names) for point in self.decisions]
        self._place = {row: i for i, row in enumerate(rows)}
        self._numbers = np.array(rows, np.int64).reshape(len(rows), len(self.names))
        self._logs = np.log2(self._numbers + 0.5)

    def nearest(self, wanted: Mapping[str, int]) -> Choice:
        """The point that has the most important decisions as wanted, or nearly."""
        return self.choices[nearest(self.decisions, wanted)]

    def meant(self, values: Sequence[int]) -> Choice:
        """The point with these decisions, in the order of `names`, or if there is none, any.

        Few of the combinations are points. What MetaSchedule samples is none, mostly, and stands
        for each point equally often: of the nearest ones, some would be near to nothing.
        """
        place = self._place.get(tuple(values))
        if place is None:
            place = zlib.crc32(repr(tuple(values)).encode()) % len(self.choices)
        return self.choices[place]

    def mutated(self, choice: Choice, draw: random.Random) -> Choice | None:
        """A point with one decision changed, to a neighbouring value or to any.

        The other decisions are as near as the space has them, all equally important. None: the
        space has one point.
        """
        if not self.names:
            return None
        now = self._numbers[self._row(choice)]
        axis = draw.randrange(len(self.names))
        values = self.values[self.names[axis]]
        which = values.index(int(now[axis]))
        if draw.random() < 0.5:
            near = [i for i in (which - 1, which + 1) if 0 <= i < len(values)]
            value = values[draw.choice(near)]
        else:
            value = draw.choice([other for other in values if other != values[which]])
        found = np.flatnonzero(self._numbers[:, axis] == value)
        apart = np.abs(self._logs[found] - np.log2(now + 0.5)).sum(axis=1)
        nearest_ones: list[int] = found[apart == apart.min()].tolist()
        return self.choices[draw.choice(nearest_ones)]

    def places(self, choice: Choice) -> list[int]:
        """Which value of each decision a point has."""
        row = self._numbers[self._row(choice)].tolist()
        return [self.values[name].index(v) for name, v in zip(self.names, row, strict=True)]

    def _row(self, choice: Choice) -> int:
        own = choice.numbers()
        return self._place[tuple(own.get(name, 0) for name in self.names)]

    def mark(self, sch: s_tir.Schedule, choice: Choice) -> None:
        """Say in a candidate's module what its decisions stand for, and only that."""
        block = sch.get_sblock(_BLOCK)
        for name in self.names:
            sch.unannotate(block, name)
        sch.annotate(block, CHOICE, json.dumps(choice.decisions()))

    def sample(self, sch: s_tir.Schedule, chosen: Choice | None = None) -> None:
        """Make all decisions of a candidate: at random, or those of a choice."""
        places: Sequence[int | None] = [None] * len(self.names)
        if chosen is not None:
            places = self.places(chosen)
        block = sch.get_sblock(_BLOCK)
        for name, which in zip(self.names, places, strict=True):
            values = self.values[name]
            chances = [1.0 / len(values)] * len(values)
            # Traces lose decisions that nothing uses.
            sch.annotate(block, name, sch.sample_categorical(values, chances, decision=which))

    def sampled(self, trace: Any) -> Choice:
        """What the decisions of a trace stand for; see `meant`."""
        places = [int(trace.get_decision(inst)) for inst in decisions_of(trace)]
        pairs = zip(self.values.values(), places, strict=True)
        return self.meant([values[place] for values, place in pairs])


def decisions_of(trace: Any) -> list[Any]:
    """The instructions of a trace that sample a decision."""
    return [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]


def choice_of(module: tvm.IRModule) -> Choice:
    """The choice of a candidate's module, behind the postprocessor.

    Raises:
        ValueError: it has none.
    """
    body = module["main"].body
    while body is not None:  # loops and blocks, each in the last
        body = getattr(body, "block", body)
        if CHOICE in getattr(body, "annotations", {}):
            return Choice.of(json.loads(str(body.annotations[CHOICE])))
        body = getattr(body, "body", None)
    raise ValueError("a candidate without a choice")


@derived_object
class MakePossible(PyPostproc):  # type: ignore[misc]
    """Replace sampled decisions by the point that they stand for, which is built and measured.

    Equal points make equal modules, so MetaSchedule sees that it has measured one already.
    """

    def __init__(self, points: Points) -> None:
        super().__init__()
        self.points = points

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def apply(self, sch: Any) -> bool:
        """Rewrite one candidate."""
        self.points.mark(sch, self.points.sampled(sch.trace))
        return True

    def clone(self) -> Any:
        """The same, for another thread."""
        return MakePossible(self.points)


@derived_object
class MutateDecision(PyMutator):  # type: ignore[misc]
    """Change one decision of a candidate's point, and others only as far as they must follow."""

    def __init__(self, points: Points, seed: int) -> None:
        super().__init__()
        self.points = points
        self.random = random.Random(seed)

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def apply(self, trace: Any, _: Any) -> Any:
        """A changed copy of the trace; None if nothing can be changed."""
        meant = self.points.sampled(trace)
        chosen = self.points.mutated(meant, self.random)
        if chosen is None:
            return None
        for inst, place in zip(decisions_of(trace), self.points.places(chosen), strict=True):
            if place != int(trace.get_decision(inst)):
                trace = trace.with_decision(inst, place, remove_postproc=True)
        return trace

    def clone(self) -> Any:
        """The same, for another thread."""
        return MutateDecision(self.points, self.random.randrange(1 << 30))


def space_generator(points: Points, seed: int) -> Any:
    """MetaSchedule's generator of a task's space."""
    return ms.space_generator.ScheduleFn(
        points.sample,
        sch_rules=[],
        postprocs=[MakePossible(points)],
        mutator_probs={MutateDecision(points, seed): 1.0},
    )


def candidate(task: LayerTask | TaskKey, points: Points, choice: Choice) -> s_tir.Schedule:
    """A schedule of the task's module with the decisions of one choice, postprocessed."""
    key = task if isinstance(task, TaskKey) else task.key
    sch = s_tir.Schedule(task_module(key))
    points.sample(sch, choice)
    sch.enter_postproc()
    points.mark(sch, choice)
    return sch
