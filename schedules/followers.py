"""What a convolution in bands does with its rows while they are in level 2 (see `in_bands`).

A max pooling or a depthwise convolution reads, for each of its rows, a few rows of what lies before
it. Done band by band, it finds them in the cache, and they are never written as a whole image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..planes import AxisGeometry
from .analysis import substitute
from .block_sparse import OUTPUT
from .depthwise import depthwise_kernel
from .depthwise_tiles import DepthwiseProblem, DepthwiseTile
from .max_pool import RowMaximum
from .moves import in_sequence
from .pack_planes import loop, vectors
from .placement import Place, moved, shifted
from .problems import Epilogue


@dataclass(frozen=True)
class Follower(ABC):
    """An operation on every channel by itself, row by row.

    Attributes:
        y: its rows; `size` is those of the convolution.
        x: its columns.
    """

    y: AxisGeometry
    x: AxisGeometry

    def rows_of(self, outputs: int) -> int:
        """Rows that so many output rows next to each other are made of, padding included."""
        return (outputs - 1) * self.y.stride + (self.y.kernel - 1) * self.y.dilation + 1

    def outputs_of(self, rows: int) -> int:
        """How many output rows next to each other so many rows are enough for."""
        reach = (self.y.kernel - 1) * self.y.dilation + 1
        return min((rows - reach) // self.y.stride + 1, self.y.output)

    def below(self, rows: int) -> int:
        """How many of the last rows that there may be at a time are below the image."""
        first = (self.y.output - self.outputs_of(rows)) * self.y.stride - self.y.before
        return max(0, first + rows - self.y.size)

    @property
    def tables(self) -> list[tirx.Buffer]:
        """Parameters that it adds to the kernel's tables."""
        return []

    @abstractmethod
    def write(
        self, band: BandRows, tables: list[tirx.Buffer], out: tirx.Buffer, n: Any, start: Any
    ) -> tuple[tirx.Stmt, list[tirx.Buffer]]:
        """Compute the output rows from `start` on of image `n` out of a band, and what it needs.

        Args:
            band: the rows.
            tables: its own, see `tables`.
            out: [batch, channels, y.output, x.output].
            n: the number of the image.
            start: the first output row.
        """


class BandRows:
    """The rows of a band, channel by channel, with room for those above and below the image.

    The rows that the follower reads begin at row `margin`.
    """

    def __init__(
        self, follower: Follower, channels: int, rows: int, width: int, flat: bool
    ) -> None:
        self.follower, self.channels, self.rows, self.width = follower, channels, rows, width
        self.outputs = follower.outputs_of(rows)
        self.margin, self.flat = follower.below(rows), flat
        height = self.margin + rows + follower.y.before
        shape = (1, channels, height * width) if flat else (1, channels, height, width)
        self.buffer = tirx.decl_buffer(shape, "float32", name="band")

    def top(self, start: Any) -> Any:
        """The first row that the output rows from `start` on read; it may lie above the image."""
        return start * self.follower.y.stride - self.follower.y.before

    def first(self, start: Any) -> Any:
        """The first row of the image that is computed for them."""
        last = tirx.const(self.follower.y.size - self.rows, "int32")
        return tirx.max(tirx.min(self.top(start), last), 0)

    def at(self, channel: Any, row: Any, column: Any) -> list[Any]:
        """The indices of a pixel: its row counts from the beginning of the buffer."""
        if self.flat:
            return [0, channel, shifted(column, row * self.width)]
        return [0, channel, row, column]

    def stored(self, start: Any) -> Place:
        """Where the convolution's output goes."""
        down = self.first(start) - self.top(start) + self.margin
        if self.flat:
            return lambda at: self.at(at[1], down, at[2])
        return lambda at: self.at(at[1], down + at[2], at[3])

    def cleared(self, start: Any, lanes: int) -> list[tirx.Stmt]:
        """Zeros for the rows above and below the image."""
        zero = tirx.const(0.0, "float32")

        def row(number: int) -> tirx.Stmt:
            def channel(c: Any) -> tirx.Stmt:
                return vectors(
                    self.width,
                    lanes,
                    lambda at: tirx.BufferStore(self.buffer, zero, self.at(c, number, at)),
                )

            return loop(self.channels, channel)

        top, size = self.top(start), self.follower.y.size
        above = [
            tirx.IfThenElse(top + k < 0, row(self.margin + k), None)
            for k in range(self.follower.y.before)
        ]
        below = [
            tirx.IfThenElse(top + k >= size, row(self.margin + k), None)
            for k in range(self.rows - self.margin, self.rows)
        ]
        return [*above, *below]


@dataclass(frozen=True)
class Pool(Follower):
    """A max pooling (see `RowMaximum`) in vectors of `lanes` floats."""

    lanes: int

    def write(
        self, band: BandRows, tables: list[tirx.Buffer], out: tirx.Buffer, n: Any, start: Any
    ) -> tuple[tirx.Stmt, list[tirx.Buffer]]:
        maximum = RowMaximum(self.y, self.x, self.lanes, band.outputs)
        rows, up = maximum.buffer(), band.margin - band.top(start)

        def plane(c: Any) -> tirx.Stmt:
            return maximum.write(
                rows,
                lambda row, at: tirx.BufferLoad(band.buffer, band.at(c, row + up, at)),
                lambda row, at, value: tirx.BufferStore(out, value, [n, c, row, at]),
                start,
            )

        return in_sequence([maximum.clear(rows), loop(band.channels, plane)]), [rows]


@dataclass(frozen=True)
class Depthwise(Follower):
    """A depthwise convolution (see `depthwise_kernel`) with as many channels as before it.

    Attributes:
        channels: its own.
        epilogue: what is fused behind it, but no residual.
        tile: of its kernel, for a band of the most rows.
    """

    channels: int
    epilogue: Epilogue
    tile: DepthwiseTile

    @property
    def tables(self) -> list[tirx.Buffer]:
        shapes = {
            "taps": (self.channels, self.y.kernel * self.x.kernel),
            "bias_behind": (self.channels,),
        }
        return [tirx.decl_buffer(shape, "float32", name=name) for name, shape in shapes.items()]

    def problem(self, rows: int) -> DepthwiseProblem:
        """What a band of so many rows is to its kernel: an image without padding below or above."""
        y = AxisGeometry(rows, self.y.kernel, self.y.stride, self.y.dilation)
        return DepthwiseProblem(1, self.channels, self.channels, y, self.x, self.epilogue)

    def write(
        self, band: BandRows, tables: list[tirx.Buffer], out: tirx.Buffer, n: Any, start: Any
    ) -> tuple[tirx.Stmt, list[tirx.Buffer]]:
        kernel = depthwise_kernel(self.problem(band.rows), self.tile)
        params = {str(param.name): param for param in kernel.params}
        own = dict(zip(("weight", "bias"), tables, strict=True))
        places: dict[Any, tuple[Any, Place]] = {
            params["X"]: (band.buffer, lambda at: band.at(at[1], band.margin + at[2], at[3])),
            params[OUTPUT]: (out, lambda at: [n, at[1], start + at[2], at[3]]),
        }
        body = substitute(kernel.body, {params[name]: table for name, table in own.items()})
        steps = [*band.cleared(start, self.tile.lanes), moved(body, places)]
        return in_sequence(steps), []
