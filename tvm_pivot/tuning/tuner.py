"""`tune`: find faster kernels for a network by measuring, and keep a log of it."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from os import PathLike
from pathlib import Path
from typing import Any

from ..compiler import build
from ..errors import TuningError
from ..importer import import_model
from ..relay_passes import PHASES, PIVOT_SECONDS, Compilation
from ..schedules.choices import Choice
from ..targets import PivotTarget, cannot_run, resolve
from .confirm import in_network, operator
from .explore import explore
from .function_search import FunctionJob, FunctionSearch
from .functions import FunctionTask, function_tasks, model_functions
from .log_files import append, read
from .machine import CandidateBuilder, LocalMachine, LocalRunner, WithArguments, Workshop, workers
from .records import TuningRecord
from .search import Job, Search, StopSearch
from .selection import FINAL, RULE, shipped_records
from .tasks import LayerTask, network_tasks
from .traces import KERNEL

TRIALS_PER_TASK = 32
# How many candidates are measured once more at the end, and what one must gain to replace the rule.
FINALISTS, LEAST_GAIN = 3, 0.97
_FINAL_ROUNDS = 4
# The same in the network, for the layers of a task together.
LEAST_GAIN_THERE = 0.99


@dataclass(frozen=True)
class TunedTask:
    """What came of one task.

    Attributes:
        layers: the layers that it stands for; of an operator that is no layer, its function.
        kernel: the kernel's form, or "function".
        trials: candidates measured.
        rule_seconds: one run of the kernel that the target's rule makes, by itself.
        seconds: the same times what the kernel that was found gains, in the network where that
            was measured; the rule's where none was faster.
        decisions: how that is made.
    """

    layers: tuple[str, ...]
    kernel: str
    trials: int
    rule_seconds: float
    seconds: float
    decisions: Mapping[str, Any]

    @property
    def gain(self) -> float:
        """How many times as fast as the rule's kernel."""
        return self.rule_seconds / self.seconds


@dataclass(frozen=True)
class TuneReport:
    """What tuning found. ``print(report)`` shows a table.

    Attributes:
        tasks: in the order they run.
        seconds: how long it took.
        stopped: why it ended before all trials were used; empty if it did not.
        log: where the records are.
        notes: what else is to be said of the measurements.
    """

    tasks: tuple[TunedTask, ...]
    seconds: float
    stopped: str
    log: Path
    notes: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """How many times as fast a layer or operator became, in the geometric mean."""
        logs = [log(task.gain) for task in self.tasks for _ in task.layers]
        return exp(sum(logs) / len(logs)) if logs else 1.0

    def __str__(self) -> str:
        lines = [f"{'layer':32}  {'layers':>6}  {'trials':>6}  {'rule':>10}  {'tuned':>10}  gain"]
        for task in self.tasks:
            rule, tuned = task.rule_seconds * 1e6, task.seconds * 1e6
            lines.append(
                f"{task.layers[0][-32:]:32}  {len(task.layers):6}  {task.trials:6}  "
                f"{rule:7.1f} us  {tuned:7.1f} us  {task.gain:.2f}x"
            )
        trials = sum(task.trials for task in self.tasks)
        end = f", stopped: {self.stopped}" if self.stopped else ""
        lines.append(f"{trials} trials in {self.seconds:.0f} s{end}; {self.gain:.2f}x over layers")
        return "\n".join([*lines, *self.notes])


class Progress:
    """Told how tuning goes on; this one says nothing."""

    def start(self, names: Sequence[str], trials: int) -> None:
        """The tasks, and how many trials there will be at most."""

    def measured(self, task: int, seconds: float, best: float) -> None:
        """A trial of a task, and the task's best time so far."""

    def phase(self, text: str) -> None:
        """What is done now."""


def tune(
    model: Any,
    target: str | PivotTarget = "x86",
    *,
    log: str | PathLike[str],
    trials: int | None = None,
    minutes: float | None = None,
    runner: Any = "local",
    example_inputs: Sequence[Any] | None = None,
    params: Mapping[str, Any] | None = None,
    shapes: Mapping[str, int | Sequence[int]] | None = None,
    precision: str = "float32",
    pivot_seconds: float = PIVOT_SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> TuneReport:
    """Search for faster kernels of a network's layers and other operators, for one thread.

    Every candidate that is measured is in the log at once, whatever happens later. A search that is
    started again with the same log goes on where it ended.

    Args:
        model: as for `build`.
        target: a CPU that can be measured: this one, or that of the runner's devices.
        log: the log file; made if there is none. `build(log=...)` reads it.
        trials: candidates to measure, of all tasks together; default: 32 per task. Operators that
            are no layer are tuned on this machine only, and only where they take a part of the
            network's time.
        minutes: when to stop.
        runner: ``"local"`` for this machine, or what `rpc` returns, told
            ``allocate="tvm_pivot.tuning.artifacts:contents_of"``.
        example_inputs, params, shapes, precision, pivot_seconds: as for `build`.
        seed: of the search. Times steer it too, so it does not repeat exactly.
        progress: is told how it goes on.

    Returns:
        What was found. Ctrl-C ends the search early, with the report of what is known.

    Raises:
        TuningError: the log cannot be used, or nothing of the network can be tuned.
        UnsupportedTargetError, ModelImportError, CompileError: as for `build`.
    """
    began = time.monotonic()
    until = None if minutes is None else began + 60 * minutes
    described = resolve(target).require_schedules().with_precision(precision)
    if described.family == "cuda":
        raise TuningError("GPUs are tuned by batches of candidates: see --batch-out, `write_batch`")
    reason = cannot_run(described) if runner == "local" else None
    if reason is not None:
        raise TuningError(f"candidates are {reason}: measure them on a farm that can (--tracker)")
    path, tell = Path(log), progress or Progress()
    if not path.parent.is_dir():  # before minutes of measuring, not after
        raise TuningError(f"cannot write {path}: there is no directory {path.parent}")
    known = [*(read(path).fresh if path.exists() else ()), *shipped_records(described)]
    tell.phase("reading the model")
    more: dict[str, Any] = {"example_inputs": example_inputs, "params": params, "shapes": shapes}
    more["pivot_seconds"] = pivot_seconds
    tasks = model_tasks(model, described, **more)
    functions = timed_functions(model, described, **more) if runner == "local" else []
    if not tasks and not functions:
        raise TuningError("the network has nothing that can be tuned")
    jobs = [Job(task) for task in tasks]
    count = len(jobs) + len(functions)
    total = TRIALS_PER_TASK * count if trials is None else trials
    of_functions = total * len(functions) // count
    names = [*(job.task.names[0] for job in jobs), *(task.name for task in functions)]
    tell.start(names, total)

    def measured(job: Job, choice: Choice, seconds: Sequence[float]) -> None:
        stage = RULE if choice == job.task.rule else "search"
        append(path, [_record(job, choice, seconds, stage)])
        tell.measured(jobs.index(job), job.times[choice], job.times[job.best()[0]])

    def tried(function: int, seconds: float, best: float) -> None:
        tell.measured(len(jobs) + function, seconds, best)

    machine = LocalMachine(described) if runner == "local" else None
    measuring = LocalRunner(machine) if machine is not None else WithArguments(runner)
    stopped = ""
    with (
        _ended(machine),
        Workshop({job.name: job.task for job in jobs}, workers()) as workshop,
        FunctionSearch(functions, machine, workers(), path, tried) as others,
    ):
        search = Search(jobs, CandidateBuilder(workshop), measuring, measured, until)
        with _interruptible(search):
            with contextlib.suppress(StopSearch):
                others.run(known, of_functions, seed, _check(search, of_functions / total))
            try:
                for job in jobs:
                    tell.phase(job.task.names[0])
                    search.measure(job, job.seeds(known))
                left = total - of_functions - sum(job.trials for job in jobs)
                explore(search, known, left, seed)
            except StopSearch as e:
                stopped = str(e)
        tell.phase("measuring the best once more")
        search.until = None
        found = [_finish(search, job, path) for job in jobs if job.times]
        operators = [(_finish_function(others, job), job) for job in others.jobs if job.times]
    if machine is not None:
        tell.phase("comparing networks")
        times = in_network(model, described, path, **more)
        found = [_confirmed(task, jobs, times, path) for task in found]
        found += [_confirmed_function(task, job, times, path) for task, job in operators]
    return TuneReport(tuple(found), time.monotonic() - began, stopped, path)


def timed_functions(
    model: Any, target: PivotTarget, *, pivot_seconds: float = PIVOT_SECONDS, **more: Any
) -> list[FunctionTask]:
    """The operators of a model that are no layer and are worth tuning; see `function_tasks`."""
    imported = import_model(model, **more)
    found = model_functions(imported.mod, target, pivot_seconds=pivot_seconds)
    if not found:
        return []
    net = build(model, target, pivot_seconds=pivot_seconds, tuned=False, threads=1, **more)
    return function_tasks(found, net, target)


def _check(search: Search, share: float) -> Callable[[], None]:
    """Ends the functions' search when it has had its share of the time."""
    now = time.monotonic()
    until = None if search.until is None else now + share * (search.until - now)

    def check() -> None:
        if search.stop or (until is not None and time.monotonic() >= until):
            raise StopSearch(search.stop)

    return check


def model_tasks(
    model: Any, target: PivotTarget, *, pivot_seconds: float = PIVOT_SECONDS, **more: Any
) -> list[LayerTask]:
    """What there is to tune in a model; see `tune`."""
    imported = import_model(model, **more)
    state = Compilation(imported.mod, target, pivot_seconds=pivot_seconds)
    for phase in PHASES:
        if phase.analysis:
            state = phase.run(state)
    return network_tasks(state.mod, state.planned, target)


def _record(job: Job, choice: Choice, seconds: Sequence[float], stage: str) -> TuningRecord:
    decisions = {"choice": choice.decisions(), "stage": stage}
    return TuningRecord.now(job.task.key, decisions, seconds)


def _finish(search: Search, job: Job, path: Path) -> TunedTask:
    """Measure a task's best candidates beside the rule's, and record which one to use."""
    rule = job.task.rule
    if rule not in job.times:
        raise TuningError(f"{job.task.names[0]}: {job.failed.get(rule, 'was not measured')}")
    trials = job.trials
    finalists = [choice for choice in job.best(FINALISTS + 1) if choice != rule][:FINALISTS]
    again = search.compare(job, [rule, *finalists], _FINAL_ROUNDS)
    costs = {choice: sorted(seconds)[len(seconds) // 2] for choice, seconds in again.items()}
    best = min(costs, key=lambda choice: costs[choice], default=rule)
    if rule not in costs or costs[best] > LEAST_GAIN * costs[rule]:
        best = rule
    if best in again:
        append(path, [_record(job, best, again[best], FINAL)])
    before = costs.get(rule, job.times[rule])
    after = costs.get(best, before)
    task = job.task
    return TunedTask(task.names, task.key.kernel, trials, before, after, best.decisions())


def _finish_function(search: FunctionSearch, job: FunctionJob) -> TunedTask:
    trials = job.trials
    best, before, after = search.finish(job, FINALISTS, _FINAL_ROUNDS, LEAST_GAIN)
    return TunedTask((job.task.name,), KERNEL, trials, before, after, job.decisions(best))


def _confirmed(
    task: TunedTask,
    jobs: Sequence[Job],
    times: tuple[Mapping[str, float], Mapping[str, float]],
    path: Path,
) -> TunedTask:
    """The task as it is in its network; where the rule's kernel is as fast there, it is kept."""
    (job,) = (job for job in jobs if job.task.names == task.layers)
    rule, tuned = (sum(some.get(name, 0.0) for name in task.layers) for some in times)
    if task.decisions == job.task.rule.decisions() or not rule or not tuned:
        return task
    before = task.rule_seconds
    if tuned <= LEAST_GAIN_THERE * rule:
        return replace(task, seconds=before * tuned / rule)
    append(path, [_record(job, job.task.rule, [before], FINAL)])
    return replace(task, seconds=before, decisions=job.task.rule.decisions())


def _confirmed_function(
    task: TunedTask,
    job: FunctionJob,
    times: tuple[Mapping[str, float], Mapping[str, float]],
    path: Path,
) -> TunedTask:
    """The same of a function. One that cannot be found again in both networks keeps its rule."""
    rule, tuned = (some.get(operator(job.task.name), 0.0) for some in times)
    if not task.decisions:
        return task
    before = task.rule_seconds
    if rule and tuned <= LEAST_GAIN_THERE * rule:
        return replace(task, seconds=before * tuned / rule)
    append(path, [job.record("", [before], FINAL)])
    return replace(task, seconds=before, decisions={})


@contextlib.contextmanager
def _ended(machine: LocalMachine | None) -> Iterator[None]:
    try:
        yield
    finally:
        if machine is not None:
            machine.close()


@contextlib.contextmanager
def _interruptible(search: Search) -> Iterator[None]:
    """Ctrl-C ends the search behind the batch at hand; the second one, the program."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.getsignal(signal.SIGINT)

    def stop(*_: object) -> None:
        search.stop = "Ctrl-C"
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
