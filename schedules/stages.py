"""The loops around a block, by what they walk: results (spatial) or a reduced axis."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, tirx

from .analysis import variables
from .moves import extent_of, fuse

_get_realize = tvm_ffi.get_global_func("s_tir.schedule.GetSBlockRealize")


def loop_kinds(sch: s_tir.Schedule, rv: Any) -> str:
    """For each loop around block `rv`: "S" spatial only, "R" reduced, "O" anything else."""
    realize = _get_realize(sch, rv)
    axes = list(zip(realize.block.iter_vars, realize.iter_values, strict=True))
    kinds = ""
    for loop in sch.get_loops(rv):
        var = sch.get(loop).loop_var
        types = {axis.iter_type for axis, value in axes if var in variables(value)}
        if types <= {tirx.IterVar.DataPar}:
            kinds += "S"
        else:
            kinds += "R" if tirx.IterVar.CommReduce in types else "O"
    return kinds


def stage_loops(sch: s_tir.Schedule, rv: Any, outer: Any) -> tuple[list[Any], list[Any]]:
    """The loops of block `rv` inside `outer`: those of spatial axes, those of reduced axes."""
    loops = list(sch.get_loops(rv))
    first = next(i for i, loop in enumerate(loops) if sch.get(loop).same_as(sch.get(outer))) + 1
    inside = list(zip(loops, loop_kinds(sch, rv), strict=True))[first:]
    spatial = [loop for loop, kind in inside if kind == "S"]
    return spatial, [loop for loop, kind in inside if kind != "S"]


def outer_blocks(sch: s_tir.Schedule) -> list[Any]:
    """The blocks just inside the root block; none where the function has no such form."""
    body = sch.mod["main"].body
    if not isinstance(body, s_tir.SBlockRealize) or body.block.name_hint != "root":
        return []
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def share_outer_loops(sch: s_tir.Schedule) -> s_tir.Schedule | None:
    """The schedule with the outer loops of every stage on threads; None where one cannot be shared.

    Of a stage the leading spatial loops, as many as can be fused.
    """
    for rv in outer_blocks(sch):
        loops = sch.get_loops(rv)
        if not loops or sch.get(loops[0]).kind == tirx.ForKind.PARALLEL:
            continue
        found = _shared(sch, rv)
        if found is None:
            return None
        sch = found
    return sch


def _shared(sch: s_tir.Schedule, rv: Any) -> s_tir.Schedule | None:
    kinds = loop_kinds(sch, rv)
    serial = [sch.get(loop).kind == tirx.ForKind.SERIAL for loop in sch.get_loops(rv)]
    whole = (kind == "S" and plain for kind, plain in zip(kinds, serial, strict=True))
    leading = next((i for i, ok in enumerate(whole) if not ok), len(kinds))
    for count in range(leading, 0, -1):
        trial = sch.copy()
        try:
            outer = fuse(trial, trial.get_loops(rv)[:count])
            if extent_of(trial, outer) > 1:
                trial.parallel(outer)
                return trial
        except s_tir.ScheduleError:  # other stages stand between these loops
            continue
    return None
