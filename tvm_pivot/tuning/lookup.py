"""Which record to use for a task: one of the same task, or of a task that is like it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..schedules.core_costs import AMD
from .records import TargetKey, TaskKey, TuningRecord

# How much a doubling counts. The block's height decides which register tiles are possible at all;
# other extents only how often a tile repeats.
_WEIGHTS = {"block_rows": 4.0, "taps": 2.0}
# These follow from others and would count them twice.
_DERIVED = frozenset(
    {"image_floats", "row_blocks", "pitch", "channels", "input_height", "input_width"}
)
_OTHER_CPU, _OTHER_MAKER = 0.5, 2.0
_UNKNOWN = 2.0


@dataclass(frozen=True)
class Neighbour:
    """The best record of a task that is like the one asked for; distance 0 is the task itself."""

    distance: float
    record: TuningRecord


def best(records: Iterable[TuningRecord], task: TaskKey) -> TuningRecord | None:
    """The fastest record of exactly this task, None if there is none."""
    same = [record for record in records if record.task == task]
    return min(same, key=_by_cost, default=None)


def nearest(
    records: Iterable[TuningRecord], task: TaskKey, count: int = 1, within: float = math.inf
) -> list[Neighbour]:
    """The best record of each of the `count` tasks that are most like `task`, nearest first.

    Tasks farther away than `within` and tasks that `distance` cannot compare are left out.
    """
    fastest: dict[TaskKey, TuningRecord] = {}
    for record in records:
        known = fastest.get(record.task)
        if known is None or _by_cost(record) < _by_cost(known):
            fastest[record.task] = record
    found = [
        Neighbour(apart, record)
        for key, record in fastest.items()
        if (apart := distance(task, key)) is not None and apart <= within
    ]
    return sorted(found, key=lambda near: (near.distance, *_by_cost(near.record)))[:count]


def distance(one: TaskKey, other: TaskKey) -> float | None:
    """How unlike two tasks are: 0 for equal tasks, 1 for twice the rows, say.

    The sum of: ``|log2(a / b)|`` for every extent of the problem (4 times that for the block's
    height, 2 times for the taps), for the density and for the cores; 1 for every other field that
    differs, such as one of the epilogue; 1 if one output is compact and the other has gaps between
    its rows; 2 for another CPU of the family, but 0.5 for another x86 of the same maker; 2 for a
    field that only one of them has.

    Returns:
        None if a schedule of one cannot serve the other: another kernel, another family of targets
        or another vector length.
    """
    here, there = one.target, other.target
    if (one.kernel, here.family, here.lanes) != (other.kernel, there.family, there.lanes):
        return None
    a, b = _features(one), _features(other)
    total = _machines_apart(here, there)
    for name in a.keys() | b.keys():
        if name not in a or name not in b:
            total += _UNKNOWN
        else:
            total += _WEIGHTS.get(name, 1.0) * _apart(a[name], b[name])
    return total


def on_such_machines(one: TaskKey, other: TaskKey) -> bool:
    """Whether both ask for the same kernel, on x86 CPUs of the same maker."""
    return distance(one, other) == _OTHER_CPU and one.problem == other.problem


def _features(task: TaskKey) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in task.problem.items():
        if isinstance(value, dict):
            found.update({f"{name}.{inner}": v for inner, v in value.items()})
        elif name not in _DERIVED:
            found[name] = value
    if "pitch" in task.problem and "width" in task.problem:
        found["compact"] = task.problem["pitch"] == task.problem["width"]
    density = task.density
    # Without a density, entries say the same of tasks that are otherwise alike.
    if task.kernel != "depthwise":  # which keeps all weights: shapes say it all
        found["density"] = float(task.entries) if density is None else density
    return found


def _apart(a: Any, b: Any) -> float:
    """How unlike two values of one field are."""
    if a == b and isinstance(a, bool) == isinstance(b, bool):
        return 0.0
    sizes = all(isinstance(x, int | float) and not isinstance(x, bool) and x > 0 for x in (a, b))
    return abs(math.log2(a / b)) if sizes else 1.0


def _machines_apart(a: TargetKey, b: TargetKey) -> float:
    cores = abs(math.log2(a.cores / b.cores))
    if (a.mcpu, a.features) == (b.mcpu, b.features):
        return cores
    alike = a.family == "x86" and _is_amd(a) == _is_amd(b)
    return cores + (_OTHER_CPU if alike else _OTHER_MAKER)


def _is_amd(target: TargetKey) -> bool:
    return target.mcpu.startswith(AMD)


def _by_cost(record: TuningRecord) -> tuple[float, str]:
    return record.cost, record.date  # the date makes the choice repeatable
