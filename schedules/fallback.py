"""Whatever no other rule takes: threads over the outer spatial loops, vectors where they are legal.

Never refuses and never raises. Functions without blocks (library calls, loops built by hand)
stay as they are.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from ..targets import PivotTarget
from .analysis import Block, leaf_blocks
from .elementwise import schedule_spatial
from .moves import extent_of, finish, fuse, split_vector
from .stages import loop_kinds, outer_blocks

# Blocks that get here mostly run scalar code, of which this much repays starting threads.
SCALAR_WORK = 1 << 12


def apply(func: tirx.PrimFunc, target: PivotTarget) -> s_tir.Schedule:
    """Schedule each block by itself as far as that works."""
    sch = s_tir.Schedule(func)
    blocks = leaf_blocks(sch)
    if blocks is not None:
        try:
            for block in blocks:
                _schedule_block(sch, block, target)
            return finish(sch)
        except Exception:  # a schedule half made is of no use: start again, and try less
            sch = s_tir.Schedule(func)
    for rv in outer_blocks(sch):
        trial = sch.copy()
        try:
            _parallelise_block(trial, rv, target)
        except Exception:  # this block stays as it is
            continue
        sch = trial
    return sch


def _schedule_block(sch: s_tir.Schedule, block: Block, target: PivotTarget) -> None:
    """A block in normal form, alone in its loops."""
    if block.spatial:
        schedule_spatial(sch, block, target)
        return
    if set(block.kinds) != {"S", "R"}:
        _parallelise_block(sch, block.rv, target)
        return
    axes = list(zip(block.kinds, block.loops, strict=True))
    spatial = [loop for kind, loop in axes if kind == "S"]
    reduced = [loop for kind, loop in axes if kind == "R"]
    sch.reorder(*spatial[:-1], *reduced, spatial[-1])
    vector = split_vector(sch, block, spatial[-1], target)
    if vector is not None:
        sch.reorder(vector, *reduced)
    outer = fuse(sch, spatial[:-1]) if spatial[:-1] else vector
    if outer is not None and target.cores > 1 and block.size >= SCALAR_WORK:
        sch.parallel(outer)
    sch.decompose_reduction(block.rv, reduced[0])


def _parallelise_block(sch: s_tir.Schedule, rv: Any, target: PivotTarget) -> None:
    """A block that is not in normal form: only its leading spatial loops are touched."""
    loops, kinds = sch.get_loops(rv), loop_kinds(sch, rv)
    leading = next((i for i, kind in enumerate(kinds) if kind != "S"), len(loops))
    if leading == 0:
        return
    outer = fuse(sch, loops[:leading])
    if extent_of(sch, outer) > 1:
        sch.parallel(outer)
