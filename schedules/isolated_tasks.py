"""Give each task of a parallel loop a function of its own, whose buffers are known to be apart.

LLVM compiles the body of a parallel loop as a function that gets its buffers in a structure, and
there nothing says that what is stored to one leaves the others alone: tables are loaded again
after every store. As arguments of a function within, they are marked as the arguments of the whole
function are. That pays where sums are short, as with one row per block; elsewhere it costs more
than it brings.
"""

from __future__ import annotations

import tvm_ffi
from tvm import tirx
from tvm.ir import StringImm


def isolate_tasks(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A scheduled function with the bodies of its parallel loops isolated.

    Its buffers must not overlap (``tirx.noalias``).
    """
    body = tvm_ffi.structural_map(func.body, (tirx.For, _isolated))
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def _isolated(loop: tirx.For) -> tirx.Stmt:
    return isolated(loop) if loop.kind == tirx.ForKind.PARALLEL else loop


def isolated(loop: tirx.For) -> tirx.Stmt:
    """A loop whose body is a function of its own; buffers that it uses must not overlap."""
    name = StringImm("task")
    inner = tirx.AttrStmt(name, "compute_scope", name, loop.body)
    # With nothing behind it, TVM's debug information gives the end of what is around it to the
    # inner function, which LLVM refuses.
    nothing = tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.donothing"))
    body = inner if loop.kind == tirx.ForKind.PARALLEL else tirx.SeqStmt([inner, nothing])
    outer = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body)
    return tirx.SeqStmt([outer, nothing])
