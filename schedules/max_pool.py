"""Max pooling of planes: the maximum over a window's rows first, then along the row.

Vectors of the first step lie in memory as they are. Its results go to a small buffer, with the
padding around them, from which the second step makes vectors of every s-th element by shuffles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import AxisGeometry
from .block_sparse_moves import SCHEDULED
from .moves import task_count
from .pack_planes import loop, vectors

# Of the row buffer. Vectors read it at other places than they were written, for which they wait
# if these writes are recent; so several short rows are written before the first is read.
BUFFER_FLOATS = 256

MAX_KERNEL = 16  # taps of one axis that are written out
MAX_STRIDE = 4


def is_supported(y: AxisGeometry, x: AxisGeometry) -> bool:
    """Whether `max_pool` computes this pooling: no empty window, few taps, rows of vectors."""
    return (
        y.dilation == x.dilation == 1
        and max(y.kernel, x.kernel) <= MAX_KERNEL
        and x.stride <= MAX_STRIDE
        and x.output > 1
        and all(_meets_input(axis) for axis in (y, x))
    )


def _meets_input(axis: AxisGeometry) -> bool:
    last = (axis.output - 1) * axis.stride - axis.before
    return axis.output > 0 and axis.before < axis.kernel and last < axis.size


def _maximum(values: Iterable[Any]) -> Any:
    return reduce(tirx.max, values)


@dataclass(frozen=True)
class RowMaximum:
    """The pooling of one plane, some output rows at a time.

    Attributes:
        y: the rows; `after` is what the last window needs, and may be negative.
        x: the same for the columns. `is_supported` must hold for both.
        lanes: floats in a vector register.
        most: output rows that `write` is asked for at once.
    """

    y: AxisGeometry
    x: AxisGeometry
    lanes: int
    most: int

    @property
    def _needed(self) -> int:
        """Columns that some window covers, padding included."""
        return (self.x.output - 1) * self.x.stride + self.x.kernel

    @property
    def _pitch(self) -> int:
        return -(-self._needed // self.lanes) * self.lanes

    @property
    def _group(self) -> int:
        """Rows that the buffer holds."""
        groups = -(-self.most // max(1, BUFFER_FLOATS // self._pitch))
        return -(-self.most // groups)

    @property
    def _floats(self) -> int:
        # The last vector may read behind its row, elements that no output uses.
        read = (self.x.output + (self.x.kernel - 1) // self.x.stride) * self.x.stride
        return (self._group - 1) * self._pitch + max(self._pitch, read)

    def buffer(self) -> tirx.Buffer:
        """What `write` works in; `clear` it once."""
        return tirx.decl_buffer((self._floats,), "float32", name="rows")

    def clear(self, rows: tirx.Buffer) -> tirx.Stmt:
        """Fill the padding with what never wins."""
        low = tirx.const(float("-inf"), "float32")
        return vectors(self._floats, self.lanes, lambda at: tirx.BufferStore(rows, low, [at]))

    def write(
        self,
        rows: tirx.Buffer,
        load: Callable[[Any, Any], Any],
        store: Callable[[Any, Any, Any], tirx.Stmt],
        start: Any = 0,
    ) -> tirx.Stmt:
        """Compute `most` output rows from `start` on.

        Args:
            rows: the buffer.
            load: from a row and a column of the plane, the pixel.
            store: from an output row, the columns of a vector and its value, the store.
            start: the first output row.
        """

        def some_rows(j: Any) -> tirx.Stmt:
            first = tirx.min(j * self._group, tirx.const(self.most - self._group, "int32"))
            down = loop(self._group, lambda r: self._down(rows, load, start + first + r, r))
            across = loop(self._group, lambda r: self._across(rows, store, start + first + r, r))
            return tirx.SeqStmt([down, across])

        return loop(-(-self.most // self._group), some_rows)

    def _down(
        self, rows: tirx.Buffer, load: Callable[[Any, Any], Any], output: Any, r: Any
    ) -> tirx.For:
        # A row outside counts as the nearest one, which is in the window too.
        y, top = self.y, output * self.y.stride - self.y.before
        taps = [tirx.min(tirx.max(top + k, 0), y.size - 1) for k in range(y.kernel)]

        def reduced(at: Any) -> tirx.BufferStore:
            value = _maximum(load(tap, at) for tap in taps)
            return tirx.BufferStore(rows, value, [r * self._pitch + self.x.before + at])

        return vectors(min(self.x.size, self._needed - self.x.before), self.lanes, reduced)

    def _across(
        self, rows: tirx.Buffer, store: Callable[[Any, Any, Any], tirx.Stmt], output: Any, r: Any
    ) -> tirx.For:
        x = self.x
        width = min(self.lanes, 1 << (x.output.bit_length() - 1))

        def reduced(j: Any) -> tirx.Stmt:
            start = tirx.min(j * width, tirx.const(x.output - width, "int32"))
            value = _maximum(_taps(rows, r * self._pitch + start * x.stride, x, width))
            return store(output, _stretch(start, width), value)

        return loop(-(-x.output // width), reduced)


def max_pool(
    batch: int, channels: int, y: AxisGeometry, x: AxisGeometry, lanes: int, parallel: bool
) -> tirx.PrimFunc:
    """X [batch, channels, y.size, x.size] -> Y [batch, channels, y.output, x.output], float32.

    Padding never wins, not even against -inf. Whether a NaN is passed on or lost depends on where
    in the window it stands.

    Args:
        batch: images.
        channels: planes of an image.
        y, x: rows and columns; see `RowMaximum`.
        lanes: floats in a vector register.
        parallel: whether planes are shared out among threads.
    """
    source = tirx.decl_buffer((batch, channels, y.size, x.size), "float32", name="X")
    out = tirx.decl_buffer((batch, channels, y.output, x.output), "float32", name="Y")
    pooling = RowMaximum(y, x, lanes, y.output)
    rows = pooling.buffer()
    planes = batch * channels
    tasks = task_count(planes) if parallel else 1

    def plane(i: Any) -> tirx.Stmt:
        image = [tirx.floordiv(i, channels), tirx.floormod(i, channels)]
        return pooling.write(
            rows,
            lambda row, at: tirx.BufferLoad(source, [*image, row, at]),
            lambda row, columns, value: tirx.BufferStore(out, value, [*image, row, columns]),
        )

    def task(t: Any) -> SBlockRealize:
        work = loop(planes // tasks, lambda i: plane(t * (planes // tasks) + i))
        return _block("task", tirx.SeqStmt([pooling.clear(rows), work]), [rows])

    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    attrs = tvm.ir.make_node("ir.DictAttrs", **{SCHEDULED: True, "tirx.noalias": True})
    return tirx.PrimFunc([source, out], _block("root", loop(tasks, task, kind)), None, attrs)


def _block(name: str, body: tirx.Stmt, buffers: Iterable[Any] = ()) -> SBlockRealize:
    block = SBlock([], [], [], name, body, alloc_buffers=list(buffers))
    return SBlockRealize([], tirx.const(True, "bool"), block)


def _stretch(start: Any, width: int) -> Any:
    """The indices of `width` elements in a row."""
    return tirx.Ramp(start, tirx.const(1, "int32"), width)


def _taps(rows: Any, start: Any, x: AxisGeometry, width: int) -> list[Any]:
    """For each column of the windows a vector: its elements for `width` neighbouring windows."""

    def load(at: int) -> Any:
        return tirx.BufferLoad(rows, [_stretch(start + at, width)])

    if x.stride == 1:
        return [load(k) for k in range(x.kernel)]
    taps = []
    for k in range(x.kernel):
        whole = [load(k // x.stride * x.stride + i * width) for i in range(x.stride)]
        lanes = [tirx.const(i * x.stride + k % x.stride, "int32") for i in range(width)]
        taps.append(tirx.Shuffle(whole, lanes))
    return taps
