"""Operators that are no layer, as tuning sees them: TVM functions that take a network's time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir import SBlock

from ..bench.watch import Watch
from ..linking import linker
from ..relay_passes import PHASES, Compilation
from ..relay_passes.schedule_functions import finished, schedule_by_rule, unscheduled
from ..relay_passes.true_extremes import true_extremes
from ..schedules import rules_for
from ..schedules.analysis import walk
from ..session import Session
from ..targets import PivotTarget
from .records import TaskKey
from .traces import KERNEL, function_key, replay

# Of a network's time: less is not worth trials.
LEAST_SHARE = 0.02
_WATCHED = 9
# Of a function with more, MetaSchedule takes seconds to make one candidate.
MOST_BLOCKS = 12


@dataclass(frozen=True, eq=False)
class FunctionTask:
    """One function that a rule of `schedules` schedules, for one core of the target.

    Attributes:
        key: of its records.
        name: in the network that the rule builds.
        func: unscheduled, without a name.
        calls: how often a run of the network calls it.
        share: of the network's time, 0 to 1.
        target: the machine, with one core.
    """

    key: TaskKey
    name: str
    func: tirx.PrimFunc = field(repr=False)
    calls: int
    share: float
    target: PivotTarget = field(repr=False)

    @property
    def by_rule(self) -> tirx.PrimFunc:
        """The function as the target's rules schedule it."""
        return schedule_by_rule(self.func, self.name, self.target, rules_for(self.target))

    def by_trace(self, trace: Any) -> tirx.PrimFunc:
        """The function as a trace schedules it; errors as of `replay`."""
        return finished(replay(trace, self.func), KERNEL)


def model_functions(mod: IRModule, target: PivotTarget, **more: Any) -> dict[str, tirx.PrimFunc]:
    """The functions of an imported model that rules schedule, by name; `more`: as `Compilation`."""
    state = Compilation(mod, target, **more)
    for phase in PHASES:
        if phase.name == "schedule_functions":
            break
        state = phase.run(state)
    return {name.name_hint: func for name, func in unscheduled(true_extremes(state.mod))}


def function_tasks(
    functions: Mapping[str, tirx.PrimFunc], net: Session, target: PivotTarget
) -> list[FunctionTask]:
    """Those that take a part of the network's time, the most first.

    Args:
        functions: by name; see `model_functions`.
        net: the same network as the rules build it. It runs some times.
        target: what it is built for.
    """
    watch = Watch(net)
    for _ in range(_WATCHED):
        watch.run()
    times = watch.seconds(_WATCHED)
    total = sum(times) or 1.0
    tasks: dict[TaskKey, FunctionTask] = {}
    for name, func in functions.items():
        own = [s for call, s in zip(watch.calls, times, strict=True) if call.function == name]
        if sum(own) < LEAST_SHARE * total or not _can_search(func):
            continue
        if name.startswith("reshape"):  # a copy, element by element: there is nothing to choose
            continue
        key = function_key(func, target)
        one = replace(target, cores=1)
        tasks.setdefault(key, FunctionTask(key, name, func, len(own), sum(own) / total, one))
    return sorted(tasks.values(), key=lambda task: -task.share)


def _can_search(func: tirx.PrimFunc) -> bool:
    """Whether MetaSchedule's rules can make candidates of it, and soon."""
    extents = [extent for param in func.params for extent in getattr(param.ty, "shape", [None])]
    static = all(isinstance(extent, tirx.IntImm | int) for extent in extents)
    return static and len(walk(func.body, SBlock)) <= MOST_BLOCKS + 1  # and the root


def build_function(func: tirx.PrimFunc, target: PivotTarget, folder: str, name: str) -> str:
    """Compile a scheduled function; returns the path of its library, with what it takes beside it.

    Whole numbers, which may be indices, are zeros.
    """
    path = Path(folder) / f"{name}.so"
    named = func.with_attr("global_symbol", "main")
    library = tvm.compile(IRModule({"main": named}), target=target.to_tvm())
    library.export_library(str(path), fcompile=linker(target))
    tables, arguments = {}, []
    for i, param in enumerate(func.params):
        dtype, shape = str(param.ty.dtype), [int(extent) for extent in param.ty.shape]
        table = None if dtype.startswith("float") else f"argument{i}"
        if table is not None:
            tables[table] = np.zeros(shape, dtype)
        arguments.append([dtype, shape, table])
    np.savez(path.with_suffix(".npz"), **tables)  # type: ignore[arg-type]
    path.with_suffix(".json").write_text(json.dumps(arguments))
    return str(path)
