"""Give every TIR function that has no schedule yet the first one that a rule finds for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import GlobalVar, IRModule

from ..errors import CompileError
from ..schedules import Rule, rules_for
from ..schedules.analysis import walk
from ..schedules.stages import share_outer_loops
from ..schedules.vector_math import expand
from ..targets import PivotTarget
from .choose_kernels import Tuned

SCHEDULED = "tirx.is_scheduled"
RULE = "pivot.schedule"
BY_RECORD = "record"

_log = logging.getLogger(__name__)


def schedule_functions(
    mod: IRModule,
    target: PivotTarget,
    rules: Sequence[Rule] | None = None,
    tuned: Tuned | None = None,
) -> IRModule:
    """Schedule each PrimFunc that is not marked as scheduled.

    Functions that are equal but for their name are scheduled once. Each gets the attributes
    `tirx.is_scheduled` and `pivot.schedule`, the name of the rule, or "record" where a tuning
    record says how.

    Args:
        mod: the module.
        target: the machine.
        rules: what to try, in order; the target's rules by default.
        tuned: what is known from tuning.

    Raises:
        CompileError: no rule schedules a function for a GPU, where it cannot run without.
    """
    rules = rules_for(target) if rules is None else rules
    done: dict[Any, tirx.PrimFunc] = {}
    key_of: Any = tvm_ffi.StructuralKey
    functions = dict(mod.functions_items())
    for name, func in unscheduled(mod):
        key = key_of(func)
        if key not in done:
            done[key] = _schedule(func, name.name_hint, target, rules, tuned)
        functions[name] = _named_like(done[key], functions[name])
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def unscheduled(mod: IRModule) -> Iterator[tuple[GlobalVar, tirx.PrimFunc]]:
    """The PrimFuncs that are not marked as scheduled, without their names."""
    for name, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and not func.attrs.get(SCHEDULED):
            yield name, _nameless(func)


def _schedule(
    func: tirx.PrimFunc,
    name: str,
    target: PivotTarget,
    rules: Sequence[Rule],
    tuned: Tuned | None,
) -> tirx.PrimFunc:
    """`func` as its record says, if there is one; else as a rule does."""
    by_rule = schedule_by_rule(func, name, target, rules)
    sch = None if tuned is None else tuned.schedule(func, name, target)
    if sch is not None and _is_parallel(by_rule):
        # Records are of one thread: whether work is shared is the rule's to say.
        sch = share_outer_loops(sch)
    return by_rule if sch is None else finished(sch, BY_RECORD)


def finished(sch: s_tir.Schedule, how: str) -> tirx.PrimFunc:
    """A CPU's scheduled function, marked as such."""
    return expand(sch.mod["main"]).with_attrs({SCHEDULED: True, RULE: how})


def _is_parallel(func: tirx.PrimFunc) -> bool:
    return any(loop.kind == tirx.ForKind.PARALLEL for loop in walk(func.body, tirx.For))


def _nameless(func: tirx.PrimFunc) -> tirx.PrimFunc:
    return func.without_attr("global_symbol") if "global_symbol" in (func.attrs or {}) else func


def _named_like(func: tirx.PrimFunc, original: tirx.PrimFunc) -> tirx.PrimFunc:
    symbol = (original.attrs or {}).get("global_symbol")
    return func if symbol is None else func.with_attr("global_symbol", symbol)


def schedule_by_rule(
    func: tirx.PrimFunc, name: str, target: PivotTarget, rules: Sequence[Rule]
) -> tirx.PrimFunc:
    """`func` as the first rule schedules it; unchanged where even the last rule fails on a CPU.

    Raises:
        CompileError: no rule schedules it for a GPU.
    """
    for rule in rules:
        try:
            sch = rule(func, target)
        except Exception as error:  # a rule that fails must not cost the user the network
            _log.debug("%s cannot schedule %s: %s", rule.__module__, name, error)
            continue
        if sch is not None:
            how = rule.__module__.rsplit(".")[-1]
            if target.family != "cuda":
                return finished(sch, how)
            # GPUs have units for what `finished` expands.
            return sch.mod["main"].with_attrs({SCHEDULED: True, RULE: how})
    if target.family == "cuda":  # TVM would let the host compute on the GPU's memory
        raise CompileError(f"{name}: TVM has no schedule of it for GPUs")
    return func.with_attrs({SCHEDULED: True, RULE: "none"})
