"""What the block-sparse kernels are made for: layers as they see them, and points of their schedule
space. Equal records share one compiled kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tvm import te, tirx

from ..planes import SLACK
from .row_sum import chains_of

# Floats of a vector that a machine stores under a mask as fast as whole: with AVX-512, not before.
MASKED_LANES = 16
# Columns that two bytes tell apart.
SHORT_COLUMNS = 1 << 16


@dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator before it is stored: + bias, + residual, then clip.

    `low` and `high` bound the result (ReLU is ``low=0``, ReLU6 ``low=0, high=6``).
    """

    residual: bool = False
    low: float | None = None
    high: float | None = None

    def apply(self, value: Any, bias: Any | None, residual: Any | None) -> Any:
        """The output for a sum and its operands; None: it is in there already, or there is none."""
        if bias is not None:
            value = value + bias
        if residual is not None:
            value = value + residual
        if self.low is not None:
            value = te.max(value, tirx.const(self.low, str(value.ty)))
        if self.high is not None:
            value = te.min(value, tirx.const(self.high, str(value.ty)))
        return value


@dataclass(frozen=True)
class PlanesProblem:
    """A layer as the planes kernel sees it; equal problems share one compiled kernel.

    Attributes:
        batch: images.
        image_floats: floats of one image in the input planes.
        columns: columns K of the weight matrix (an upper bound of entries per row block).
        rows: rows N of the weight matrix, the output channels.
        row_blocks: row blocks of the packed weight.
        block_rows: R.
        height, width: output pixels.
        pitch: distance of two output rows in the input planes; ``width`` if they are adjacent.
        epilogue: what is fused behind the sum.
        taps: columns that read one channel of the input.
        groups: channel groups; every row block reads the channels of one.
        lines: places in a channel, as far apart as that is not by whole rows, that its taps read.
        reach: rows below its own that the lowest tap reads.
        planes: planes of a channel.
        shifts: columns right of its own that the farthest tap reads.
    """

    batch: int
    image_floats: int
    columns: int
    rows: int
    row_blocks: int
    block_rows: int
    height: int
    width: int
    pitch: int
    epilogue: Epilogue
    taps: int = 1
    groups: int = 1
    lines: int = 1
    reach: int = 0
    planes: int = 1
    shifts: int = 0

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.columns // self.taps

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def compact(self) -> bool:
        """Output pixels are adjacent in the planes: no gaps between output rows."""
        return self.pitch == self.width

    @property
    def plane_rows(self) -> int:
        """Rows of all planes of an image, where output rows have gaps."""
        return (self.image_floats - SLACK) // self.pitch

    def band(self, rows: int) -> PlanesProblem:
        """The layer for `rows` output rows of one image; see `ConvGeometry.band`."""
        planes = self.plane_rows // (self.height + self.reach)
        floats = planes * (rows + self.reach) * self.pitch + SLACK
        return replace(self, batch=1, image_floats=floats, height=rows)

    @property
    def output(self) -> tuple[int, ...]:
        """The output's shape: [batch, rows, pixels], with two pixel axes where rows have gaps."""
        pixels = (self.pixels,) if self.compact else (self.height, self.width)
        return (self.batch, self.rows, *pixels)


@dataclass(frozen=True)
class PlanesTile:
    """One point of the planes kernel's schedule space.

    Attributes:
        lanes: floats per vector.
        vectors: P, vectors of accumulators per row.
        tiles: register tiles per group; a group's tiles reuse one row block's weights.
        group_rows: output rows per group (1 where the output is compact).
        parallel: run groups x row blocks on all cores.
        k_tiles: tiles of the weight's columns.
        stretches: where all row blocks of a task walk one column tile after the other, stretches of
            row blocks that are tasks of their own.
        panel_pitch: copy the inputs of a column tile together, in rows of so many floats; the
            index then counts these rows, and the kernel takes the lines' offsets. 0: no copy. Rows
            shorter than the output's cut it across, too: a group is then a rectangle of pixels.
        weight_lanes: weights that one load brings, for a machine that multiplies by a lane of a
            register; 0: each is loaded and broadcast by itself.
        entries: with `weight_lanes`, entries whose operands are loaded before any is multiplied; if
            more than one, in assembly for 64-bit ARM.
        ahead: prefetch the weights of so many entries further on, without `weight_lanes`; 0: not
            at all.
        slides: with a panel, the layer's `shifts`: the taps of a row share a line, and the sums
            slide by a column between the runs of taps that are so far apart (see `sliding_sums`).
            0: every tap reads a line of its own, so that all of them read aligned vectors, too.
        inputs_ahead: prefetch the inputs of so many entries further on; 0: not at all.
        singles: where the output is compact, pixels that a register tile has beside those of its
            vectors (see `single_pixels`): together they are those behind the last whole tile.
    """

    lanes: int
    vectors: int
    tiles: int
    group_rows: int
    parallel: bool
    k_tiles: int = 1
    stretches: int = 1
    panel_pitch: int = 0
    weight_lanes: int = 0
    entries: int = 1
    ahead: int = 0
    slides: int = 0
    inputs_ahead: int = 0
    singles: int = 0

    @property
    def width(self) -> int:
        return self.lanes * self.vectors

    def within_rows(self, problem: PlanesProblem) -> bool:
        """Output rows have gaps, but no register tile crosses one: the last one of a row overlaps.

        Elsewhere a strip of output rows is computed, gaps and all, and squeezed.
        """
        if problem.compact or self.group_rows > 1 or self.width > problem.width:
            return False
        if self.across(problem) > 1 or self.slides:
            return False
        return not self.panel or problem.width % self.width == 0

    def across(self, problem: PlanesProblem) -> int:
        """Groups side by side that cover the output's rows; more than 1 only with a panel.

        In a panel as wide as the planes, sums slide from row to row: what a row's last pixels read
        beyond it is the padding before the next one.
        """
        if problem.compact or not self.panel or self.panel_pitch == problem.pitch:
            return 1
        return -(-problem.width // self._panel_columns)

    def whole(self, problem: PlanesProblem) -> int:
        """Where the output is compact, the pixels that register tiles have in their vectors."""
        pixels = self.groups(problem) * self.tiles * self.width
        return pixels if self.singles else problem.pixels

    @property
    def _panel_columns(self) -> int:
        """Output pixels of a row of the panel: sums that slide leave the last ones behind."""
        return self.panel_pitch - self.slides

    def groups(self, problem: PlanesProblem) -> int:
        """Groups of pixels that cover an image's output; the last ones may overlap others."""
        if problem.compact:
            return -(-problem.pixels // (self.tiles * (self.width + self.singles)))
        return -(-problem.height // self.group_rows) * self.across(problem)

    def last(self, problem: PlanesProblem) -> int:
        """Vectors of a group's last register tile (see `last_tile`)."""
        cut = self.k_tiles > 1 or self.panel or self.weight_lanes or problem.block_rows == 1
        if cut or self.tiles == 1 or (problem.compact and self.groups(problem) > 1):
            return self.vectors
        pixels = problem.pixels
        if not problem.compact:
            rows_before = 0 if self.within_rows(problem) else self.group_rows - 1
            pixels = rows_before * problem.pitch + problem.width
        needed = -(-pixels // self.lanes) - (self.tiles - 1) * self.vectors
        return max(1, min(needed, self.vectors))

    def group_floats(self, problem: PlanesProblem) -> int:
        """Floats of a plane that a group's own rows take, gaps between output rows included."""
        if problem.compact or self.across(problem) > 1:
            return self.tiles * self.width
        return self.group_rows * problem.pitch

    def columns(self, problem: PlanesProblem) -> int:
        """Output pixels of a group's rows, where rows have gaps."""
        return problem.width if self.across(problem) == 1 else self._panel_columns

    def line_floats(self, problem: PlanesProblem) -> int:
        """Floats, or a part of so many, after which all begins that entries read."""
        if self.panel:
            return self.panel_pitch
        return problem.pixels if problem.compact and problem.taps == 1 else 1

    @property
    def panel(self) -> bool:
        return self.panel_pitch > 0

    def unroll(self, problem: PlanesProblem) -> int:
        """Entries of a step; every run is padded to whole steps."""
        alone = problem.block_rows == 1 and not self.weight_lanes
        return chains_of(self.vectors) if alone else 1

    def carries(self, problem: PlanesProblem) -> bool:
        """Indices are held from row block to row block: their entries are walked once, in turn."""
        alone = problem.block_rows == 1 and not self.weight_lanes
        return alone and self.tiles == 1 and (self.panel or self.k_tiles > 1)

    @property
    def runs(self) -> int:
        """Runs of a row block's entries in a K tile."""
        return self.slides + 1

    def masked(self, problem: PlanesProblem) -> bool:
        """The last vector of the pixels, or the one of a row, is stored in part, under a mask."""
        if problem.compact:
            return self.tiles * self.width > problem.pixels
        return self.slides > 0 and self.panel_pitch == self.lanes == MASKED_LANES

    @property
    def in_assembly(self) -> bool:
        """The ragged sum is a function in assembly, and begins at the bias (see `neon_sum`)."""
        return self.entries > 1


@dataclass(frozen=True)
class Bands:
    """How an image is cut into bands (see `in_bands`).

    Attributes:
        rows: output rows of a band.
        parallel: bands share all cores.
        stretches: of an image's bands, where each builds on the one before it: one task for each.
    """

    rows: int
    parallel: bool
    stretches: int = 1


@dataclass(frozen=True)
class Panel:
    """The copied inputs of one column tile: `lines` of some channels, each `height` rows.

    Where output pixels are adjacent, every column is a line of one row. Elsewhere a line holds the
    rows that taps read which differ by whole rows only, so that all of them start at a vector. For
    sums that slide, it holds a plane's rows; where these are shorter than a vector, there are
    copies of it that begin so many rows further down, for the taps of rows in the middle of one.
    """

    problem: PlanesProblem
    tile: PlanesTile

    @property
    def reach(self) -> int:
        """Rows of a line that the lowest tap starts below the highest one."""
        return 0 if self.problem.compact else self.problem.reach // self.copies * self.copies

    @property
    def copies(self) -> int:
        """Lines that hold the same rows."""
        lanes, pitch = self.tile.lanes, self.tile.panel_pitch
        return lanes // math.gcd(lanes, pitch) if self.tile.slides else 1

    @property
    def lines(self) -> int:
        """Lines of a channel."""
        if self.problem.compact:
            return self.problem.taps
        lines = self.problem.planes if self.tile.slides else self.problem.lines
        return lines * self.copies

    @property
    def height(self) -> int:
        """Rows of a line."""
        return self.reach + -(-self.tile.tiles * self.tile.width // self.tile.panel_pitch)

    @property
    def channels(self) -> int:
        """Channels of a column tile."""
        return -(-self.problem.channels // self.tile.k_tiles)

    @property
    def rows(self) -> int:
        """Rows of the panel."""
        return self.channels * self.lines * self.height


@dataclass(frozen=True)
class RowsProblem:
    """A layer as the rows (matrix-vector) kernel sees it.

    Attributes:
        inputs: input rows M, few.
        columns: K.
        rows: N.
        row_blocks: row blocks or slices.
        block_rows: R, rows per block, which is also the vector's length.
        own_columns: each row of a block has columns of its own (`SlicedWeight`).
        epilogue: what is fused behind the sum.
        window: with own columns, vectors of the input that hold all columns of a step; 0: they
            may lie anywhere.
    """

    inputs: int
    columns: int
    rows: int
    row_blocks: int
    block_rows: int
    own_columns: bool
    epilogue: Epilogue
    window: int = 0

    @property
    def index_dtype(self) -> str:
        """What holds a column: the less the kernel reads, the faster it is."""
        if self.window:
            return "uint8"
        return "uint16" if self.columns <= SHORT_COLUMNS else "int32"

    @property
    def output(self) -> tuple[int, ...]:
        """The output's shape: [inputs, rows]."""
        return (self.inputs, self.rows)


@dataclass(frozen=True)
class RowsTile:
    """One point of the rows kernel's schedule space.

    Attributes:
        unroll: entries per step.
        parallel: run the row blocks on all cores.
        ahead: prefetch the weights of so many entries further on; 0: not at all.
    """

    unroll: int
    parallel: bool
    ahead: int = 0
