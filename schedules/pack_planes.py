"""Lay images out as the zero-padded channel planes that the planes kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import SLACK, WHOLE, ConvGeometry, Parts, rows_of_part
from .aligned_planes import with_aligned
from .analysis import LEFT_TO_LLVM, substitute
from .block_sparse_moves import SCHEDULED
from .moves import in_sequence

# Vectors of a plane that are copied one by one.
MOST_UNROLLED = 64


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
    geometry: ConvGeometry,
    lanes: int,
    parallel: bool,
    dtype: str = "float32",
    parts: Parts = WHOLE,
) -> tirx.PrimFunc:
    """X [batch, channels, height, width] -> P [batch, image_floats]; see `ConvGeometry`.

    One task per image and channel. Behind the last plane of each image the slack is cleared too.

    Args:
        geometry: the convolution, of whole images.
        lanes: floats of a vector.
        parallel: on all cores.
        dtype: of X and P.
        parts: how X holds the images; P has planes for each written part, see
            `ConvGeometry.in_parts`.
    """
    channels, planes = geometry.channels, geometry.in_parts(parts.written)
    shape = stored_shape(geometry, parts.read)
    x = tirx.decl_buffer(shape, dtype, name="X")
    p = tirx.decl_buffer((planes.batch, planes.image_floats), dtype, name="P")

    def task(i: Any) -> tirx.Stmt:
        to, c = tirx.floordiv(i, channels), tirx.floormod(i, channels)
        n, first = begin_of(geometry, parts.written, to)
        last = tirx.EQ(c, tirx.const(channels - 1, "int32"))
        slack = tirx.IfThenElse(last, clear_slack(planes, p, to, lanes), None)
        laid = lay_out(geometry, planes, x, p, (n, to), c, lanes, first)
        return tirx.SeqStmt([*laid, slack])

    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    # No block inside: nothing is left to schedule, and its accesses need no description.
    root = SBlock([], [], [], "root", loop(planes.batch * channels, task, kind))
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    attrs = tvm.ir.make_node("ir.DictAttrs", **{SCHEDULED: True, "tirx.noalias": True})
    func = tirx.PrimFunc([x, p], body, None, attrs)
    return with_aligned(func, ["X"]) if parts.read_aligned else func


def stored_shape(geometry: ConvGeometry, parts: int) -> tuple[int, int, int, int]:
    """The shape of a convolution's input in so many parts."""
    g = geometry
    return (g.batch * parts, g.channels, rows_of_part(g.y.size, parts), g.x.size)


def begin_of(geometry: ConvGeometry, parts: int, number: Any) -> tuple[Any, Any]:
    """Of one out of so many parts of each image: which image, and its first output row."""
    if parts == 1:
        return number, tirx.const(0, "int32")
    rows = rows_of_part(geometry.y.output, parts)
    return tirx.floordiv(number, parts), tirx.floormod(number, parts) * rows


def row_of(geometry: ConvGeometry, x: Any, n: Any, y: Any) -> tuple[Any, Any]:
    """Where row `y` of image `n` is in `x`, whole or in parts: the part's number and its row."""
    size, rows = geometry.y.size, int(x.ty.shape[2])
    if rows == size:
        return n, y
    return n * -(-size // rows) + tirx.floordiv(y, rows), tirx.floormod(y, rows)


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
        x: its input, [batch, channels, height, width], or with every image in stretches of rows.
        p: the planes, [images, planes.image_floats].
        numbers: of the image in `x`, and in `p`.
        c: the channel.
        lanes: floats of a vector.
        first_row: the output row at which the planes begin.
    """
    parts = list(product(image.y.phases, image.plane_starts))
    height, pitch = planes.plane_height, planes.pitch
    n, to = numbers

    def plane(number: int) -> tirx.Stmt:
        phase_y, (column, cell) = parts[number]
        phase_x = image.x.phases[column]
        first, end = (max(0, at - cell) for at in image.x.filled(phase_x, pitch + cell))

        def row(i: Any) -> tirx.Stmt:
            at_row = ((c * len(parts) + number) * height + i) * pitch
            source_y = image.y.source(phase_y, first_row + i)
            holder, source_row = row_of(image, x, n, source_y)

            def copied(at: Any) -> tirx.BufferStore:
                source_x = image.x.source(phase_x, cell + first) + at * image.x.stride
                load = tirx.BufferLoad(x, [holder, c, source_row, source_x])
                return tirx.BufferStore(p, load, [to, at_row + first + at])

            if image.x.stride == 1:
                copy = vectors(end - first, lanes, copied)
            else:
                # Of a vector with a stride TVM makes one load per lane; of a plain loop LLVM makes
                # whole loads and shuffles.
                copy = loop(end - first, copied, annotations={LEFT_TO_LLVM: True})
            left = clear(p, to, at_row, first, lanes)
            right = clear(p, to, at_row + end, pitch - end, lanes)
            inside = tirx.all(source_y >= 0, source_y < image.y.size)
            outside = in_sequence(clear(p, to, at_row, pitch, lanes))
            return tirx.IfThenElse(inside, in_sequence([*left, copy, *right]), outside)

        def empty(i: Any) -> tirx.Stmt:
            at_row = ((c * len(parts) + number) * height + i) * pitch
            return in_sequence(clear(p, to, at_row, pitch, lanes))

        whole = planes == image and int(x.ty.shape[2]) == image.y.size
        if whole and _unbroken(image, lanes) and first < end:
            at_plane = (c * len(parts) + number) * height * pitch
            return in_sequence(_whole_plane(image, x, p, numbers, c, at_plane, cell, lanes))
        return loop(height, row if first < end else empty)

    return [plane(number) for number in range(len(parts))]


def _unbroken(image: ConvGeometry, lanes: int) -> bool:
    """Whether unfolded planes hold rows one behind the other, as they lie in the image."""
    y, x = image.y, image.x
    same = y.stride == x.stride == 1 and x.output == x.size
    return image.unfolded and same and lanes <= y.size * x.size <= MOST_UNROLLED * lanes


def _whole_plane(
    image: ConvGeometry,
    x: Any,
    p: Any,
    numbers: tuple[Any, Any],
    c: Any,
    at_plane: Any,
    cell: int,
    lanes: int,
) -> list[tirx.Stmt]:
    """An unfolded plane in vectors that cross rows: what a row has not comes in as zeros."""
    width, right = image.x.size, cell - image.x.before
    first, end = image.y.filled(0, image.plane_height)
    n, to = numbers
    count, source = (end - first) * width, image.y.source(0, first) * width + right
    above, below = first * width, (image.plane_height - end) * width
    code = clear(p, to, at_plane, above, lanes)
    for start in sorted({min(at, count - lanes) for at in range(0, count, lanes)}):
        columns = tirx.floormod(tirx.Ramp(start, 1, lanes), tirx.Broadcast(width, lanes))
        inside = columns >= tirx.Broadcast(-right, lanes)
        if right > 0:
            inside = columns < tirx.Broadcast(width - right, lanes)
        begin = source + start
        held = min(max(begin, 0), image.y.size * width - lanes)  # no load leaves the plane
        value = tirx.BufferLoad(x, [n, c, 0, tirx.Ramp(held, 1, lanes)])
        if held != begin:
            picked = [min(max(begin - held + i, 0), lanes - 1) for i in range(lanes)]
            value = tirx.Shuffle([value], [tirx.const(lane, "int32") for lane in picked])
        if right != 0:
            value = tirx.Select(inside, value, tirx.Broadcast(tirx.const(0, x.ty.dtype), lanes))
        place = tirx.Ramp(at_plane + (above + start), 1, lanes)
        code.append(tirx.BufferStore(p, value, [to, place]))
    return [*code, *clear(p, to, at_plane + (above + count), below, lanes)]


def clear_slack(planes: ConvGeometry, p: Any, image: Any, lanes: int) -> tirx.Stmt:
    """Clear what lies behind the last plane of an image."""
    end = tirx.const(planes.image_floats - SLACK, "int32")
    return in_sequence(clear(p, image, end, SLACK, lanes))


def clear(p: Any, image: Any, begin: Any, count: int, lanes: int) -> list[tirx.Stmt]:
    """Write zeros to `count` floats of an image's planes, from `begin` on."""
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
