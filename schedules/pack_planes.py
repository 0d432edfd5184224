"""Lay images out as the zero-padded channel planes that the planes kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import SLACK, ConvGeometry
from .analysis import LEFT_TO_LLVM, substitute
from .block_sparse_moves import SCHEDULED
from .moves import in_sequence


def loop(
    extent: int,
    body: Callable[[Any], Any],
    kind: tirx.ForKind = tirx.ForKind.SERIAL,
    annotations: dict[str, Any] | None = None,
) -> tirx.For:
    """Run ``body(i)`` for i < `extent`."""
    var = tirx.Var("i", "int32")
    zero, end = (tirx.const(value, "int32") for value in (0, extent))
    return tirx.For(var, zero, end, kind, body(var), annotations=annotations)


def vectors(count: int, lanes: int, body: Callable[[Any], Any]) -> tirx.For:
    """Run ``body(i)`` for i < `count` in vectors; the last vector may overlap the one before."""
    floats = min(lanes, 1 << (count.bit_length() - 1))
    last = tirx.const(count - floats, "int32")

    def vector(j: Any) -> tirx.For:
        start = tirx.min(j * floats, last)
        return loop(floats, lambda v: body(start + v), tirx.ForKind.VECTORIZED)

    return loop(-(-count // floats), vector)


def pack_planes(
    geometry: ConvGeometry, lanes: int, parallel: bool, dtype: str = "float32"
) -> tirx.PrimFunc:
    """X [batch, channels, height, width] -> P [batch, image_floats]; see `ConvGeometry`.

    One task per image and channel. Behind the last plane of each image the slack is cleared too.
    """
    channels = geometry.channels
    shape = (geometry.batch, channels, geometry.y.size, geometry.x.size)
    x = tirx.decl_buffer(shape, dtype, name="X")
    p = tirx.decl_buffer((geometry.batch, geometry.image_floats), dtype, name="P")

    def task(i: Any) -> tirx.Stmt:
        n, c = tirx.floordiv(i, channels), tirx.floormod(i, channels)
        last = tirx.EQ(c, tirx.const(channels - 1, "int32"))
        slack = tirx.IfThenElse(last, clear_slack(geometry, p, n, lanes), None)
        return tirx.SeqStmt([*lay_out(geometry, geometry, x, p, (n, n), c, lanes), slack])

    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    # No block inside: nothing is left to schedule, and its accesses need no description.
    root = SBlock([], [], [], "root", loop(geometry.batch * channels, task, kind))
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    attrs = tvm.ir.make_node("ir.DictAttrs", **{SCHEDULED: True, "tirx.noalias": True})
    return tirx.PrimFunc([x, p], body, None, attrs)


def lay_out(
    image: ConvGeometry,
    planes: ConvGeometry,
    x: Any,
    p: Any,
    numbers: tuple[Any, Any],
    c: Any,
    lanes: int,
    first_row: Any = 0,
) -> list[tirx.Stmt]:
    """Write the planes of one channel, padding and all.

    Args:
        image: the convolution.
        planes: itself, or a band of it: the layout of the planes.
        x: its input, [batch, channels, height, width].
        p: the planes, [images, planes.image_floats].
        numbers: of the image in `x`, and in `p`.
        c: the channel.
        lanes: floats of a vector.
        first_row: the output row at which the planes begin.
    """
    phases = list(product(range(len(image.y.phases)), range(len(image.x.phases))))
    height, pitch = planes.plane_height, planes.pitch
    n, to = numbers

    def plane(number: int) -> tirx.Stmt:
        phase_y = image.y.phases[phases[number][0]]
        phase_x = image.x.phases[phases[number][1]]
        first, end = image.x.filled(phase_x, pitch)

        def row(i: Any) -> tirx.Stmt:
            at_row = ((c * len(phases) + number) * height + i) * pitch
            source_y = image.y.source(phase_y, first_row + i)

            def copied(at: Any) -> tirx.BufferStore:
                source_x = image.x.source(phase_x, first) + at * image.x.stride
                load = tirx.BufferLoad(x, [n, c, source_y, source_x])
                return tirx.BufferStore(p, load, [to, at_row + first + at])

            if image.x.stride == 1:
                copy = vectors(end - first, lanes, copied)
            else:
                # Of a vector with a stride TVM makes one load per lane; of a plain loop LLVM makes
                # whole loads and shuffles.
                copy = loop(end - first, copied, annotations={LEFT_TO_LLVM: True})
            left = _clear(p, to, at_row, first, lanes)
            right = _clear(p, to, at_row + end, pitch - end, lanes)
            inside = tirx.all(source_y >= 0, source_y < image.y.size)
            outside = in_sequence(_clear(p, to, at_row, pitch, lanes))
            return tirx.IfThenElse(inside, in_sequence([*left, copy, *right]), outside)

        def empty(i: Any) -> tirx.Stmt:
            at_row = ((c * len(phases) + number) * height + i) * pitch
            return in_sequence(_clear(p, to, at_row, pitch, lanes))

        return loop(height, row if first < end else empty)

    return [plane(number) for number in range(len(phases))]


def clear_slack(planes: ConvGeometry, p: Any, image: Any, lanes: int) -> tirx.Stmt:
    """Clear what lies behind the last plane of an image."""
    end = tirx.const(planes.image_floats - SLACK, "int32")
    return in_sequence(_clear(p, image, end, SLACK, lanes))


def _clear(p: Any, image: Any, begin: Any, count: int, lanes: int) -> list[tirx.Stmt]:
    zero = tirx.const(0, p.ty.dtype)
    if count == 0:
        return []
    return [vectors(count, lanes, lambda at: tirx.BufferStore(p, zero, [image, begin + at]))]


def packed_first(kernel: tirx.PrimFunc, packing: tirx.PrimFunc) -> tirx.PrimFunc:
    """One function that lays out planes and runs a planes kernel on them.

    Args:
        kernel: its first parameter is the planes.
        packing: made by `pack_planes`.

    Returns:
        A function of the images, the planes, which it overwrites, and the kernel's other arguments.
    """
    x, p = packing.params
    own, *others = kernel.params
    steps = tirx.SeqStmt([packing.body, substitute(kernel.body, {own: p})])
    body = SBlockRealize([], tirx.const(True, "bool"), SBlock([], [], [], "root", steps))
    return tirx.PrimFunc([x, p, *others], body, None, packing.attrs)
