"""Stores of a part of a vector: the rewrite behind rows of pixels that one vector holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, SBlockRealize

from .analysis import substitute, variables, walk

_LOAD, _STORE = "tirx.masked_load", "tirx.masked_store"


def mask_stores(func: tirx.PrimFunc, block: str, wanted: int) -> tirx.PrimFunc:
    """A function that, in blocks of a name, leaves its parameters alone from a place on.

    Args:
        func: a scheduled kernel; around each of those blocks is a vectorised loop.
        block: their name.
        wanted: elements along their last axis that are stored, and loaded.
    """
    params = set(func.params)

    def masked(loop: tirx.For) -> tirx.Stmt:
        if loop.kind != tirx.ForKind.VECTORIZED:
            return loop
        blocks = [one for one in walk(loop.body, SBlockRealize) if one.block.name_hint == block]
        return _Vector(loop, blocks[0], wanted, params).stored() if blocks else loop

    body = tvm_ffi.structural_map(func.body, (tirx.For, masked))
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def is_masked(call: tvm.ir.Call) -> bool:
    """Whether a call loads or stores a part of a vector; its first argument is the buffer."""
    return isinstance(call.op, tvm.ir.Op) and call.op.name in (_LOAD, _STORE)


def masked_elsewhere(call: tvm.ir.Call, buffer: Any, place: Callable[[Any], list[Any]]) -> Any:
    """Such a call for another buffer, where `place` tells the indices."""
    *others, mask = call.args[1:]
    if call.op.name == _LOAD:
        return tirx.op.masked_load(str(call.ty), buffer, *place(others), mask)
    return tirx.op.masked_store(buffer, others[0], *place(others[1:]), mask)


class _Vector:
    """A vectorised loop around one block that stores one element, as one masked store."""

    def __init__(self, loop: tirx.For, realize: SBlockRealize, wanted: int, params: set[Any]):
        axes = zip(realize.block.iter_vars, realize.iter_values, strict=True)
        self.store = substitute(realize.block.body, {axis.var: value for axis, value in axes})
        self.loop, self.realize, self.params = loop, realize, params
        self.lanes = int(loop.extent)
        first = substitute(realize.iter_values[-1], {loop.loop_var: self.first})
        numbers = tirx.Ramp(first, 1, self.lanes)
        self.mask = numbers < tirx.Broadcast(tirx.const(wanted, "int32"), self.lanes)

    def stored(self) -> tirx.Stmt:
        """The store, under the block's own condition."""
        value, at = self.vector(self.store.value), self.places(self.store.indices)
        body = tirx.BufferStore(self.store.buffer, value, at)
        if self.store.buffer in self.params:
            body = tirx.Evaluate(tirx.op.masked_store(self.store.buffer, value, *at, self.mask))
        block = SBlock([], [], [], self.realize.block.name_hint, body)
        condition = substitute(self.realize.predicate, {self.loop.loop_var: self.first})
        return SBlockRealize([], condition, block)

    @property
    def first(self) -> Any:
        return tirx.const(0, str(self.loop.loop_var.ty.dtype))

    def places(self, indices: Any) -> list[Any]:
        """The indices of all lanes: those of the first one, and a ramp where they move."""
        found = []
        for index in indices:
            start = substitute(index, {self.loop.loop_var: self.first})
            moves = self.loop.loop_var in variables(index)
            found.append(tirx.Ramp(start, 1, self.lanes) if moves else start)
        return found

    def vector(self, value: Any) -> Any:
        """`value` in all lanes."""
        if self.loop.loop_var not in variables(value):
            return tirx.Broadcast(value, self.lanes)
        if isinstance(value, TensorLoad):
            at = self.places(value.indices)
            if value.source not in self.params:
                return tirx.BufferLoad(value.source, at)
            kind = f"{value.source.ty.dtype}x{self.lanes}"
            return tirx.op.masked_load(kind, value.source, *at, self.mask)
        return type(value)(self.vector(value.a), self.vector(value.b))
