"""A MetaSchedule database made from records.

TVM's own database files break at the first torn line, or crash the process, so they are never
kept: every search starts from a new database in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from .records import TaskKey, TuningRecord

# What TVM raises for a trace or a workload that does not fit; its own errors are RuntimeErrors.
REFUSED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class Rebuilt:
    """A database and what is in it.

    Attributes:
        database: a `tvm.s_tir.meta_schedule.database.MemoryDatabase`.
        used: how many records are in it.
        refused: the other records, with the reason in one line each.
    """

    database: Any
    used: int
    refused: tuple[tuple[TuningRecord, str], ...]


def rebuild(
    records: Iterable[TuningRecord],
    workload: Callable[[TaskKey], tvm.IRModule],
    trace: Callable[[TuningRecord, tvm.IRModule], Any],
    target: tvm.target.Target,
) -> Rebuilt:
    """Fill a new database.

    Args:
        records: of any tasks; each task is one workload.
        workload: makes the module of a task, with one function "main". It may refuse a task by
            raising ValueError, KeyError and the like.
        trace: the `Trace` of a record on that module, e.g. `stored_trace`; it may refuse too.
        target: what to file the records under.
    """
    database = ms.database.MemoryDatabase()
    modules: dict[TaskKey, tvm.IRModule] = {}
    refused = []
    used = 0
    for record in records:
        try:
            if record.task not in modules:
                modules[record.task] = workload(record.task)
            module = modules[record.task]
            made = trace(record, module)
            info = ms.arg_info.ArgInfo.from_entry_func(module, remove_preproc=True)
            filed = database.commit_workload(module)
            seconds = list(record.seconds)
            database.commit_tuning_record(
                ms.database.TuningRecord(made, filed, seconds, target, info)
            )
            used += 1
        except REFUSED as e:
            refused.append((record, _one_line(e)))
    return Rebuilt(database, used, tuple(refused))


def trace_as_json(trace: Any) -> list[Any]:
    """A trace for the ``"trace"`` of a record's decisions: lists, numbers and strings.

    `Trace.as_json` alone leaves numbers in it that are TVM objects.
    """
    made = _plain(trace.as_json())
    assert isinstance(made, list)
    return made


def stored_trace(record: TuningRecord, module: tvm.IRModule) -> Any:
    """The trace of a record's decisions, replayed on its workload: what `trace_as_json` returned.

    Raises:
        ValueError: there is none, or it is none.
        RuntimeError: it does not fit the workload, as when a kernel has changed since.
    """
    return replayed(record.decisions.get("trace"), module).trace


def replayed(trace: Any, module: tvm.IRModule) -> s_tir.Schedule:
    """The schedule that a trace makes of a module; errors as of `stored_trace`."""
    _check_trace(trace)
    schedule = s_tir.Schedule(module)
    s_tir.schedule.Trace.apply_json_to_schedule(trace, schedule)
    return schedule


def _check_trace(found: Any) -> None:
    """Refuse what TVM would read without checking."""
    if not isinstance(found, list) or len(found) != 2 or not _all_lists(found):
        raise ValueError("no trace: [instructions, decisions] is expected")
    instructions, decisions = found
    if not _all_lists(instructions) or not _all_lists(decisions):
        raise ValueError("no trace: [instructions, decisions] is expected")
    for one in instructions:
        if len(one) != 4 or not isinstance(one[0], str) or not _all_lists(one[1:]):
            raise ValueError(f"no instruction of a trace: {one!r:.60}")
    for one in decisions:
        if len(one) != 2 or one[0] not in range(len(instructions)) or not _is_choice(one[1]):
            raise ValueError(f"no decision of a trace: {one!r:.60}")


def _is_choice(value: Any) -> bool:
    """An index, or the factors of a loop: TVM divides by them, and dies of a zero."""
    if isinstance(value, list):
        return bool(value) and all(type(factor) is int and factor > 0 for factor in value)
    return type(value) is int


def _all_lists(items: list[Any]) -> bool:
    return all(isinstance(item, list) for item in items)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value) if isinstance(value, str) else value.value  # IntImm, FloatImm


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
