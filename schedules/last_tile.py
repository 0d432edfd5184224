"""The last register tile of a group, which has fewer vectors than the others: no pixels that are
none, where whole tiles would compute them.
"""

from __future__ import annotations

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from .analysis import substitute
from .isolated_tasks import isolated
from .moves import in_sequence, renamed

# The loop over the register tiles of a group, and those over the vectors of one.
TILES, VECTORS = "pivot.tiles", "pivot.vectors"
SUMS = "acc"


def narrow_last_tile(func: tirx.PrimFunc, vectors: int) -> tirx.PrimFunc:
    """A scheduled planes kernel whose last register tile has so many vectors, with sums of its own.

    Its loops are marked `TILES` and `VECTORS`.
    """
    root = func.body.block
    (sums,) = (buffer for buffer in root.alloc_buffers if buffer.name.startswith(SUMS))
    own = tirx.Var(sums.name, sums.ty)

    def narrowed(loop: tirx.For) -> tirx.For:
        if VECTORS not in loop.annotations:
            return loop
        count, marks = tirx.const(vectors, "int32"), loop.annotations
        return tirx.For(loop.loop_var, loop.min, count, loop.kind, loop.body, annotations=marks)

    def split(loop: tirx.For) -> tirx.Stmt:
        if TILES not in loop.annotations:
            return loop
        last = loop.extent - 1
        whole = tirx.For(loop.loop_var, loop.min, last, loop.kind, loop.body)
        end = substitute(loop.body, {loop.loop_var: last, sums: own})
        end = renamed(tvm_ffi.structural_map(end, (tirx.For, narrowed)))
        one, zero = tirx.const(1, "int32"), tirx.const(0, "int32")
        # LLVM would hold the sums of both loops in registers at once.
        alone = isolated(tirx.For(tirx.Var("last", "int32"), zero, one, loop.kind, end))
        return in_sequence([whole, alone])

    body = tvm_ffi.structural_map(root.body, (tirx.For, split))
    names = ("iter_vars", "reads", "writes", "name_hint", "init", "annotations")
    fields = {name: getattr(root, name) for name in names}
    block = SBlock(**fields, body=body, alloc_buffers=[*root.alloc_buffers, own])
    realize = SBlockRealize(func.body.iter_values, func.body.predicate, block)
    return tirx.PrimFunc(func.params, realize, func.ret_type, func.attrs)
