"""Schedules of TVM functions as records hold them.

What makes a schedule out of a function is MetaSchedule's list of primitives and decisions, its
trace. A record holds one as JSON, and a build replays it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import IRModule
from tvm.s_tir import SBlock

from ..schedules.analysis import walk
from ..targets import PivotTarget
from .database import replayed
from .records import TargetKey, TaskKey

KERNEL = "function"

# What MetaSchedule's rules for CPUs use. Others, such as those that reinterpret memory, could
# change what a function computes.
_PRIMITIVES = frozenset(
    {
        "AddUnitLoop", "Annotate", "CacheRead", "CacheWrite", "ComputeAt", "ComputeInline",
        "DecomposeReduction", "EnterPostproc", "Fuse", "GetChildBlocks", "GetConsumers", "GetLoops",
        "GetOutputBlocks", "GetProducers", "GetSBlock", "Parallel", "RFactor", "Reorder",
        "ReverseComputeAt", "ReverseComputeInline", "SampleCategorical", "SampleComputeLocation",
        "SamplePerfectTile", "Split", "Unannotate", "Unroll", "Vectorize",
    }
)  # fmt: skip
_ANNOTATIONS = ("meta_schedule.", "pragma_auto_unroll_max_step", "pragma_unroll_explicit")
_LARGEST = 1 << 12


def function_key(func: tirx.PrimFunc, target: PivotTarget) -> TaskKey:
    """The key of a function's records, whatever it and its variables are called.

    The hash is of everything it computes; what it is made of and takes are there to be read.
    """
    plain = func.without_attr("op_pattern") if "op_pattern" in func.attrs else func
    number = tvm_ffi.structural_hash(plain, map_free_vars=True) & ((1 << 64) - 1)
    blocks = [str(block.name_hint) for block in walk(func.body, SBlock)]
    problem = {
        "hash": f"{number:016x}",
        "blocks": " ".join(name for name in blocks if name != "root"),
        "arguments": " ".join(_described(param) for param in func.params),
    }
    return TaskKey(KERNEL, problem, 0, TargetKey.of(replace(target, cores=1)))


def _described(param: Any) -> str:
    shape = getattr(param.ty, "shape", ())
    extents = [str(getattr(extent, "value", extent)) for extent in shape]  # or a symbol
    return f"{param.ty.dtype}[{','.join(extents)}]"


def replay(trace: Any, func: tirx.PrimFunc) -> s_tir.Schedule:
    """A function as a trace schedules it.

    Raises:
        ValueError: it is no trace, or uses what no schedule for a CPU does.
        RuntimeError: it does not fit the function.
    """
    module = IRModule({"main": func.with_attr("global_symbol", "main")})
    for one in trace[0] if isinstance(trace, list) and trace else ():
        _check(one)
    return replayed(trace, module)


def _check(instruction: Any) -> None:
    match instruction:
        case ["Annotate", [_, value], [str(key)], _]:
            sampled = isinstance(value, str)  # by another instruction
            small = type(value) is int and 0 <= value <= _LARGEST
            if not key.startswith(_ANNOTATIONS) or not (sampled or small):
                raise ValueError(f"no annotation of ours: {key:.40} = {value!r:.20}")
        case [str(name), *_] if name in _PRIMITIVES and name != "Annotate":
            return
        case _:
            raise ValueError(f"no schedule for a CPU uses {instruction!r:.60}")
