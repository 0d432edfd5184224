"""Max pooling of planes: the maximum over a window's rows first, then along the row.

Vectors of the first step lie in memory as they are. Its results go to a small buffer, with the
padding around them, from which the second step makes vectors of every s-th element by shuffles.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def max_pool(
    batch: int, channels: int, y: AxisGeometry, x: AxisGeometry, lanes: int, parallel: bool
) -> tirx.PrimFunc:
    """X [batch, channels, y.size, x.size] -> Y [batch, channels, y.output, x.output], float32.

    Padding never wins, not even against -inf. Whether a NaN is passed on or lost depends on where
    in the window it stands.

    Args:
        batch: images.
        channels: planes of an image.
        y: the rows; `after` is what the last window needs, and may be negative.
        x: the same for the columns. `is_supported` must hold for them.
        lanes: floats in a vector register.
        parallel: whether planes are shared out among threads.
    """
    source = tirx.decl_buffer((batch, channels, y.size, x.size), "float32", name="X")
    out = tirx.decl_buffer((batch, channels, y.output, x.output), "float32", name="Y")
    width = min(lanes, 1 << (x.output.bit_length() - 1))
    needed = (x.output - 1) * x.stride + x.kernel
    filled = min(x.size, needed - x.before)
    pitch = -(-needed // lanes) * lanes
    groups = -(-y.output // max(1, BUFFER_FLOATS // pitch))
    group = -(-y.output // groups)
    # The last vector may read behind its row, elements that no output uses.
    read = (x.output + (x.kernel - 1) // x.stride) * x.stride
    floats = (group - 1) * pitch + max(pitch, read)
    rows = tirx.decl_buffer((floats,), "float32", name="rows")

    def down(image: list[Any], first: Any, r: Any) -> tirx.For:
        # A row outside counts as the nearest one, which is in the window too.
        top = (first + r) * y.stride - y.before
        taps = [tirx.min(tirx.max(top + k, 0), y.size - 1) for k in range(y.kernel)]

        def reduced(at: Any) -> tirx.BufferStore:
            value = _maximum(tirx.BufferLoad(source, [*image, tap, at]) for tap in taps)
            return tirx.BufferStore(rows, value, [r * pitch + x.before + at])

        return vectors(filled, lanes, reduced)

    def across(image: list[Any], first: Any, r: Any) -> tirx.For:
        def reduced(j: Any) -> tirx.BufferStore:
            start = tirx.min(j * width, tirx.const(x.output - width, "int32"))
            value = _maximum(_taps(rows, r * pitch + start * x.stride, x, width))
            return tirx.BufferStore(out, value, [*image, first + r, _stretch(start, width)])

        return loop(-(-x.output // width), reduced)

    def plane(i: Any) -> tirx.For:
        image = [tirx.floordiv(i, channels), tirx.floormod(i, channels)]

        def some_rows(j: Any) -> tirx.Stmt:
            first = tirx.min(j * group, tirx.const(y.output - group, "int32"))
            return tirx.SeqStmt(
                [
                    loop(group, lambda r: down(image, first, r)),
                    loop(group, lambda r: across(image, first, r)),
                ]
            )

        return loop(groups, some_rows)

    planes = batch * channels
    tasks = task_count(planes) if parallel else 1

    def task(t: Any) -> SBlockRealize:
        low = tirx.const(float("-inf"), "float32")
        clear = vectors(floats, lanes, lambda at: tirx.BufferStore(rows, low, [at]))
        work = loop(planes // tasks, lambda i: plane(t * (planes // tasks) + i))
        return _block("task", tirx.SeqStmt([clear, work]), [rows])

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
