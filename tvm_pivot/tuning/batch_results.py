"""The results of a batch that was measured elsewhere, and the records that become of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import ArtifactError, TuningError
from ..schedules.choices import Choice
from ..schema import loads
from .log_files import append
from .records import TaskKey, TuningRecord
from .selection import FINAL, RULE
from .tuner import LEAST_GAIN, TunedTask, TuneReport

FORMAT = 1
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Timed:
    """A candidate: its decisions, its times, and why there are none."""

    decisions: dict[str, Any]
    seconds: tuple[float, ...]
    failed: str


@dataclass(frozen=True)
class TaskResults:
    """What was measured of one task.

    Attributes:
        task, layers: which one, and the layers that it stands for.
        candidates: all of them; the rule's comes first.
        again: the rule's and the best, beside each other; empty where none ran.
    """

    task: TaskKey
    layers: tuple[str, ...]
    candidates: tuple[Timed, ...]
    again: tuple[Timed, ...]

    def __post_init__(self) -> None:
        if not self.candidates or not self.layers:
            raise ValueError("no layers, or no candidates")


@dataclass(frozen=True)
class Machine:
    """Where and when it was measured."""

    device: str
    arch: str
    multiprocessors: int
    driver: str
    python: str
    date: str


@dataclass(frozen=True)
class BatchResults:
    """The content of results.json."""

    format: int
    batch: str
    target: str
    tvm: str
    package: str
    machine: Machine
    tasks: tuple[TaskResults, ...]


def read_batch(results: str | PathLike[str], log: str | PathLike[str]) -> TuneReport:
    """Add what was measured to a log, and say what was found.

    The best candidate of a task is recorded as its outcome if it was clearly faster than the
    rule's, beside which it was measured once more; else the rule's is. Reading results twice adds
    nothing new.

    Raises:
        TuningError: the results cannot be read or are damaged, or the log cannot be written.
    """
    path = Path(log)
    found = _read(Path(results))
    try:
        records = [record for task in found.tasks for record in _records(task, found)]
    except ValueError as e:
        raise TuningError(f"{results}: {e}") from e
    append(path, records)
    tasks = tuple(one for task in found.tasks if (one := _tuned(task)) is not None)
    return TuneReport(tasks, 0.0, "", path, tuple(_notes(found)))


def _read(path: Path) -> BatchResults:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise TuningError(f"{path} is larger than {_MOST_BYTES >> 20} MB")
        found = loads(BatchResults, path.read_bytes())
    except OSError as e:
        raise TuningError(f"cannot read {path}: {e.strerror or e}") from e
    except ArtifactError as e:
        raise TuningError(f"{path} holds no results of a batch: {e}") from e
    if found.format != FORMAT:
        raise TuningError(f"{path} has format {found.format}; this version reads {FORMAT}")
    return found


def _records(results: TaskResults, batch: BatchResults) -> Iterator[TuningRecord]:
    rule = results.candidates[0].decisions

    def record(one: Timed, stage: str) -> TuningRecord:
        Choice.of(one.decisions)
        decisions = {"choice": one.decisions, "stage": stage}
        made = TuningRecord.now(results.task, decisions, one.seconds)
        date = batch.machine.date
        return replace(made, tvm=batch.tvm, package=batch.package, date=date)

    for one in results.candidates:
        if not one.failed:
            yield record(one, RULE if one.decisions == rule else "search")
    outcome = _outcome(results)
    if outcome is not None:
        yield record(outcome[1], FINAL)


def _outcome(results: TaskResults) -> tuple[Timed, Timed] | None:
    """The rule's candidate and the one to use, where they were measured beside each other."""
    rule = next((x for x in results.again if x.decisions == results.candidates[0].decisions), None)
    if rule is None:
        return None
    best = min(results.again, key=lambda one: median(one.seconds))
    faster = median(best.seconds) <= LEAST_GAIN * median(rule.seconds)
    return rule, best if faster else rule


def _tuned(results: TaskResults) -> TunedTask | None:
    outcome = _outcome(results)
    if outcome is None:
        return None
    rule, best = outcome
    form = str(best.decisions["form"])
    costs = (median(rule.seconds), median(best.seconds))
    return TunedTask(results.layers, form, len(results.candidates), *costs, best.decisions)


def _notes(batch: BatchResults) -> Iterator[str]:
    """What the user should know of where it was measured, and of what failed."""
    machine = batch.machine
    yield f"measured on {machine.device} ({machine.arch}), driver {machine.driver or 'unknown'}"
    features = f"{machine.multiprocessors} multiprocessors"
    others = {task.task.target for task in batch.tasks}
    if any(target.mcpu != machine.arch or features not in target.features for target in others):
        told = ", ".join(sorted({f"{t.mcpu}, {' '.join(t.features)}" for t in others}))
        yield f"this GPU ({features}) is not what the target {batch.target} describes ({told})"
    yield from _failures(batch.tasks)


def _failures(tasks: Sequence[TaskResults]) -> Iterator[str]:
    failed = [one for task in tasks for one in task.candidates if one.failed]
    if failed:
        yield f"{len(failed)} candidates failed, the first: {failed[0].failed}"
    for task in tasks:
        if task.candidates[0].failed:
            yield f"{task.layers[0]}: the rule's kernel failed: {task.candidates[0].failed}"
