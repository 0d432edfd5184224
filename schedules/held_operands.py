"""Ragged sums whose operands are held in registers: a rewrite for machines that multiply by lane.

A planes kernel multiplies R weights by P vectors of an input row. Written plainly, each weight is
loaded by itself and broadcast. A machine with a multiply by one lane of a register (NEON's
``fmla v.4s, v.4s, v.s[i]``) takes a vector of weights as it lies in memory: `hold_operands` loads
an entry's weights and inputs, whole vectors at a time, and names what they hold, so that LLVM
turns each weight into a lane.

A core that issues in order waits for every load that is used at once. There the operands of
several entries are loaded together, before any is multiplied (see `neon_sum`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import StringImm, TensorLoad
from tvm.s_tir import SBlock, SBlockRealize

from .analysis import substitute, walk
from .neon_sum import NeonSum
from .row_sum import RowSum

# Products that are added up in float16 before they are added to a sum in float32.
STRETCH = 128


@dataclass(frozen=True)
class _Sum:
    """One step of a ragged sum: ``acc[r, v, q] += weight[e, r] * x[v, q]``, entry e by `var`."""

    var: Any
    rows: Any
    vectors: Any
    lane: Any
    store: Any

    @classmethod
    def of(cls, loop: tirx.For) -> _Sum:
        """From the scheduled loop over entries; in it are those over rows, vectors and lanes."""
        rows = loop.body
        vectors = rows.body
        lane = vectors.body
        (realize,) = walk(lane, SBlockRealize)
        axes = zip(realize.block.iter_vars, realize.iter_values, strict=True)
        store = substitute(realize.block.body, {axis.var: value for axis, value in axes})
        return cls(loop.loop_var, rows, vectors, lane, store)

    @property
    def lanes(self) -> int:
        """Floats of a vector."""
        return int(self.lane.extent)

    def indices(self, indices: Any, p: Any, r: int, v: int) -> list[Any]:
        """Of the first lane, for entry p, row r and vector v."""
        zero = tirx.const(0, "int32")
        number = {self.rows.loop_var: r, self.vectors.loop_var: v}
        values = {var: tirx.const(value, "int32") for var, value in number.items()}
        values |= {self.var: p, self.lane.loop_var: zero}
        return [substitute(index, values) for index in indices]

    def load(self, p: Any, weight_lanes: int) -> tuple[list[tirx.Stmt], list[Any], list[Any]]:
        """The code that loads entry p, and what it names: each row's weight, and the inputs."""
        weight, data = self.store.value.b.a, self.store.value.b.b
        rows = int(self.rows.extent)
        code: list[tirx.Stmt] = []
        weights, inputs = [], []
        for first in range(0, rows, weight_lanes):
            count = min(weight_lanes, rows - first)
            at = self.indices(weight.indices, p, first, 0)
            held = _name(code, _load(weight.source, at, count))
            weights += [tirx.Shuffle([held], [i]) if count > 1 else held for i in range(count)]
        for v in range(int(self.vectors.extent)):
            at = self.indices(data.indices, p, 0, v)
            inputs.append(_name(code, _load(data.source, at, self.lanes)))
        return code, weights, inputs

    def multiply(self, weights: list[Any], inputs: list[Any]) -> list[tirx.Stmt]:
        """Add the products of one entry to the accumulators."""
        code: list[tirx.Stmt] = []
        for r, weight in enumerate(weights):
            for v, value in enumerate(inputs):
                at = _vector(self.indices(self.store.indices, self.var, r, v), self.lanes)
                factor = tirx.Broadcast(weight, self.lanes) if self.lanes > 1 else weight
                total = tirx.BufferLoad(self.store.buffer, at) + factor * value
                code.append(tirx.BufferStore(self.store.buffer, total, at))
        return code


def hold_operands(loop: tirx.For, count: Any, weight_lanes: int, entries: int) -> tirx.Stmt:
    """The ragged loop of a planes kernel, with its operands held in registers.

    Args:
        loop: over the entries of a row block; inside are its rows, vectors and lanes.
        count: the row block's entries.
        weight_lanes: weights loaded together, at most.
        entries: whose operands are loaded before any is multiplied; with more than one the loop is
            in assembly for 64-bit ARM.
    """
    step = _Sum.of(loop)
    if entries > 1:
        rows, vectors = int(step.rows.extent), int(step.vectors.extent)
        zero = tirx.const(0, "int32")
        return _called(step, lambda stride: NeonSum(rows, vectors, entries, stride), zero, count)

    def some(first: Any, length: Any) -> tirx.For:
        p = tirx.Var("p", "int32")
        code, weights, inputs = step.load(first + p, weight_lanes)
        return _loop(p, length, tirx.SeqStmt([*code, *step.multiply(weights, inputs)]))

    if str(step.store.buffer.ty.dtype) == "float16":
        return _in_stretches(step, count, some)
    return some(tirx.const(0, "int32"), count)


def _in_stretches(step: _Sum, count: Any, some: Callable[[Any, Any], tirx.For]) -> tirx.Stmt:
    """A sum in float16 of which only so many products are added up, the rest in float32.

    Args:
        step: one step of it.
        count: the row block's entries.
        some: the loop over entries from a first one on.
    """
    acc, half, zero = step.store.buffer, step.store.buffer.ty.dtype, tirx.const(0, "int32")
    rows, vectors = int(step.rows.extent), int(step.vectors.extent)
    wide = tirx.decl_buffer((rows, vectors, step.lanes), "float32", name="wide")
    lanes = f"x{step.lanes}" if step.lanes > 1 else ""
    nothing = tirx.const(0, f"{half}{lanes}")
    places = []  # of each vector of accumulators, and of its sum in float32
    for r in range(rows):
        for v in range(vectors):
            at = [tirx.const(r, "int32"), tirx.const(v, "int32"), zero]
            own = step.indices(step.store.indices, zero, r, v)
            places.append((_vector(own, step.lanes), _vector(at, step.lanes)))

    def value(at: list[Any]) -> Any:
        return tirx.BufferLoad(acc, at).astype(f"float32{lanes}")

    def total(at: list[Any]) -> Any:
        return tirx.BufferLoad(wide, at)

    c = tirx.Var("c", "int32")
    length = tirx.min(tirx.const(STRETCH, "int32"), count - c * STRETCH)
    stretch = [
        *(tirx.BufferStore(acc, nothing, near) for near, _ in places),
        some(c * STRETCH, length),
        *(tirx.BufferStore(wide, total(far) + value(near), far) for near, far in places),
    ]
    stretches = tirx.floordiv(count + (STRETCH - 1), STRETCH)
    code = [
        *(tirx.BufferStore(wide, value(near), far) for near, far in places),
        _loop(c, stretches, tirx.SeqStmt(stretch)),
        *(tirx.BufferStore(acc, total(far).astype(f"{half}{lanes}"), near) for near, far in places),
    ]
    block = SBlock([], [], [], "stretches", tirx.SeqStmt(code), alloc_buffers=[wide])
    long = SBlockRealize([], tirx.const(True, "bool"), block)
    return tirx.IfThenElse(count <= STRETCH, some(zero, count), long)


def sum_row(loop: tirx.For, begin: Any, count: Any, held: Any | None, ahead: int = 0) -> tirx.Stmt:
    """`count` iterations from `begin` of a planes kernel's ragged loop with one row per block.

    They are whole steps of the kernel (see `PlanesTile.unroll`). In a buffer `held` indices wait
    from sum to sum. Weights are fetched so many entries `ahead`.
    """
    step = _Sum.of(loop)
    vectors, lanes, carried = int(step.vectors.extent), step.lanes, held is not None
    more = [] if held is None else [_pointer(held, [tirx.const(0, "int32")])]

    def function(stride: int) -> RowSum:
        return RowSum(vectors, lanes, stride, carried, ahead)

    return _called(step, function, begin, count, more)


def _called(
    step: _Sum,
    function: Callable[[int], NeonSum | RowSum],
    begin: Any,
    count: Any,
    more: Sequence[Any] = (),
) -> tirx.Stmt:
    """The loop as a call of a function that is inlined.

    Args:
        step: one step of it.
        function: from the floats between two values of the index.
        begin: the first iteration.
        count: how many there are.
        more: arguments behind those.
    """
    weight, data = step.store.value.b.a, step.store.value.b.b
    zero = tirx.const(0, "int32")
    at = step.indices(data.indices, begin, 0, 0)
    ((axis, entry),) = (
        (i, load)
        for i, index in enumerate(at)
        for load in walk(index, TensorLoad)
        if load.source.name == "index"
    )

    def first(node: Any) -> Any:
        return zero if node.source.same_as(entry.source) else node

    at[axis] = tvm_ffi.structural_map(at[axis], (TensorLoad, first))
    stride = math.prod(int(extent) for extent in data.source.ty.shape[axis + 1 :])
    made = function(stride)
    places = (
        (step.store.buffer, step.indices(step.store.indices, begin, 0, 0)),
        (weight.source, step.indices(weight.indices, begin, 0, 0)),
        (entry.source, entry.indices),
        (data.source, at),
    )
    pointers = [_pointer(buffer, indices) for buffer, indices in places]
    call = tirx.Evaluate(tirx.call_extern("void", made.name, *pointers, count, *more))
    return tirx.AttrStmt(zero, "pragma_import_llvm", StringImm(made.llvm()), call)


def _pointer(buffer: Any, indices: Any) -> Any:
    return tirx.address_of(tirx.BufferLoad(buffer, indices))


def _loop(var: Any, count: Any, body: tirx.Stmt) -> tirx.For:
    return tirx.For(var, tirx.const(0, "int32"), count, tirx.ForKind.SERIAL, body)


def _vector(indices: list[Any], lanes: int) -> list[Any]:
    return [*indices[:-1], tirx.Ramp(indices[-1], 1, lanes)] if lanes > 1 else indices


def _load(buffer: Any, first: list[Any], lanes: int) -> Any:
    return tirx.BufferLoad(buffer, _vector(first, lanes))


def _name(code: list[tirx.Stmt], value: Any) -> Any:
    """A variable that the code gives `value` to."""
    var = tirx.Var("held", str(value.ty))
    code.append(tirx.Bind(var, value))
    return var
