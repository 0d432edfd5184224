"""Exploring: MetaSchedule's evolutionary search and XGBoost choose what is measured."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderInput, BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.measure_callback import PyMeasureCallback
from tvm.s_tir.meta_schedule.runner import PyRunner, RunnerInput

from ..schedules.choices import Choice
from .cost_model import CorrectedPredictions
from .database import rebuild
from .features import ChoiceFeatures
from .lookup import nearest
from .machine import RECALLED, Times, recalled
from .records import TuningRecord
from .search import Job, Search
from .selection import stored_choice
from .space import TASK, Points, candidate, choice_of, space_generator, task_module

BATCH = 8
# Tasks whose records teach the cost model, and how far away they may be.
_SIMILAR, _SIMILAR_WITHIN = 8, 8.0


def explore(search: Search, records: Sequence[TuningRecord], trials: int, seed: int) -> None:
    """Let MetaSchedule choose up to `trials` candidates, of all tasks together.

    The scheduler gives more of them to tasks that take more of the network's time and that
    still become faster. Records of the same tasks are where the search starts; those of
    similar ones teach the cost model first.
    """
    jobs = [job for job in search.jobs if len(job.points.choices) > len(job.times)]
    if not jobs or trials < 1:
        return
    now = [
        TuningRecord.now(job.task.key, {"choice": choice.decisions()}, [seconds])
        for job in jobs
        for choice, seconds in job.times.items()
    ]
    records = [*records, *now]
    memory = {job.name: known_times(job, records) for job in jobs}
    extractor = ChoiceFeatures(jobs[0].task.target)
    for job in jobs:
        extractor.add(job.name, job.task.choices)
    with quiet(), without_intrinsics(), tempfile.TemporaryDirectory() as folder:
        contexts = [_context(job, seed + i) for i, job in enumerate(jobs)]
        model = CorrectedPredictions(extractor)
        _teach(model, jobs, contexts, records)
        # Notes what no runner saw: candidates that were not built, and results that came late.
        callbacks = [
            Report(
                lambda number, candidate, made, result: search.note(
                    jobs[number], choice_of(candidate.sch.mod), made, result
                ),
                search.check,
            )
        ]
        if not search.later:
            callbacks += [
                ms.measure_callback.UpdateCostModel(),
                ms.measure_callback.AddToDatabase(),
            ]
        try:
            ms.tune.tune_tasks(
                tasks=contexts,
                task_weights=[job.weight for job in jobs],
                work_dir=folder,
                max_trials_global=trials,
                num_trials_per_iter=BATCH,
                builder=_Builder(search, jobs, memory),
                runner=_Runner(search),
                database=_database(jobs, records),
                cost_model=model,
                measure_callbacks=callbacks,
            )
        except Exception:
            # Exceptions that pass through C++ become others.
            if not search.stop:
                raise
            search.check()


@derived_object
class _Builder(PyBuilder):  # type: ignore[misc]
    """The search's builder; of candidates that are measured already, the artifacts are times.

    MetaSchedule keeps apart what one search has measured, not what earlier ones have.
    """

    def __init__(
        self, search: Search, jobs: Sequence[Job], known: Mapping[str, Mapping[Choice, float]]
    ) -> None:
        super().__init__()
        self.search, self.known = search, known
        self.jobs = {job.name: job for job in jobs}

    def build(self, build_inputs: Sequence[BuilderInput]) -> list[BuilderResult]:
        """Build the candidates of one task that are new."""
        if not build_inputs:
            return []
        task = str(build_inputs[0].mod["main"].attrs[TASK])
        choices = [choice_of(item.mod) for item in build_inputs]
        times = [self.known[task].get(choice) for choice in choices]
        pairs = zip(build_inputs, times, strict=True)
        built = iter(self.search.builder.build([item for item, known in pairs if known is None]))
        results = [
            next(built) if known is None else BuilderResult(f"{RECALLED}{known!r}", None)
            for known in times
        ]
        for choice, made in zip(choices, results, strict=True):
            if made.artifact_path is not None:
                self.search.made[str(made.artifact_path)] = (self.jobs[task], choice, made)
        return results


@derived_object
class _Runner(PyRunner):  # type: ignore[misc]
    """The search's runner. It notes results at once: MetaSchedule looks at them much later."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self.search = search

    def run(self, runner_inputs: Sequence[RunnerInput]) -> list[Any]:
        """Measure the candidates that are new."""
        times = [recalled(item.artifact_path) for item in runner_inputs]
        pairs = list(zip(runner_inputs, times, strict=True))
        new = [item for item, known in pairs if known is None]
        futures = list(self.search.runner.run(new)) if new else []
        for item, future in zip(new, futures, strict=True):
            if future.done():
                job, choice, made = self.search.made[str(item.artifact_path)]
                self.search.note(job, choice, made, future.result())
        self.search.check()
        measured = iter(futures)
        return [next(measured) if known is None else Times([known], None) for known in times]


@derived_object
class Report(PyMeasureCallback):  # type: ignore[misc]
    """Tells what came of each candidate: the task's number, the candidate, its build, its times;
    and that a batch is done.
    """

    def __init__(
        self, note: Callable[[int, Any, Any, Any], None], done: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self.note, self.done = note, done

    def apply(
        self,
        task_scheduler: Any,
        task_id: int,
        measure_candidates: Sequence[Any],
        builder_results: Sequence[Any],
        runner_results: Sequence[Any],
    ) -> None:
        """Note one batch."""
        three = zip(measure_candidates, builder_results, runner_results, strict=True)
        for one, made, result in three:
            self.note(task_id, one, made, result)
        if self.done is not None:
            self.done()


def known_times(job: Job, records: Iterable[TuningRecord]) -> dict[Choice, float]:
    """What is known of a task's choices: of each its last time."""
    known: dict[Choice, float] = {}
    for record in records:
        if record.task == job.task.key:
            with contextlib.suppress(ValueError):
                known[stored_choice(record)] = record.cost
    return known


def strategy() -> Any:
    """MetaSchedule's evolutionary search, over few candidates at a time."""
    return ms.search_strategy.EvolutionarySearch(
        population_size=96,
        init_measured_ratio=0.3,
        init_min_unmeasured=1,
        genetic_num_iters=3,
        genetic_mutate_prob=0.85,
        eps_greedy=0.1,
    )


def _context(job: Job, seed: int) -> Any:
    return ms.TuneContext(
        mod=job.module,
        target=job.task.target.to_tvm(),
        space_generator=space_generator(job.points, seed),
        search_strategy=strategy(),
        task_name=job.task.names[0],
        rand_state=seed + 1,
        num_threads=1,
    )


def _database(jobs: Sequence[Job], records: Iterable[TuningRecord]) -> Any:
    """What is known of exactly these tasks."""
    by_key = {job.task.key: job for job in jobs}

    def trace(record: TuningRecord, module: tvm.IRModule) -> Any:
        job = by_key[record.task]
        choice = stored_choice(record)
        if choice not in job.task.choices:
            raise ValueError("not in the space any more")
        return candidate(job.task, job.points, choice).trace

    own = [record for record in records if record.task in by_key]
    target = jobs[0].task.target.to_tvm()
    return rebuild(own, lambda key: by_key[key].module, trace, target).database


def _teach(
    model: Any, jobs: Sequence[Job], contexts: Sequence[Any], records: Sequence[TuningRecord]
) -> None:
    """Train the cost model on what is known of these tasks and of similar ones."""
    near = {
        found.record.task: found.record.task
        for job in jobs
        for found in nearest(records, job.task.key, _SIMILAR, within=_SIMILAR_WITHIN)
    }
    for key in near:
        usable: dict[Choice, float] = {}
        for record in records:
            if record.task == key:
                with contextlib.suppress(ValueError):
                    usable[stored_choice(record)] = record.cost
        if len(usable) < 2:
            continue
        points = Points(usable)
        context = ms.TuneContext(mod=task_module(key), num_threads=1)
        known = [
            ms.search_strategy.MeasureCandidate(candidate(key, points, choice), [])
            for choice in usable
        ]
        results = [ms.runner.RunnerResult([cost], None) for cost in usable.values()]
        model.update(context, known, results)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MetaSchedule prints tables for every batch."""
    loggers = [logging.getLogger(f"tvm.s_tir.meta_schedule{x}") for x in ("", ".cost_model")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def without_intrinsics() -> Iterator[None]:
    """TuneContext imports the tensor intrinsics of all targets, which takes up to a minute.

    No candidate of ours uses one.
    """
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    parent = sys.modules["tvm.s_tir"]
    empty = sys.modules[name] = types.ModuleType(name)
    had = hasattr(parent, "tensor_intrin")
    try:
        yield
    finally:
        if sys.modules.get(name) is empty:
            del sys.modules[name]
        if not had and hasattr(parent, "tensor_intrin"):
            delattr(parent, "tensor_intrin")
