"""Schedules of all that is not one of our kernels on a GPU: TVM's rules for GPUs, in turn."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from tvm import s_tir, tirx

from ..targets import PivotTarget

_log = logging.getLogger(__name__)


@cache
def _rules() -> tuple[Any, ...]:
    from tvm.s_tir.dlight import gpu

    return (
        gpu.Matmul(),
        gpu.GEMV(),
        gpu.Reduction(),
        gpu.GeneralReduction(),
        gpu.Transpose(),
        gpu.Fallback(),
    )


def apply(func: tirx.PrimFunc, target: PivotTarget) -> s_tir.Schedule | None:
    """The schedule of the first of TVM's rules that has one."""
    machine = target.to_tvm()
    with machine:
        for rule in _rules():
            try:
                schedule = rule.apply(func, machine, False)
            except Exception as error:  # the rule for transpositions fails on some reshapes
                _log.debug("%s fails: %s", type(rule).__name__, error)
                continue
            if schedule is not None:
                return schedule
    return None
