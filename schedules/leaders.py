"""What a convolution in bands reads may be computed in the same bands (see `in_bands`).

The first convolutions of a network write large images, which leave level 2 before the next one lays
out its planes. Done band by band, each computes the few rows that a band reads, right into the
padded planes of the next: they are never written as a whole image, nor copied. Neighbouring bands
compute the rows that both read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tvm import tirx

from ..planes import ConvGeometry
from .analysis import substitute
from .block_sparse import planes_kernel
from .block_sparse_moves import schedule_planes
from .moves import in_sequence
from .pack_planes import clear, clear_slack, lay_out, loop
from .placement import Place, moved, shifted
from .problems import PlanesProblem, PlanesTile


@dataclass(frozen=True)
class Leader:
    """A convolution before the one in bands, which alone reads its output.

    Attributes:
        geometry: itself; it is not direct.
        problem: its rows that a band reads, without residual.
        tile: of their kernel, on one core.
    """

    geometry: ConvGeometry
    problem: PlanesProblem
    tile: PlanesTile

    @cached_property
    def _kernel(self) -> tirx.PrimFunc:
        return schedule_planes(planes_kernel(self.problem, self.tile), self.problem, self.tile)

    @cached_property
    def tables(self) -> list[tirx.Buffer]:
        """Parameters that it adds to the kernel's tables: its own ones, in order."""
        _, *own, _ = self._kernel.params
        return [
            tirx.decl_buffer(table.ty.shape, table.ty.dtype, name=f"{table.name}_before")
            for table in own
        ]

    def lay_out(
        self,
        geometry: ConvGeometry,
        band: ConvGeometry,
        x: tirx.Buffer,
        planes: tirx.Buffer,
        n: Any,
        first: Any,
        lanes: int,
    ) -> tuple[list[tirx.Stmt], list[tirx.Buffer]]:
        """Compute what a band of the convolution behind it reads into padded planes.

        Args:
            geometry: the convolution behind it: no strides, its planes not unfolded.
            band: the same for the rows of a band.
            x: its own input, [batch, channels, height, width].
            planes: [1, band.image_floats].
            n: the number of the image.
            first: the first output row of the band.
            lanes: floats of a vector.

        Returns:
            The statements, and the buffers that they need.
        """
        top, zero = first - geometry.y.before, tirx.const(0, "int32")
        own = self.geometry.band(self.problem.height)
        rows = tirx.decl_buffer((1, own.image_floats), "float32", name="planes_before")

        def channel(c: Any) -> tirx.Stmt:
            numbers = (n, zero)
            return in_sequence(lay_out(self.geometry, own, x, rows, numbers, c, lanes, top))

        laid = [loop(own.channels, channel), clear_slack(own, rows, zero, lanes)]
        height, pitch, left = band.plane_height, band.pitch, geometry.x.before

        def place(at: Any) -> list[Any]:
            return [0, shifted(at[3], (at[1] * height + at[2]) * pitch + left)]

        _, *tables, output = self._kernel.params
        x_rows = self._kernel.params[0]
        given = dict(zip(tables, self.tables, strict=True))
        body = substitute(self._kernel.body, {x_rows: rows, **given})
        places: dict[Any, tuple[Any, Place]] = {output: (planes, place)}
        computed = moved(body, places)
        padded = _padding(geometry, band, planes, top, lanes)
        return [*laid, computed, padded, clear_slack(band, planes, zero, lanes)], [rows]


def _padding(
    geometry: ConvGeometry, band: ConvGeometry, planes: tirx.Buffer, top: Any, lanes: int
) -> tirx.Stmt:
    """Clear what planes hold beside the image, whose row `top` they begin with."""
    height, pitch, zero = band.plane_height, band.pitch, tirx.const(0, "int32")
    left, end = geometry.x.before, geometry.x.before + geometry.x.size

    def channel(c: Any) -> tirx.Stmt:
        def row(k: Any) -> tirx.Stmt:
            at, y = (c * height + k) * pitch, top + k
            beside = clear(planes, zero, at, left, lanes)
            beside += clear(planes, zero, at + end, pitch - end, lanes)
            inside = tirx.all(y >= 0, y < geometry.y.size)
            outside = in_sequence(clear(planes, zero, at, pitch, lanes))
            if not beside:
                return tirx.IfThenElse(tirx.Not(inside), outside, None)
            return tirx.IfThenElse(inside, in_sequence(beside), outside)

        return loop(height, row)

    return loop(band.channels, channel)
