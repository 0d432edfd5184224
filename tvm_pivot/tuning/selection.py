"""Which records a build uses: of the same task, else of the nearest one, else none."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from tvm import s_tir, tirx

from ..relay_passes.cuda_kernels import cuda_points
from ..relay_passes.layer_kernels import fits, problem_of, rule_choice
from ..relay_passes.layers import Layer, Plan
from ..schedules import cpu_tiles, tile_rule
from ..schedules.choices import Choice, nearest, planes_space, rows_space
from ..schedules.cost import packing_cycles
from ..schedules.depthwise_tiles import DepthwiseProblem, depthwise_space, tile_cycles
from ..schedules.problems import Epilogue, PlanesProblem, RowsProblem
from ..targets import PivotTarget
from . import lookup
from .database import REFUSED
from .log_files import read
from .records import TaskKey, TuningRecord
from .tasks import other_plans, task_key
from .traces import KERNEL as FUNCTION
from .traces import function_key, replay

# Where the shipped logs of targets with so many lanes are.
_FOLDERS = {("x86", 16): "x86-avx512", ("x86", 8): "x86-avx2", ("cuda", 32): "cuda"}
# How far away a task may be whose record is used; another epilogue is 1 away, as is twice the size.
WITHIN = 1.5
# What is predicted to be slower than this, against the rule's choice, is not for this task.
_WORST_TRANSFER = 1.1
# A candidate that was not measured again beside the rule's must be this much faster.
_UNCONFIRMED = 0.95
FINAL, RULE = "final", "rule"
# Records of a task beside the winner that are handed on.
_TAUGHT_BY = 6


def stored_choice(record: TuningRecord) -> Choice:
    """The choice that a record is of.

    Raises:
        ValueError: it has none.
    """
    found = record.decisions.get("choice")
    if not isinstance(found, dict):
        raise ValueError("a record without a choice")
    return Choice.of(found)


def winner(records: Sequence[TuningRecord]) -> TuningRecord | None:
    """The record to use of those of one task.

    A search ends by measuring its best candidates and the rule's beside each other, and a record of
    the outcome. Where it never got that far, a candidate that was clearly faster wins.
    """
    final = [record for record in records if record.decisions.get("stage") == FINAL]
    if final:
        return max(reversed(final), key=lambda record: record.date)  # the last one of a second
    rule = [record.cost for record in records if record.decisions.get("stage") == RULE]
    best = min(records, key=lambda record: record.cost, default=None)
    if best is None or not rule or best.cost >= _UNCONFIRMED * min(rule):
        return None
    return best


@dataclass(eq=False)
class Selection:
    """The records that a build chooses from.

    Attributes:
        records: fresh ones.
        notes: what the user is told about records that cannot be used.
    """

    records: Sequence[TuningRecord]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        by_task: dict[TaskKey, list[TuningRecord]] = defaultdict(list)
        for record in self.records:
            by_task[record.task].append(record)
        found = {task: winner(some) for task, some in by_task.items()}
        self._winners: Mapping[TaskKey, TuningRecord] = {k: r for k, r in found.items() if r}
        self._has_functions = any(key.kernel == FUNCTION for key in self._winners)

    def choose(
        self, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
    ) -> tuple[Plan, Choice, str] | None:
        """See `choose_kernels`."""
        key = task_key(layer, plan, epilogue, target)
        record = self._winners.get(key)
        if record is not None:
            try:
                plan, choice = _exact(stored_choice(record), layer, plan, epilogue, target)
            except ValueError as e:
                note = f"tuning record of {layer.name} ignored: {e}"
                self.notes += [note] if note not in self.notes else []
                return None
            return plan, choice, "by records of the same tasks"
        for near in lookup.nearest(self._winners.values(), key, 1, within=WITHIN):
            with contextlib.suppress(ValueError):
                chosen = stored_choice(near.record)
                if lookup.on_such_machines(key, near.record.task):
                    plan, choice = _exact(chosen, layer, plan, epilogue, target)
                    return plan, choice, "by records of the same tasks"
                moved = _moved(chosen, layer, plan, epilogue, target)
                if moved is not None:
                    return plan, moved, "by records of similar tasks"
        return None

    def schedule(
        self, func: tirx.PrimFunc, name: str, target: PivotTarget
    ) -> s_tir.Schedule | None:
        """See `schedule_functions`."""
        if not self._has_functions:
            return None
        record = self._winners.get(function_key(func, target))
        if record is None or "trace" not in record.decisions:
            return None
        try:
            return replay(record.decisions["trace"], func)
        except REFUSED as e:
            reason = (str(e).strip().splitlines() or [type(e).__name__])[-1]  # TVM's are long
            note = f"tuning record of {name} ignored: {reason:.120}"
            self.notes += [note] if note not in self.notes else []
            return None


def _exact(
    choice: Choice, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> tuple[Plan, Choice]:
    """The plan that a choice is for, once it is known to be a point of the space."""
    one = replace(target, cores=1)
    if choice == rule_choice(layer, plan, epilogue, one):
        # With several cores the rule has more to say, about bands for one.
        return plan, rule_choice(layer, plan, epilogue, target)
    plans = [plan] if fits(choice, plan) else other_plans(layer, plan, one)
    plan = next((other for other in plans if fits(choice, other)), plan)
    if not fits(choice, plan):
        raise ValueError("its blocks are not possible here")
    if target.family == "cuda":
        if choice not in cuda_points(layer, plan, epilogue, target):
            raise ValueError("its tile is not possible here")
        return plan, choice
    if choice.tile not in _space(choice, layer, plan, epilogue, one):
        raise ValueError("its tile is not possible here")
    return plan, choice


def _space(
    choice: Choice, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> list[Any]:
    """The tiles that the layer may have with the other decisions as they are."""
    problem = problem_of(layer, plan, epilogue)
    if isinstance(problem, RowsProblem):
        return list(rows_space(problem, target))
    if isinstance(problem, DepthwiseProblem):
        return list(depthwise_space(problem, target))
    if choice.band_rows:
        direct = layer.op == "dense" or layer.geometry.direct
        if direct or problem.compact or choice.band_rows > problem.height:
            raise ValueError("there are no such bands here")
        problem = problem.band(choice.band_rows)
    return list(planes_space(problem, target))


def _moved(
    choice: Choice, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> Choice | None:
    """The choice of another task, made to fit this one; None where it promises nothing here."""
    if not fits(choice, plan):
        return None
    if target.family == "cuda":
        return _moved_on_gpu(choice, layer, plan, epilogue, target)
    one, problem = replace(target, cores=1), problem_of(layer, plan, epilogue)
    if isinstance(problem, PlanesProblem) and choice.band_rows:
        choice = replace(choice, band_rows=min(choice.band_rows, problem.height))
    tiles = _space(choice, layer, plan, epilogue, one)
    points = [replace(choice, tile=tile) for tile in tiles]
    moved = points[nearest([point.numbers() for point in points], choice.numbers())]
    if isinstance(problem, RowsProblem):
        return moved
    rule = rule_choice(layer, plan, epilogue, one)
    costs = [_cycles(problem, some, plan.entries, one) for some in (moved, rule)]
    return moved if costs[0] <= _WORST_TRANSFER * costs[1] else None


def _moved_on_gpu(
    choice: Choice, layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> Choice | None:
    cycles = cuda_points(layer, plan, epilogue, target)
    points = list(cycles)
    moved = points[nearest([point.numbers() for point in points], choice.numbers())]
    rule = cycles[rule_choice(layer, plan, epilogue, target)]
    return moved if cycles[moved] <= _WORST_TRANSFER * rule else None


def _cycles(
    problem: PlanesProblem | DepthwiseProblem, choice: Choice, entries: int, target: PivotTarget
) -> float:
    tile: Any = choice.tile
    if isinstance(problem, DepthwiseProblem):
        return tile_cycles(problem, tile, target)
    planes_cycles = tile_rule(target).planes_cycles
    if not choice.band_rows:
        copies = packing_cycles(problem.batch * problem.image_floats, target)
        kernel = planes_cycles(problem, tile, entries, target)
        return kernel if problem.compact else kernel + copies
    band, count = problem.band(choice.band_rows), cpu_tiles.band_count(problem, choice.band_rows)
    kernel = planes_cycles(band, tile, entries, target, count)
    return cpu_tiles.bands_cycles(problem, choice.band_rows, kernel, target)


def shipped_logs(target: PivotTarget) -> list[Path]:
    """The logs that come with the package for such targets."""
    from .. import __path__ as homes

    name = _folder(target)
    if name is None:
        return []
    return sorted(
        path for home in homes for path in Path(home, "tuning_logs", name).glob("*.jsonl")
    )


def _folder(target: PivotTarget) -> str | None:
    if target.family == "arm":
        # What was counted for one core's pipelines says little about another's.
        return f"arm-{target.tvm.get('mcpu')}"
    return _FOLDERS.get((target.family, target.lanes))


@lru_cache(maxsize=16)
def _read_shipped(path: Path) -> tuple[TuningRecord, ...]:
    return read(path).fresh


def shipped_records(target: PivotTarget) -> list[TuningRecord]:
    """The records of those logs that fit the installed TVM."""
    return [record for path in shipped_logs(target) for record in _read_shipped(path)]


def select(log: str | PathLike[str] | None, target: PivotTarget) -> Selection:
    """The records for a build: those of a log, and the shipped ones.

    Raises:
        TuningError: the log cannot be read.
    """
    records = shipped_records(target)
    notes = []
    if log is not None:
        found = read(Path(log))
        own = {record.task for record in found.fresh}
        records = [*found.fresh, *(record for record in records if record.task not in own)]
        if found.stale:
            notes.append(f"{len(found.stale)} tuning records of another TVM release ignored")
    return Selection(records, notes)


def exported(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """The records to hand on: of each task the one that a build would use, then some to learn from.

    These are up to 6 other candidates, from the fastest to the slowest and the rule's among them:
    a cost model learns nothing from a winner alone. Operators that are no layer have none.
    """
    by_task: dict[TaskKey, list[TuningRecord]] = defaultdict(list)
    for record in records:
        by_task[record.task].append(record)
    found: list[TuningRecord] = []
    for some in by_task.values():
        best = winner(some)
        if best is not None:
            found += [best, *_spread(some, _TAUGHT_BY)]
    return found


def _spread(records: Sequence[TuningRecord], count: int) -> list[TuningRecord]:
    """The rule's record and others, evenly by rank, of one task's candidates in a search."""
    tried = [r for r in records if "choice" in r.decisions and r.decisions.get("stage") != FINAL]
    rule = [record for record in tried if record.decisions.get("stage") == RULE][-1:]
    others = sorted((r for r in tried if r not in rule), key=lambda record: record.cost)
    wanted = min(count - len(rule), len(others))
    if wanted <= 0:
        return rule
    ranks = [round(i * (len(others) - 1) / max(wanted - 1, 1)) for i in range(wanted)]
    return [*rule, *(others[rank] for rank in ranks)]
