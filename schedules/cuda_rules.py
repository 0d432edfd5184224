"""Schedules of all that is not one of our kernels on a GPU: TVM's rules for GPUs, in turn."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import s_tir, tirx

from ..targets import PivotTarget


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
            schedule = rule.apply(func, machine, False)
            if schedule is not None:
                return schedule
    return None
