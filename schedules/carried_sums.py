"""Sums that are carried from one column tile to the next: the rewrite behind K tiles.

A scheduled planes kernel with several K tiles starts every tile's accumulators at zero and stores
them as if they were the whole sum. TE cannot say more, for its stages run once per element.
`carry_sums` unrolls the first and the last tile and gives every task a buffer of its own, in
which the accumulators rest between two tiles:

    first tile:    acc = 0          ragged sum    buffer = acc
    others:        acc = buffer     ragged sum    buffer = acc
    last tile:     acc = buffer     ragged sum    Y = epilogue(acc)

Sums that slide (see `sliding_sums`) begin at zero, and what rests is added in their last run.

So no condition is left inside, the epilogue is applied once, and tasks that write the same
output (the last group may overlap its neighbour) still write the same values.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize

from .analysis import substitute, walk
from .block_sparse import OUTPUT
from .moves import renamed
from .sliding_sums import RESUMED

K_TILES = "pivot.k_tiles"


def carry_sums(body: SBlockRealize, walked: int) -> SBlockRealize:
    """The body of a planes kernel with its loop over K tiles made right.

    Args:
        body: the root block; a loop marked `K_TILES` in it has at least two iterations.
        walked: axes of the accumulators in front of those that one task's sums have.
    """
    loops = [loop for loop in walk(body, tirx.For) if K_TILES in loop.annotations]
    if not loops:
        return body
    (loop,) = loops
    root = body.block
    (acc,) = (buffer for buffer in root.alloc_buffers if buffer.name.startswith("acc"))
    sums = tirx.decl_buffer(acc.ty.shape[walked:], acc.ty.dtype, name="sums")
    count, var = int(loop.extent), loop.loop_var
    tiles, buffers = [], [sums]
    nested = [buffer for block in walk(loop.body, SBlock) for buffer in block.alloc_buffers]
    for first, length in ((0, 1), (1, count - 2), (count - 1, 1)):
        if length == 0:
            continue
        own = {buffer: _like(buffer) for buffer in root.alloc_buffers}
        buffers += own.values()
        own |= {buffer: _like(buffer) for buffer in nested}
        piece = _tile(loop.body, acc, sums, walked, first > 0, first + length == count)
        start = tirx.const(first, "int32")
        if length == 1:
            piece = substitute(piece, {var: start, **own})
        else:
            extent = tirx.const(length, "int32")
            inner = substitute(piece, own)
            piece = tirx.For(var, start, extent, tirx.ForKind.SERIAL, inner)
        tiles.append(renamed(piece))
    peeled = tirx.SeqStmt(tiles)

    def replace(node: tirx.For) -> Any:
        return peeled if node.loop_var.same_as(var) else node

    names = ("iter_vars", "reads", "writes", "name_hint", "init", "match_buffers", "annotations")
    fields = {name: getattr(root, name) for name in names}
    walks = tvm_ffi.structural_map(root.body, (tirx.For, replace))
    block = SBlock(**fields, body=walks, alloc_buffers=buffers)
    return SBlockRealize(body.iter_values, body.predicate, block)


def _like(buffer: Any) -> Any:
    of = buffer.ty
    return tirx.decl_buffer(of.shape, of.dtype, name=buffer.name, scope=buffer.scope())


def _tile(body: Any, acc: Any, sums: Any, walked: int, carried: bool, last: bool) -> Any:
    """One K tile: the accumulators start at what is `carried`, and are put away if not `last`."""

    slides = any(node.name_hint == RESUMED for node in walk(body, SBlock))

    def start(node: tirx.BufferStore) -> tirx.BufferStore:
        return tirx.BufferStore(acc, tirx.BufferLoad(sums, node.indices[walked:]), node.indices)

    def add(node: tirx.BufferStore) -> tirx.BufferStore:
        total = node.value + tirx.BufferLoad(sums, node.indices[walked:])
        return tirx.BufferStore(acc, total, node.indices)

    def put_away(node: tirx.BufferStore) -> tirx.BufferStore:
        values = [load for load in walk(node.value, TensorLoad) if load.source.same_as(acc)]
        return tirx.BufferStore(sums, values[0], values[0].indices[walked:]) if values else node

    def block(node: SBlockRealize) -> Any:
        name = node.block.name_hint
        if name == RESUMED:
            resumed = tvm_ffi.structural_map(node, (tirx.BufferStore, add))
            return resumed if carried else tirx.Evaluate(0)
        if name == "acc_init" and carried and not slides:
            return tvm_ffi.structural_map(node, (tirx.BufferStore, start))
        if name not in (OUTPUT, "strip") or last:
            return node
        if acc not in {region.source for region in node.block.reads}:  # it squeezes
            return tirx.Evaluate(0)
        return tvm_ffi.structural_map(node, (tirx.BufferStore, put_away))

    return tvm_ffi.structural_map(body, (s_tir.SBlockRealize, block))
