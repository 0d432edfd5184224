"""Give every TIR function that has no schedule yet the first one that a rule finds for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import IRModule

from ..errors import CompileError
from ..schedules import Rule, rules_for
from ..schedules.vector_math import expand
from ..targets import PivotTarget

SCHEDULED = "tirx.is_scheduled"
RULE = "pivot.schedule"

_log = logging.getLogger(__name__)


def schedule_functions(
    mod: IRModule, target: PivotTarget, rules: Sequence[Rule] | None = None
) -> IRModule:
    """Schedule each PrimFunc that is not marked as scheduled.

    Functions that are equal but for their name are scheduled once. Each gets the attributes
    `tirx.is_scheduled` and `pivot.schedule`, the name of the rule.

    Args:
        mod: the module.
        target: the machine.
        rules: what to try, in order; the target's rules by default.

    Raises:
        CompileError: no rule schedules a function for a GPU, where it cannot run without.
    """
    rules = rules_for(target) if rules is None else rules
    done: dict[Any, tirx.PrimFunc] = {}
    key_of: Any = tvm_ffi.StructuralKey
    functions = {}
    for name, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc) and not func.attrs.get(SCHEDULED):
            key = key_of(_nameless(func))
            if key not in done:
                done[key] = _schedule(_nameless(func), name.name_hint, target, rules)
            func = _named_like(done[key], func)
        functions[name] = func
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _nameless(func: tirx.PrimFunc) -> tirx.PrimFunc:
    return func.without_attr("global_symbol") if "global_symbol" in (func.attrs or {}) else func


def _named_like(func: tirx.PrimFunc, original: tirx.PrimFunc) -> tirx.PrimFunc:
    symbol = (original.attrs or {}).get("global_symbol")
    return func if symbol is None else func.with_attr("global_symbol", symbol)


def _schedule(
    func: tirx.PrimFunc, name: str, target: PivotTarget, rules: Sequence[Rule]
) -> tirx.PrimFunc:
    """`func` as the first rule schedules it; unchanged where even the last rule fails on a CPU."""
    for rule in rules:
        try:
            sch = rule(func, target)
        except Exception as error:  # a rule that fails must not cost the user the network
            _log.debug("%s cannot schedule %s: %s", rule.__module__, name, error)
            continue
        if sch is not None:
            scheduled = sch.mod["main"]
            if target.family != "cuda":  # which has units for these functions
                scheduled = expand(scheduled)
            return scheduled.with_attrs({SCHEDULED: True, RULE: rule.__module__.rsplit(".")[-1]})
    if target.family == "cuda":  # TVM would let the host compute on the GPU's memory
        raise CompileError(f"{name}: TVM has no schedule of it for GPUs")
    return func.with_attrs({SCHEDULED: True, RULE: "none"})
