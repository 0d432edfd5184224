"""What a search knows: its tasks, the times of their candidates, and when to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import tvm
from tvm.s_tir.meta_schedule.builder import BuilderInput
from tvm.s_tir.meta_schedule.runner import RunnerInput

from ..schedules.choices import Choice
from ..schedules.cuda_planes import CudaTile
from ..schedules.cuda_rows import CudaRowsTile
from ..schedules.depthwise_tiles import DepthwiseTile
from ..schedules.problems import RowsTile
from ..schedules.tensor_cores import TensorCoreTile
from .lookup import nearest
from .machine import clear, recalled
from .records import TuningRecord
from .selection import stored_choice
from .space import TASK, Points, candidate, task_module
from .tasks import LayerTask

# Choices, each the best predicted of its sort, that are measured before anything is learned.
_PREDICTED = 7


@dataclass(eq=False)
class Job:
    """One task and what is known about it so far.

    Attributes:
        task: the task.
        points: its space.
        module: what stands for it.
        times: the measured times of each choice; the rule's comes first.
        failed: choices that could not be built or run, with the reason.
    """

    task: LayerTask
    points: Points = field(init=False)
    module: tvm.IRModule = field(init=False)
    times: dict[Choice, float] = field(default_factory=dict)
    failed: dict[Choice, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.points = Points(self.task.choices)
        self.module = task_module(self.task.key)

    @property
    def name(self) -> str:
        """What its module calls it."""
        return str(self.module["main"].attrs[TASK])

    @property
    def trials(self) -> int:
        """Candidates tried."""
        return len(self.times) + len(self.failed)

    @property
    def weight(self) -> float:
        """Layers that it stands for."""
        return float(len(self.task.names))

    def best(self, count: int = 1) -> list[Choice]:
        """The fastest choices, fastest first."""
        return sorted(self.times, key=lambda choice: self.times[choice])[:count]

    def seeds(self, records: Iterable[TuningRecord]) -> list[Choice]:
        """What to measure first: the rule's, those of similar tasks, the best predicted."""
        found = [self.task.rule]
        for near in nearest(records, self.task.key, 3, within=4.0):
            with contextlib.suppress(ValueError):
                found.append(self.points.nearest(stored_choice(near.record).numbers()))
        predicted = self.task.choices
        by_sort: dict[object, Choice] = {}
        for choice in sorted(predicted, key=lambda choice: predicted[choice]):
            by_sort.setdefault(_sort(choice), choice)
        found += list(by_sort.values())[:_PREDICTED]
        return list(dict.fromkeys(found))


def _sort(choice: Choice) -> object:
    """Choices of one sort differ in extents only."""
    tile = choice.tile
    own = (choice.form, choice.block_rows, choice.keep_all, choice.band_rows > 0)
    if isinstance(tile, RowsTile):
        return replace(choice, tile=replace(tile, unroll=0))
    if isinstance(tile, CudaTile):
        return (*own, tile.vector > 1, tile.splits > 1)
    if isinstance(tile, CudaRowsTile):
        return (*own, tile.splits > 1)
    if isinstance(tile, TensorCoreTile):
        return (*own, tile.loader, tile.cluster > 1)
    if isinstance(tile, DepthwiseTile):
        return (*own, tile.lanes, tile.vectors)
    return (*own, tile.vectors, tile.panel, tile.k_tiles > 1, tile.group_rows > 1)


class StopSearch(Exception):
    """The search is to end now; the message says why."""


# Called with a job, a choice and its times.
Measured = Callable[[Job, Choice, Sequence[float]], None]


@dataclass(eq=False)
class Search:
    """A search over several tasks.

    Attributes:
        jobs: the tasks.
        builder, runner: MetaSchedule's.
        measured: told of every candidate as it is measured.
        until: `time.monotonic` at which to stop; None: never.
        later: candidates are measured elsewhere, later: that they have no times teaches nothing.
        stop: set it to say why the search is to end behind the batch at hand.
        made: the job, the choice and the builder's result of each artifact.
    """

    jobs: Sequence[Job]
    builder: Any
    runner: Any
    measured: Measured
    until: float | None = None
    later: bool = False
    stop: str = ""
    made: dict[str, tuple[Job, Choice, Any]] = field(default_factory=dict)

    def measure(self, job: Job, choices: Sequence[Choice]) -> None:
        """Measure choices of one task that are not measured yet."""
        choices = [c for c in choices if c not in job.times and c not in job.failed]
        if choices:
            built = self._build(job, choices)
            results = self._run(built)
            for choice, made, result in zip(choices, built, results, strict=True):
                self.note(job, choice, made, result)
            self.check()

    def compare(self, job: Job, choices: Sequence[Choice], times: int) -> dict[Choice, list[float]]:
        """Measure choices of one task in turns, `times` times; those that fail are left out."""
        built = self._build(job, choices)
        found: dict[Choice, list[float]] = {}
        for _ in range(times):
            for choice, result in zip(choices, self._run(built), strict=True):
                if result is not None and result.run_secs:
                    found.setdefault(choice, []).extend(map(float, result.run_secs))
        clear([str(one.artifact_path) for one in built if one.artifact_path is not None])
        return found

    def _build(self, job: Job, choices: Sequence[Choice]) -> list[Any]:
        target = job.task.target.to_tvm()
        modules = [candidate(job.task, job.points, choice).mod for choice in choices]
        return list(self.builder.build([BuilderInput(mod, target) for mod in modules]))

    def _run(self, built: Sequence[Any]) -> list[Any]:
        """Results of those that were built."""
        paths = [str(one.artifact_path) for one in built if one.artifact_path is not None]
        futures = iter(self.runner.run([RunnerInput(path, "cpu", []) for path in paths]))
        return [next(futures).result() if one.artifact_path is not None else None for one in built]

    def note(self, job: Job, choice: Choice, made: Any, result: Any) -> None:
        """Note what came of a candidate, once, and tell the caller."""
        if choice in job.times or choice in job.failed:
            return
        if made.artifact_path is not None:
            if recalled(made.artifact_path) is not None:
                return
            clear([str(made.artifact_path)])
        times = [] if result is None or not result.run_secs else result.run_secs
        seconds = [float(value) for value in times]
        if seconds:
            job.times[choice] = sorted(seconds)[len(seconds) // 2]
            self.measured(job, choice, seconds)
        else:
            job.failed[choice] = str(made.error_msg or (result and result.error_msg))

    def check(self) -> None:
        """End the search if it is time.

        Raises:
            StopSearch: it is.
        """
        if self.until is not None and time.monotonic() >= self.until:
            self.stop = "the time is over"
        if self.stop:
            raise StopSearch(self.stop)
