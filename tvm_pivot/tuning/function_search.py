"""Tuning of operators that are no layer, by MetaSchedule's own rules for CPUs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tvm
from tvm.ir import IRModule
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderInput, BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.runner import PyRunner, RunnerInput
from tvm.support.popen_pool import PopenPoolExecutor

from ..relay_passes.schedule_functions import finished
from .cost_model import xgb_model
from .database import REFUSED, rebuild, trace_as_json
from .explore import BATCH, Report, quiet, strategy, without_intrinsics
from .functions import FunctionTask, build_function
from .log_files import append
from .machine import BUILD_S, RULE_NAME, LocalMachine, Times, built, clear
from .records import TuningRecord, canonical
from .selection import FINAL, RULE
from .space import TASK
from .traces import KERNEL, replay
from .trials import ignore_interrupts

# Traces of earlier searches that are measured again.
KNOWN = 3

Check = Callable[[], None]


@dataclass(eq=False)
class FunctionJob:
    """A task and what is known of it so far.

    Attributes:
        task: the function.
        times: measured seconds of each trace, which is JSON as text; "" is the rule's schedule.
        traces: them as JSON.
        failed: candidates without times.
    """

    task: FunctionTask
    times: dict[str, float] = field(default_factory=dict)
    traces: dict[str, Any] = field(default_factory=dict)
    failed: int = 0

    @property
    def module(self) -> IRModule:
        """The function as MetaSchedule sees it."""
        named = self.task.func.with_attrs({"global_symbol": "main", TASK: self.task.name})
        return IRModule({"main": named})

    @property
    def trials(self) -> int:
        """Candidates tried."""
        return len(self.times) + self.failed

    def best(self, count: int) -> list[str]:
        """The fastest traces that are not the rule's, fastest first."""
        return sorted(filter(None, self.times), key=lambda text: self.times[text])[:count]

    def record(self, text: str, seconds: Sequence[float], stage: str) -> TuningRecord:
        """The record of a schedule; the rule's has no trace."""
        decisions = {**self.decisions(text), "stage": stage}
        return TuningRecord.now(self.task.key, decisions, seconds)

    def decisions(self, text: str) -> dict[str, Any]:
        """What says how a schedule is made; nothing for the rule's."""
        return {"trace": self.traces[text]} if text else {}


class FunctionSearch:
    """Builds, measures and records schedules of functions. A context: it ends its processes."""

    def __init__(
        self,
        tasks: Sequence[FunctionTask],
        machine: LocalMachine | None,
        workers: int,
        log: Path,
        measured: Callable[[int, float, float], None],
    ) -> None:
        """Args:
        tasks: the functions.
        machine: measures candidates; None where there are no tasks.
        workers: processes that compile.
        log: keeps their records.
        measured: is told of a trial: which task, its seconds, the best so far.
        """
        self.jobs = [FunctionJob(task) for task in tasks]
        self._machine, self._log, self._measured = machine, log, measured
        self._folder = tempfile.TemporaryDirectory(prefix="tvm_pivot_tune_")
        self._pool = PopenPoolExecutor(
            max_workers=workers, timeout=BUILD_S, initializer=ignore_interrupts
        )
        self._count = 0

    def __enter__(self) -> FunctionSearch:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False)
        self._folder.cleanup()

    def build(self, job: FunctionJob, funcs: Mapping[str, Any]) -> list[BuilderResult]:
        """Compile scheduled functions of one task, by the names of their files."""
        folder = Path(self._folder.name) / str(self.jobs.index(job))
        folder.mkdir(exist_ok=True)
        target = job.task.target
        waiting = [
            self._pool.submit(build_function, func, target, str(folder), name)
            for name, func in funcs.items()
        ]
        return [built(future) for future in waiting]

    def new_name(self) -> str:
        """A file's name that no candidate has had."""
        self._count += 1
        return str(self._count)

    def measure_rule(self, job: FunctionJob) -> None:
        """Measure what the target's rules make; other candidates are measured beside it."""
        (made,) = self.build(job, {RULE_NAME: job.task.by_rule})
        if made.artifact_path is not None:
            (seconds,) = self._times([str(made.artifact_path)])
            self.note(job, "", None, seconds if isinstance(seconds, list) else [])

    def measure_known(self, job: FunctionJob, records: Sequence[TuningRecord]) -> None:
        """Measure the best of earlier searches again, so that this one ends with no worse."""
        own = [record for record in records if record.task == job.task.key]
        traces: dict[str, Any] = {}
        funcs: dict[str, Any] = {}
        for record in sorted(own, key=lambda record: record.cost):
            trace = record.decisions.get("trace")
            text = canonical(trace).decode()
            if trace is None or text in traces or len(traces) == KNOWN:
                continue
            with contextlib.suppress(*REFUSED):
                funcs[self.new_name()] = job.task.by_trace(trace)
                traces[text] = trace
        made = self.build(job, funcs)
        ready = [str(one.artifact_path) for one in made if one.artifact_path is not None]
        times = iter(self._times(ready) if ready else [])
        for one, (text, trace) in zip(made, traces.items(), strict=True):
            seconds = next(times) if one.artifact_path is not None else ""
            self.note(job, text, trace, seconds if isinstance(seconds, list) else [])
        clear(ready)

    def _reported(
        self, jobs: Sequence[FunctionJob], number: int, candidate: Any, made: Any, result: Any
    ) -> None:
        """Note what came of a candidate, and delete what was built for it."""
        trace = trace_as_json(candidate.sch.trace)
        seconds = [] if result is None or not result.run_secs else map(float, result.run_secs)
        self.note(jobs[number], canonical(trace).decode(), trace, list(seconds))
        if made.artifact_path is not None:
            clear([str(made.artifact_path)])

    def note(self, job: FunctionJob, text: str, trace: Any, seconds: Sequence[float]) -> None:
        """Note what came of a candidate, and keep its record."""
        if not seconds:
            job.failed += 1
            return
        job.traces[text] = trace
        job.times[text] = median(seconds)
        append(self._log, [job.record(text, seconds, "search" if text else RULE)])
        self._measured(self.jobs.index(job), job.times[text], min(job.times.values()))

    def _times(self, artifacts: Sequence[str]) -> list[list[float] | str]:
        assert self._machine is not None
        return self._machine.measure(artifacts)

    def run(self, records: Sequence[TuningRecord], trials: int, seed: int, check: Check) -> None:
        """Measure the rules' schedules, and up to `trials` candidates of all tasks together.

        Args:
            records: of earlier searches; those of the same tasks are where this one starts.
            trials: how many.
            seed: of the search.
            check: raises StopSearch where the search is to end.
        """
        if trials < 1:
            return
        for job in self.jobs:
            check()
            self.measure_rule(job)
            if job.times:
                self.measure_known(job, records)
        jobs = [job for job in self.jobs if job.times]
        if not jobs or self._machine is None:
            return
        with quiet(), without_intrinsics(), tempfile.TemporaryDirectory() as folder:
            try:
                ms.tune.tune_tasks(
                    tasks=[_context(job, seed + i) for i, job in enumerate(jobs)],
                    task_weights=[float(job.task.calls) for job in jobs],
                    work_dir=folder,
                    max_trials_global=trials,
                    num_trials_per_iter=max(1, min(BATCH, trials // len(jobs))),
                    builder=_Builder(self, jobs),
                    runner=_Runner(self._machine, check),
                    database=_database(jobs, records),
                    cost_model=xgb_model("per-store-feature"),
                    measure_callbacks=[
                        Report(partial(self._reported, jobs)),
                        ms.measure_callback.UpdateCostModel(),
                        ms.measure_callback.AddToDatabase(),
                    ],
                )
            except Exception:
                check()  # exceptions that pass through C++ become others
                raise

    def finish(
        self, job: FunctionJob, finalists: int, rounds: int, least_gain: float
    ) -> tuple[str, float, float]:
        """Measure the best candidates once more beside the rule's, and record which one to use.

        Returns:
            It, the seconds of the rule's schedule, and its own.
        """
        texts = ["", *job.best(finalists)]
        task = job.task
        funcs = {
            self.new_name(): task.by_trace(job.traces[text]) if text else task.by_rule
            for text in texts
        }
        made = self.build(job, funcs)
        ready = {
            text: str(one.artifact_path)
            for text, one in zip(texts, made, strict=True)
            if one.artifact_path is not None
        }
        again: dict[str, list[float]] = {}
        for _ in range(rounds):
            for text, seconds in zip(ready, self._times([*ready.values()]), strict=True):
                again.setdefault(text, []).extend(seconds if isinstance(seconds, list) else [])
        costs = {text: median(seconds) for text, seconds in again.items() if seconds}
        rule = costs.get("", job.times[""])
        best = min(costs, key=lambda text: costs[text], default="")
        if "" not in costs or costs[best] > least_gain * rule:
            best = ""
        append(self._log, [job.record(best, again.get(best) or [rule], FINAL)])
        return best, rule, costs.get(best, rule)


def _context(job: FunctionJob, seed: int) -> Any:
    return ms.TuneContext(
        mod=job.module,
        target=job.task.target.to_tvm(),
        space_generator=space_generator(),
        search_strategy=strategy(),
        task_name=job.task.name,
        rand_state=seed + 1,
        num_threads=1,
    )


def space_generator() -> Any:
    """MetaSchedule's rules for CPUs, without threads and without tensor intrinsics."""
    rule, post, mutator = ms.schedule_rule, ms.postproc, ms.mutator
    written = rule.ReuseType(req="may", levels=[1, 2], scope="global")
    return ms.space_generator.PostOrderApply(
        sch_rules=[
            rule.InlineConstantScalars(),
            rule.AutoInline(
                into_producer=False,
                into_consumer=True,
                inline_const_tensor=True,
                disallow_if_then_else=True,
                require_injective=True,
                require_ordered=True,
                disallow_op=["tirx.exp"],
            ),
            rule.AddRFactor(max_jobs_per_core=16, max_innermost_factor=64),
            rule.MultiLevelTiling("SSRSRS", max_innermost_factor=64, reuse_write=written),
            rule.ParallelizeVectorizeUnroll(
                max_jobs_per_core=-1,
                max_vectorize_extent=64,
                unroll_max_steps=[0, 16, 64, 512],
                unroll_explicit=True,
            ),
            rule.RandomComputeLocation(),
        ],
        postprocs=[
            post.DisallowDynamicLoop(),
            post.RewriteParallelVectorizeUnroll(),
            post.RewriteReductionBlock(),
        ],
        mutator_probs={
            mutator.MutateTileSize(): 0.9,
            mutator.MutateComputeLocation(): 0.05,
            mutator.MutateUnroll(): 0.05,
        },
    )


def _database(jobs: Sequence[FunctionJob], records: Sequence[TuningRecord]) -> Any:
    by_key = {job.task.key: job for job in jobs}
    own = [record for record in records if record.task in by_key and "trace" in record.decisions]
    target = jobs[0].task.target.to_tvm()

    def trace(record: TuningRecord, module: IRModule) -> Any:
        return replay(record.decisions["trace"], module["main"]).trace

    return rebuild(own, lambda key: by_key[key].module, trace, target).database


@derived_object
class _Builder(PyBuilder):  # type: ignore[misc]
    """Builds what MetaSchedule has scheduled."""

    def __init__(self, search: FunctionSearch, jobs: Sequence[FunctionJob]) -> None:
        super().__init__()
        self.search, self.jobs = search, {job.task.name: job for job in jobs}

    def build(self, build_inputs: Sequence[BuilderInput]) -> list[BuilderResult]:
        """Build the candidates of one task."""
        if not build_inputs:
            return []
        job = self.jobs[str(build_inputs[0].mod["main"].attrs[TASK])]
        made = {
            self.search.new_name(): finished(tvm.s_tir.Schedule(item.mod), KERNEL)
            for item in build_inputs
        }
        return self.search.build(job, made)


@derived_object
class _Runner(PyRunner):  # type: ignore[misc]
    """Measures, and ends the search when it is time."""

    def __init__(self, machine: LocalMachine, check: Check) -> None:
        super().__init__()
        self.machine, self.check = machine, check

    def run(self, runner_inputs: Sequence[RunnerInput]) -> list[Any]:
        """Measure candidates of one task."""
        self.check()
        artifacts = [str(item.artifact_path) for item in runner_inputs]
        found = self.machine.measure(artifacts) if artifacts else []
        return [Times(None, x) if isinstance(x, str) else Times(x, None) for x in found]
