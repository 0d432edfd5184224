"""Convolve each channel by itself (depthwise), straight from the image: no padded copy is made.

Vectors hold neighbouring pixels of one output row. A block of output rows walks the input rows it
reads from top to bottom: each vector of an input row is loaded once, and multiplied by the taps of
all output rows that it belongs to. Input rows beyond the image are left out of the code. Columns
beyond it, and the phases of a stride, are picked lane by lane from vectors that lie inside the
channel's plane, so nothing else is ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import AxisGeometry
from .block_sparse_moves import SCHEDULED
from .depthwise_tiles import DepthwiseProblem, DepthwiseTile
from .moves import in_sequence


def depthwise_kernel(problem: DepthwiseProblem, tile: DepthwiseTile) -> tirx.PrimFunc:
    """The kernel for a problem that comes from `depthwise_problem`.

    Arguments: X [batch, channels, height, width], weight [rows, taps], bias [rows],
    residual (if fused) and Y, both of shape `problem.output`. All are float32. Output channel o
    reads channel ``o // (rows / channels)``.
    """
    p = problem
    image = _buffer("X", (p.batch, p.channels, p.y.size, p.x.size))
    weight = _buffer("weight", (p.rows, p.taps))
    bias = _buffer("bias", (p.rows,))
    residual = _buffer("residual", problem.output) if problem.epilogue.residual else None
    result = _buffer("Y", problem.output)

    def task(i: Any) -> tirx.Stmt:
        n, o = tirx.floordiv(i, p.rows), tirx.floormod(i, p.rows)
        code = _Code(tile.lanes)
        first = code.splat(tirx.BufferLoad(bias, [o]))
        weights = [code.splat(tirx.BufferLoad(weight, [o, t])) for t in range(p.taps)]
        source = _Plane(image, n, tirx.floordiv(o, p.rows // p.channels))
        other = None if residual is None else _Plane(residual, n, o)
        channel = _Channel(p, tile, source, other, _Plane(result, n, o), first, weights)
        return in_sequence([*code.statements, *channel.blocks()])

    kind = tirx.ForKind.PARALLEL if tile.parallel else tirx.ForKind.SERIAL
    # No block inside: nothing is left to schedule, and its accesses need no description.
    root = SBlock([], [], [], "root", _loop(p.batch * p.rows, task, kind))
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    attrs = tvm.ir.make_node("ir.DictAttrs", **{SCHEDULED: True, "tirx.noalias": True})
    arguments = [image, weight, bias, *([] if residual is None else [residual]), result]
    return tirx.PrimFunc(arguments, body, None, attrs)


def _buffer(name: str, shape: tuple[int, ...]) -> Any:
    return tirx.decl_buffer(shape, "float32", name=name)


def _loop(
    extent: int, body: Callable[[Any], tirx.Stmt], kind: tirx.ForKind = tirx.ForKind.SERIAL
) -> tirx.For:
    var = tirx.Var("i", "int32")
    zero, end = tirx.const(0, "int32"), tirx.const(extent, "int32")
    return tirx.For(var, zero, end, kind, body(var))


@dataclass(frozen=True)
class _Plane:
    """One channel of an image."""

    buffer: Any
    n: Any
    channel: Any

    @property
    def floats(self) -> int:
        return int(self.buffer.ty.shape[2]) * int(self.buffer.ty.shape[3])

    def at(self, offset: Any, lanes: int) -> list[Any]:
        """Indices of `lanes` neighbouring pixels from `offset`."""
        return [self.n, self.channel, 0, tirx.Ramp(offset, 1, lanes)]


@dataclass(frozen=True)
class _Offset:
    """A position that code for several of them knows as the value `at`, between two bounds."""

    at: Any
    low: int
    high: int

    def moved(self, factor: int, by: int) -> _Offset:
        return _Offset(self.at * factor + by, self.low * factor + by, self.high * factor + by)

    def __add__(self, other: _Offset) -> _Offset:
        return _Offset(self.at + other.at, self.low + other.low, self.high + other.high)


@dataclass
class _Code:
    """Statements in the order they run, and the vectors of `lanes` floats that they name."""

    lanes: int
    statements: list[tirx.Stmt] = field(default_factory=list)

    def name(self, value: Any) -> Any:
        """A variable for the vector `value`."""
        var = tirx.Var("v", f"float32x{self.lanes}")
        self.statements.append(tirx.Bind(var, value))
        return var

    def splat(self, value: Any) -> Any:
        return self.name(tirx.Broadcast(value, self.lanes))

    def load(
        self, plane: _Plane, base: _Offset, wanted: Sequence[int], outside: Sequence[bool]
    ) -> Any:
        """The pixels ``base + wanted[lane]``, zero in lanes that are `outside`.

        `wanted` rises by 1 or 2 from lane to lane. Vectors that would reach beyond the plane are
        moved into it; where a lane's pixel is in none of them, the lane is of no interest.
        """
        lanes, step = self.lanes, wanted[1] - wanted[0]
        first = wanted[0] - wanted[0] % step
        starts = [
            min(max(first + k * lanes, -base.low), plane.floats - lanes - base.high)
            for k in range(step)
        ]
        loads = [tirx.BufferLoad(plane.buffer, plane.at(base.at + s, lanes)) for s in starts]
        places = []
        for pixel, zero in zip(wanted, outside, strict=True):
            inside = [k * lanes + pixel - s for k, s in enumerate(starts) if 0 <= pixel - s < lanes]
            places.append(inside[0] if inside and not zero else lanes * step)
        if places == list(range(lanes)):
            return self.name(loads[0])
        if lanes * step in places:
            loads.append(tirx.Broadcast(tirx.const(0.0, "float32"), lanes))
        return self.name(tirx.Shuffle(loads, places))


@dataclass(frozen=True)
class _Channel:
    """One output channel: what it reads and writes, its bias and its taps as vectors."""

    problem: DepthwiseProblem
    tile: DepthwiseTile
    source: _Plane
    residual: _Plane | None
    result: _Plane
    bias: Any
    taps: list[Any]

    @property
    def y(self) -> AxisGeometry:
        return self.problem.y

    @property
    def x(self) -> AxisGeometry:
        return self.problem.x

    def blocks(self) -> list[tirx.Stmt]:
        """All output rows, block by block. The order matters: see `_store`."""
        rows, lanes, width = self.tile.group_rows, self.tile.lanes, self.tile.width
        # Vectors reach this far beyond the pixels that they are for.
        reach = 2 * lanes + self.x.kernel * self.x.dilation + self.x.before

        def inner_rows(start: int) -> bool:
            first, end = _reads(self.y, start, rows)
            return min(first, self.y.size - end) * self.x.size >= reach

        def inner_columns(start: int) -> bool:
            first, end = _reads(self.x, start, width)
            return first >= 0 and end <= self.x.size

        def block(row: _Offset) -> tirx.Stmt:
            return in_sequence(
                _pieces(self.x.output, width, inner_columns, lambda c: self._piece(row, rows, c))
            )

        return _pieces(self.y.output, rows, inner_rows, block)

    def _piece(self, row: _Offset, rows: int, column: _Offset) -> tirx.Stmt:
        """`rows` output rows from `row`, a tile wide from `column`."""
        y, x = self.y, self.x
        code = _Code(self.tile.lanes)
        columns = [column.moved(1, v * self.tile.lanes) for v in range(self.tile.vectors)]
        sums = [[self.bias] * rows for _ in columns]
        first, end = _reads(y, 0, rows)
        for at in range(first, end):
            source = row.moved(y.stride, at)
            uses = list(_uses(y, at, rows)) if source.low >= 0 and source.high < y.size else []
            for j in range(x.kernel if uses else 0):
                for own, start in zip(sums, columns, strict=True):
                    pixels = self._pixels(code, source, start, j)
                    for r, i in uses:
                        own[r] = code.name(own[r] + pixels * self.taps[i * x.kernel + j])
            for r in range(rows):
                if _reads(y, r, 1)[1] == at + 1:
                    for own, start in zip(sums, columns, strict=True):
                        self._store(code, own[r], row.moved(1, r), start)
        return in_sequence(code.statements)

    def _pixels(self, code: _Code, source: _Offset, column: _Offset, tap: int) -> Any:
        """What column `tap` of the kernel reads in input row `source`."""
        x = self.x
        shift = tap * x.dilation - x.before
        columns = [lane * x.stride + shift for lane in range(code.lanes)]
        start = column.moved(x.stride, 0)
        # Only where code is for one column alone does it meet the borders.
        outside = [
            not 0 <= start.low + c < x.size and lane < x.output for lane, c in enumerate(columns)
        ]
        if start.low != start.high:
            outside = [False] * code.lanes
        return code.load(self.source, source.moved(x.size, 0) + start, columns, outside)

    def _store(self, code: _Code, value: Any, row: _Offset, column: _Offset) -> None:
        """Add the residual, clamp and store one vector of results.

        Of rows shorter than a vector the spare lanes spill over the next rows, which are stored
        later; the last rows are stored in parts.
        """
        lanes, width = code.lanes, self.x.output
        at = row.moved(width, 0) + column
        epilogue = self.problem.epilogue
        if self.residual is not None:
            value = value + code.load(self.residual, at, range(lanes), [False] * lanes)
        if epilogue.low is not None:
            value = tirx.Max(value, tirx.Broadcast(tirx.const(epilogue.low, "float32"), lanes))
        if epilogue.high is not None:
            value = tirx.Min(value, tirx.Broadcast(tirx.const(epilogue.high, "float32"), lanes))
        buffer = self.result.buffer
        if at.high + lanes <= self.result.floats:
            code.statements.append(tirx.BufferStore(buffer, value, self.result.at(at.at, lanes)))
            return
        value = code.name(value)
        part = 1 << (width.bit_length() - 1)
        for start in sorted({0, width - part}):
            picked = tirx.Shuffle([value], list(range(start, start + part)))
            indices = self.result.at(at.at + start, part)
            code.statements.append(tirx.BufferStore(buffer, picked, indices))


def _reads(axis: AxisGeometry, start: int, count: int) -> tuple[int, int]:
    """The input positions [first, end) that `count` outputs from `start` read, padding included."""
    first = start * axis.stride - axis.before
    return first, first + (count - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1


def _uses(axis: AxisGeometry, at: int, count: int) -> Iterator[tuple[int, int]]:
    """Which of `count` outputs read input position `at`, each with the tap that does."""
    for output in range(count):
        tap, rest = divmod(at + axis.before - output * axis.stride, axis.dilation)
        if rest == 0 and 0 <= tap < axis.kernel:
            yield output, tap


def _pieces(
    total: int, step: int, inner: Callable[[int], bool], body: Callable[[_Offset], tirx.Stmt]
) -> list[tirx.Stmt]:
    """Code for pieces of `step` out of `total`; the last may overlap the one before it.

    Those that are `inner` and a step apart share a loop; the others have code of their own.
    """
    starts = range(0, max(total - step, 0), step)
    shared = [start for start in starts if inner(start)]

    def shared_piece(i: Any) -> tirx.Stmt:
        return body(_Offset(shared[0] + i * step, shared[0], shared[-1]))

    code = []
    for start in starts:
        if start not in shared:
            code.append(body(_Offset(tirx.const(start, "int32"), start, start)))
        elif start == shared[0]:
            code.append(_loop(len(shared), shared_piece))
    last = max(total - step, 0)
    return [*code, body(_Offset(tirx.const(last, "int32"), last, last))]
