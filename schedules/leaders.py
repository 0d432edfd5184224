"""What a convolution in bands reads may be computed in the same bands (see `in_bands`).

The first convolutions of a network write large images, which leave level 2 before the next one lays
out its planes. Done band by band, each computes the few rows that a band reads, right into the
padded planes of the next: they are never written as a whole image, nor copied. Rows that the band
before has read, too, are still there, and move up.
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
from .pack_planes import clear, clear_slack, lay_out, loop, vectors
from .placement import Place, moved, shifted
from .problems import PlanesProblem, PlanesTile


@dataclass(frozen=True)
class Leader:
    """A convolution before the one in bands, which alone reads its output.

    Attributes:
        geometry: itself; it is not direct.
        problem: some of its rows, without residual: at least those that a band reads and the one
            before it does not, if these are to be computed once.
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
        further: Any,
        lanes: int,
    ) -> tuple[list[tirx.Stmt], list[tirx.Buffer]]:
        """Compute what a band of the convolution behind it reads into padded planes.

        Args:
            geometry: the convolution behind it: no strides, its planes not unfolded.
            band: the same for the rows of a band.
            x: its own input, [batch, channels, height, width].
            planes: [1, band.image_floats]; they hold what the band before has read.
            n: the number of the image.
            first: the first output row of the band.
            further: whether the planes hold the band that begins as many rows further up as it
                computes: the one before.
            lanes: floats of a vector.

        Returns:
            The statements, and the buffers that they need.
        """
        top, zero = first - geometry.y.before, tirx.const(0, "int32")
        own = self.geometry.band(self.problem.height)
        rows = tirx.decl_buffer((1, own.image_floats), "float32", name="planes_before")
        kept = band.plane_height - self.problem.height

        def computed(down: Any) -> tirx.Stmt:
            buffers, place = (x, rows, planes), (n, top, down)
            return in_sequence(self._computed(geometry, band, buffers, place, lanes))

        if kept == 0:
            return [computed(zero)], [rows]
        new, i = self.problem.height, tirx.Var("i", "int32")
        down = tirx.min(i * new, tirx.const(kept, "int32"))
        # Without a band before, all rows of this one are new, in several steps.
        steps = -(-band.plane_height // new)
        begin = tirx.Select(further, tirx.const(steps - 1, "int32"), zero)
        made = tirx.For(i, begin, steps - begin, tirx.ForKind.SERIAL, computed(down))
        moved_up = _moved_up(band, planes, new, kept, lanes)
        return [tirx.IfThenElse(further, moved_up, None), made], [rows]

    def _computed(
        self,
        geometry: ConvGeometry,
        band: ConvGeometry,
        buffers: tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer],
        place: tuple[Any, Any, Any],
        lanes: int,
    ) -> list[tirx.Stmt]:
        """Its rows into those of planes from a row `down` on.

        Args:
            geometry, band, lanes: as for `lay_out`.
            buffers: its input, planes of its own, and those that it writes.
            place: the number of the image, the row with which the planes begin, and `down`.
        """
        (x, rows, planes), (n, top, down) = buffers, place
        own, zero = self.geometry.band(self.problem.height), tirx.const(0, "int32")

        def channel(c: Any) -> tirx.Stmt:
            numbers, first = (n, zero), top + down
            return in_sequence(lay_out(self.geometry, own, x, rows, numbers, c, lanes, first))

        laid = [loop(own.channels, channel), clear_slack(own, rows, zero, lanes)]
        height, pitch, left = band.plane_height, band.pitch, geometry.x.before

        def placed(at: Any) -> list[Any]:
            return [0, shifted(at[3], (at[1] * height + (down + at[2])) * pitch + left)]

        _, *tables, output = self._kernel.params
        x_rows = self._kernel.params[0]
        given = dict(zip(tables, self.tables, strict=True))
        body = substitute(self._kernel.body, {x_rows: rows, **given})
        places: dict[Any, tuple[Any, Place]] = {output: (planes, placed)}
        count = self.problem.height
        return [
            *laid,
            moved(body, places),
            _padding(geometry, band, planes, top, down, count, lanes),
        ]


def _moved_up(
    band: ConvGeometry, planes: tirx.Buffer, by: int, count: int, lanes: int
) -> tirx.Stmt:
    """Move `count` rows of each plane up to its beginning, by so many rows."""
    height, pitch = band.plane_height, band.pitch

    def channel(c: Any) -> tirx.Stmt:
        at = c * height * pitch

        def moved_up(k: Any) -> tirx.Stmt:
            value = tirx.BufferLoad(planes, [0, at + by * pitch + k])
            return tirx.BufferStore(planes, value, [0, at + k])

        # No vector is longer than a row: the last one may overlap the one before.
        return vectors(count * pitch, min(lanes, pitch), moved_up)

    return loop(band.channels, channel)


def _padding(
    geometry: ConvGeometry,
    band: ConvGeometry,
    planes: tirx.Buffer,
    top: Any,
    first: Any,
    count: int,
    lanes: int,
) -> tirx.Stmt:
    """Clear what `count` rows of planes from `first` on hold beside the image, whose row `top` they
    begin with.
    """
    height, pitch, zero = band.plane_height, band.pitch, tirx.const(0, "int32")
    left, end = geometry.x.before, geometry.x.before + geometry.x.size

    def channel(c: Any) -> tirx.Stmt:
        def row(k: Any) -> tirx.Stmt:
            at, y = (c * height + first + k) * pitch, top + first + k
            beside = clear(planes, zero, at, left, lanes)
            beside += clear(planes, zero, at + end, pitch - end, lanes)
            inside = tirx.all(y >= 0, y < geometry.y.size)
            outside = in_sequence(clear(planes, zero, at, pitch, lanes))
            if not beside:
                return tirx.IfThenElse(tirx.Not(inside), outside, None)
            return tirx.IfThenElse(inside, in_sequence(beside), outside)

        return loop(count, row)

    return loop(band.channels, channel)
