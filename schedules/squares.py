"""Transposes in registers: a square of elements is loaded row by row and stored column by column.

A vectorised loop over a load with a stride becomes one load and one insertion for each element.
Instead the rows are loaded as the vectors they are and exchange elements in log2(size) rounds of
shuffles, most of which keep to the quarters of a vector, where every machine is fast.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.s_tir import SBlock, SBlockRealize

from .analysis import offset, substitute, walk

# Marks a loop over the rows of a square, around a vectorised one over its columns.
SQUARE = "pivot.square"

# Elements whose order a machine can change at once in all parts of a vector.
_PART = 4

# Which half of which half a line was, and so on, and what it holds.
_Piece = tuple[tuple[int, ...], Any]


def transposes(size: int) -> bool:
    """Whether squares of so many rows can be transposed so."""
    return size >= _PART and size & (size - 1) == 0


def transpose_square(loop: tirx.For) -> tirx.Stmt:
    """A loop marked `SQUARE` over loads whose rows lie along it; any other loop as it is.

    What the square's block reads row by row is transposed into a buffer that LLVM keeps in
    registers, and the block reads that.
    """
    if SQUARE not in loop.annotations:
        return loop
    vector, (realize,) = loop.body, walk(loop, SBlockRealize)
    block, size = realize.block, int(loop.extent)
    values = dict(zip((axis.var for axis in block.iter_vars), realize.iter_values, strict=True))
    store = substitute(block.body, values)
    row, column = loop.loop_var, vector.loop_var
    steps: list[tirx.Stmt] = []
    buffers: list[Any] = []

    def load(node: Any) -> Any:
        if not _lies_along(node, row, column):
            return node
        square = tirx.decl_buffer((size * size,), node.source.ty.dtype, name="square")
        steps.extend(_transposed(node, row, column, square, size))
        buffers.append(square)
        return tirx.BufferLoad(square, [row * size + column])

    store = tvm_ffi.structural_map(store, (ir.TensorLoad, load))
    always = isinstance(realize.predicate, tirx.IntImm) and int(realize.predicate) == 1
    if not buffers or not always:
        return tirx.For(row, loop.min, loop.extent, loop.kind, vector)
    stored = tirx.For(column, vector.min, vector.extent, vector.kind, store)
    rows = tirx.For(row, loop.min, loop.extent, loop.kind, stored)
    body = tirx.SeqStmt([*steps, rows])
    whole = SBlock([], [], [], "square", body, alloc_buffers=buffers)
    return SBlockRealize([], tirx.const(True, "bool"), whole)


def _lies_along(load: Any, row: Any, column: Any) -> bool:
    """Whether a load's elements are adjacent along the square's rows, and only there."""
    strides = sym.detect_linear_equation(offset(load.source, load.indices), [row, column])
    if not strides or not all(isinstance(stride, tirx.IntImm) for stride in strides[:2]):
        return False
    *outer, _ = load.indices
    inside = not any(row.same_as(var) for index in outer for var in walk(index, tirx.Var))
    return inside and int(strides[0]) == 1 and int(strides[1]) not in (0, 1)


def _transposed(load: Any, row: Any, column: Any, square: Any, size: int) -> list[tirx.Stmt]:
    """Code that fills `square` with what `load` reads for all rows and columns."""
    code: list[tirx.Stmt] = []
    dtype = f"{square.ty.dtype}x{size}"

    def name(value: Any) -> Any:
        var = tirx.Var("v", dtype)
        code.append(tirx.Bind(var, value))
        return var

    def shuffled(a: Any, b: Any, picked: list[int]) -> Any:
        return name(tirx.Shuffle([a, b], [tirx.const(i, "int32") for i in picked]))

    def line(number: int) -> Any:
        at = {row: tirx.const(0, "int32"), column: tirx.const(number, "int32")}
        *outer, last = (substitute(index, at) for index in load.indices)
        ramp = tirx.Ramp(last, tirx.const(1, str(last.ty)), size)
        return name(tirx.BufferLoad(load.source, [*outer, ramp]))

    lines = [line(number) for number in range(size)]
    for run in (1, 2):  # within the parts: first single elements of two rows, then pairs
        lines = _mixed(lines, run, size, shuffled)
    for number, value in _gathered(lines, size, shuffled):
        ramp = tirx.Ramp(tirx.const(number * size, "int32"), tirx.const(1, "int32"), size)
        code.append(tirx.BufferStore(square, value, [ramp]))
    return code


def _mixed(lines: list[Any], run: int, size: int, shuffled: Any) -> list[Any]:
    """Pairs of lines, `run` apart, with runs of their elements taking turns in each part."""
    mixed: list[Any] = [None] * size
    for first in range(size):
        if first // run % 2:
            continue
        low: list[int] = []
        for part in range(0, size, _PART):
            for start in range(part, part + _PART // 2, run):
                low += [*range(start, start + run), *range(size + start, size + start + run)]
        high = [i + _PART // 2 for i in low]
        a, b = lines[first], lines[first + run]
        # Lines of elements 0 and 2 of the parts lead to 0, 1 and 2, 3 in the second round.
        mixed[first], mixed[first + run] = shuffled(a, b, low), shuffled(a, b, high)
    return mixed


def _gathered(lines: list[Any], size: int, shuffled: Any) -> list[tuple[int, Any]]:
    """The columns, by number, of lines whose parts hold four rows of a column each."""
    parts = size // _PART
    columns = []
    # After the rounds within parts, line 0 of four has column 0 of each part, and so on.
    for number, at in enumerate((0, 2, 1, 3)):
        found: list[_Piece] = [((), lines[group * _PART + at]) for group in range(parts)]
        while len(found[0][0]) < parts.bit_length() - 1:
            found = _halved(found, size, shuffled)
        for bits, value in found:
            part = sum(bit << place for place, bit in enumerate(bits))
            columns.append((part * _PART + number, value))
    return columns


def _halved(found: list[_Piece], size: int, shuffled: Any) -> list[_Piece]:
    """Neighbours with the even parts of both in one line, and the odd ones in another."""
    halves: list[list[_Piece]] = [[], []]
    for (bits, a), (_, b) in zip(found[::2], found[1::2], strict=True):
        for odd in (0, 1):
            starts = range(odd * _PART, 2 * size, 2 * _PART)
            picked = [i for start in starts for i in range(start, start + _PART)]
            halves[odd].append(((*bits, odd), shuffled(a, b, picked)))
    return [*halves[0], *halves[1]]
