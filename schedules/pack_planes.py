"""Lay images out as the zero-padded channel planes that the planes kernel reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import SLACK, ConvGeometry
from .analysis import LEFT_TO_LLVM
from .block_sparse_moves import SCHEDULED


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


def pack_planes(geometry: ConvGeometry, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """X [batch, channels, height, width] -> P [batch, image_floats]; see `ConvGeometry`.

    One task per image and channel: its planes are cleared, then its rows are copied, phase by
    phase. Behind the last plane of each image the slack is cleared too.
    """
    y_axis, x_axis, channels = geometry.y, geometry.x, geometry.channels
    shape = (geometry.batch, channels, y_axis.size, x_axis.size)
    x = tirx.decl_buffer(shape, "float32", name="X")
    p = tirx.decl_buffer((geometry.batch, geometry.image_floats), "float32", name="P")
    plane = geometry.plane_height * geometry.pitch
    phases = list(product(range(len(y_axis.phases)), range(len(x_axis.phases))))

    def clear(n: Any, begin: Any, count: int) -> tirx.For:
        zero = tirx.const(0, "float32")
        return vectors(count, lanes, lambda at: tirx.BufferStore(p, zero, [n, begin + at]))

    def copy(n: Any, c: Any, number: int) -> list[tirx.Stmt]:
        phase_y, phase_x = (
            axis.phases[i] for axis, i in zip((y_axis, x_axis), phases[number], strict=True)
        )
        first_row, end_row = y_axis.filled(phase_y, geometry.plane_height)
        first, end = x_axis.filled(phase_x, geometry.pitch)
        if first_row == end_row or first == end:
            return []

        def row(i: Any) -> tirx.For:
            at_row = (c * len(phases) + number) * plane + (first_row + i) * geometry.pitch + first
            source_y = y_axis.source(phase_y, first_row + i)

            def copied(at: Any) -> tirx.BufferStore:
                source_x = x_axis.source(phase_x, first) + at * x_axis.stride
                load = tirx.BufferLoad(x, [n, c, source_y, source_x])
                return tirx.BufferStore(p, load, [n, at_row + at])

            if x_axis.stride == 1:
                return vectors(end - first, lanes, copied)
            # Of a vector with a stride TVM makes one load per lane; of a plain loop LLVM makes
            # whole loads and shuffles.
            return loop(end - first, copied, annotations={LEFT_TO_LLVM: True})

        return [loop(end_row - first_row, row)]

    def task(i: Any) -> tirx.Stmt:
        n, c = tirx.floordiv(i, channels), tirx.floormod(i, channels)
        count = len(phases) * plane
        copies = [s for number in range(len(phases)) for s in copy(n, c, number)]
        slack = tirx.IfThenElse(
            tirx.EQ(c, tirx.const(channels - 1, "int32")),
            clear(n, geometry.planes * plane, SLACK),
            None,
        )
        return tirx.SeqStmt([clear(n, c * count, count), *copies, slack])

    kind = tirx.ForKind.PARALLEL if parallel else tirx.ForKind.SERIAL
    # No block inside: nothing is left to schedule, and its accesses need no description.
    root = SBlock([], [], [], "root", loop(geometry.batch * channels, task, kind))
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    attrs = tvm.ir.make_node("ir.DictAttrs", **{SCHEDULED: True, "tirx.noalias": True})
    return tirx.PrimFunc([x, p], body, None, attrs)
