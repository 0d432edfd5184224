"""Start maxima at minus infinity, and minima at infinity.

TVM starts them at the least and the greatest finite number. So the maximum of a row that holds
nothing but minus infinity is wrong, and a model that looks for such rows (attention does, for those
that are masked altogether) does not find them.
"""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import IRModule
from tvm.s_tir import SBlock


def true_extremes(mod: IRModule) -> IRModule:
    """The module with every floating-point reduction by max or min started at its true identity."""
    functions = {
        name: _rewritten(func) if isinstance(func, tirx.PrimFunc) else func
        for name, func in mod.functions_items()
    }
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _rewritten(func: tirx.PrimFunc) -> tirx.PrimFunc:
    body = tvm_ffi.structural_map(func.body, (SBlock, _block))
    return func if body.same_as(func.body) else func.with_body(body)


def _block(block: SBlock) -> SBlock:
    start = block.init
    if not isinstance(start, tirx.BufferStore) or not isinstance(block.body, tirx.BufferStore):
        return block
    sign = {tirx.Max: -1.0, tirx.Min: 1.0}.get(type(block.body.value))
    dtype = str(start.value.ty.dtype)
    if sign is None or dtype not in ("float16", "float32", "float64"):
        return block
    value: Any = tirx.const(sign * math.inf, dtype)
    kept = ["iter_vars", "reads", "writes", "name_hint", "alloc_buffers"]
    same = {field: getattr(block, field) for field in [*kept, "match_buffers", "annotations"]}
    init = tirx.BufferStore(start.buffer, value, start.indices)
    return SBlock(**same, body=block.body, init=init)
