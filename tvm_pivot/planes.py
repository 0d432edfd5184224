"""Channel planes: how a convolution becomes one matrix of offsets into zero-padded planes.

A stride s is s phases: padded row y lives in phase ``y % s``, at row ``y // s`` of that phase's
plane. Then every tap of every output pixel is a constant offset from the pixel's own position,
and k x k, strided, dilated and grouped convolutions differ in their offset tables only.

In such planes output rows have gaps. Unfolded along x (im2col, but for the taps of a column), each
column of taps has a plane of its own, whose rows are as long as the output's: pixels are adjacent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .layout import IntArray

# Floats of a cache line.
LINE_FLOATS = 16
# Floats behind the last plane: a tile that starts inside may read this far beyond the end.
SLACK = 256


@dataclass(frozen=True)
class Parts:
    """In how many stretches of rows images are stored: [batch * parts, channels, rows, columns].

    Or every plane of them begins with a cache line: [batch * parts, channels, aligned_floats]. What
    lies behind its pixels may be anything; no pixel depends on it.

    Attributes:
        read: those that a kernel reads.
        written: those that it writes, and of what it adds.
        read_aligned, written_aligned: whether their planes begin with cache lines.
    """

    read: int = 1
    written: int = 1
    read_aligned: bool = False
    written_aligned: bool = False


WHOLE = Parts()


def rows_of_part(rows: int, parts: int) -> int:
    """Rows that each part of an image has."""
    return -(-rows // parts)


def aligned_floats(pixels: int) -> int:
    """Floats from one plane of so many pixels to the next, where each begins with a cache line."""
    return -(-pixels // LINE_FLOATS) * LINE_FLOATS


@dataclass(frozen=True)
class AxisGeometry:
    """One spatial axis of a convolution.

    Attributes:
        size: input pixels.
        kernel: taps.
        stride, dilation: in pixels.
        before, after: zero padding, in pixels.
    """

    size: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def output(self) -> int:
        """Output pixels."""
        reach = (self.kernel - 1) * self.dilation + 1
        return (self.size + self.before + self.after - reach) // self.stride + 1

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """The phases that some tap reads."""
        return tuple(sorted({k * self.dilation % self.stride for k in range(self.kernel)}))

    @property
    def halo(self) -> int:
        """How far beyond its own position, in plane cells, the last tap reads."""
        return (self.kernel - 1) * self.dilation // self.stride

    def tap(self, k: int) -> tuple[int, int]:
        """(phase number, shift in plane cells) of tap k."""
        at = k * self.dilation
        return self.phases.index(at % self.stride), at // self.stride

    def filled(self, phase: int, cells: int) -> tuple[int, int]:
        """The range [first, end) of a phase's cells, out of `cells`, that hold input pixels."""
        first = -(-(self.before - phase) // self.stride)
        end = (self.size - 1 + self.before - phase) // self.stride + 1
        return max(first, 0), max(min(end, cells), max(first, 0))

    def source(self, phase: int, cell: int) -> int:
        """The input pixel in `cell` of `phase`."""
        return cell * self.stride + phase - self.before


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-d convolution's shape: input [batch, channels, y.size, x.size].

    Attributes:
        batch, channels, outputs: images, input channels, output channels.
        y, x: the two spatial axes.
        groups: channel groups.
        unfolded: along x: each column of taps has planes of its own.
    """

    batch: int
    channels: int
    outputs: int
    y: AxisGeometry
    x: AxisGeometry
    groups: int = 1
    unfolded: bool = False

    @property
    def direct(self) -> bool:
        """The input itself, as it lies in memory, is the planes: 1 x 1, no stride, no padding."""
        return all(a.kernel == 1 and a.stride == 1 and not a.before | a.after for a in self._axes)

    @property
    def _axes(self) -> tuple[AxisGeometry, AxisGeometry]:
        return self.y, self.x

    @property
    def pitch(self) -> int:
        """Distance of two rows in a plane, in floats.

        Without stride the zeros right of a row are those left of the next one.
        """
        if self.direct:
            return self.x.size
        if self.unfolded:
            return self.x.output
        if self.x.stride == 1:
            return max(self.x.size + max(self.x.before, self.x.after), self.x.output)
        return self.x.output + self.x.halo

    @property
    def plane_height(self) -> int:
        """Rows of one plane."""
        return self.y.output + self.y.halo

    @property
    def plane_starts(self) -> tuple[tuple[int, int], ...]:
        """What planes begin with in a row, side by side: (phase number, plane cell) along x."""
        if self.unfolded:
            return tuple(self.x.tap(k) for k in range(self.x.kernel))
        return tuple((phase, 0) for phase in range(len(self.x.phases)))

    @property
    def planes(self) -> int:
        """Planes of one image: channels x phases along y x `plane_starts`."""
        return self.channels * len(self.y.phases) * len(self.plane_starts)

    @property
    def image_floats(self) -> int:
        """Floats of one image's planes, the slack behind the last one included."""
        if self.direct:
            return self.channels * self.y.size * self.x.size
        return self.planes * self.plane_height * self.pitch + SLACK

    def band(self, rows: int) -> ConvGeometry:
        """The convolution for `rows` output rows of one image, given every input row they read."""
        height = (rows - 1) * self.y.stride + (self.y.kernel - 1) * self.y.dilation + 1
        return replace(self, batch=1, y=replace(self.y, size=height, before=0, after=0))

    def in_parts(self, parts: int) -> ConvGeometry:
        """The same with every image in so many stretches of output rows, the last one of which may
        reach beyond the image.

        They are images of their own, [batch * parts, channels, rows], with every input row they
        read.
        """
        if parts == 1:
            return self
        return replace(self.band(rows_of_part(self.y.output, parts)), batch=self.batch * parts)

    def aligned(self) -> ConvGeometry:
        """A direct convolution whose planes begin with cache lines: all of them are its pixels."""
        x = AxisGeometry(aligned_floats(self.y.size * self.x.size), 1)
        return replace(self, y=AxisGeometry(1, 1), x=x)

    def offsets(self, group: int = 0) -> IntArray:
        """Offset of each weight column of `group`: int32 [channels / groups * kh * kw]."""
        plane = self.plane_height * self.pitch
        per_group = self.channels // self.groups
        phase_y, shift_y = np.array([self.y.tap(k) for k in range(self.y.kernel)]).T
        taps = [self.x.tap(k) for k in range(self.x.kernel)]
        if self.unfolded:
            taps = [(k, 0) for k in range(self.x.kernel)]
        column, shift_x = np.array(taps).T
        channel = (group * per_group + np.arange(per_group))[:, None, None]
        at = (channel * len(self.y.phases) + phase_y[:, None]) * len(self.plane_starts) + column
        offset = at * plane + shift_y[:, None] * self.pitch + shift_x
        return np.asarray(offset.ravel(), dtype=np.int32)

    def lines(self, shared: bool = False) -> tuple[IntArray, IntArray, IntArray]:
        """Columns by the rows of planes that they read, all groups together; not if unfolded.

        Args:
            shared: columns that read a row at several places share a line: that of its beginning.

        Returns:
            Offset of each line, int32 [channels * y phases * kw], or of each plane: a place in a
            row of a plane, that of a pixel's own row. The line of each column, and how many rows
            further down the column reads: int32 [channels * kh * kw] each.
        """
        plane = self.plane_height * self.pitch
        phase_y, shift_y = np.array([self.y.tap(k) for k in range(self.y.kernel)]).T
        phase_x, shift_x = np.array([self.x.tap(k) for k in range(self.x.kernel)]).T
        rows, channel = len(self.y.phases), np.arange(self.channels)[:, None, None]
        if shared:
            first = np.arange(self.planes) * plane
            line = (channel * rows + phase_y[:, None]) * len(self.x.phases) + phase_x
        else:
            at = (channel * rows + np.arange(rows)[:, None]) * len(self.x.phases) + phase_x
            first = at * plane + shift_x
            line = (channel * rows + phase_y[:, None]) * self.x.kernel + np.arange(self.x.kernel)
        down = np.broadcast_to(shift_y[:, None], line.shape)
        found = (first, line, down)
        offset, line, down = (np.asarray(part.ravel(), dtype=np.int32) for part in found)
        return offset, line, down

    def shifts(self) -> IntArray:
        """How far right of its own pixel each column reads, in plane cells: int32 [columns]."""
        shift = np.array([self.x.tap(k)[1] for k in range(self.x.kernel)], np.int32)
        return np.tile(shift, self.channels // self.groups * self.y.kernel)
