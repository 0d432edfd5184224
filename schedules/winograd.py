"""Convolutions of few channels with fewer multiplications: minimal filtering along the rows.

m output rows of a filter of r rows need m + r - 1 products, not m * r (Winograd 1980; Lavin & Gray,
"Fast Algorithms for Convolutional Neural Networks", 2016, in one dimension here). Both sides are
polynomials, known by their values at m + r - 1 points: input rows and weights are mixed, once for
each point, the mixtures are convolved along x alone, and the output rows are mixtures of what comes
out. With a stride along y every phase of the rows has a filter of its own, whose products are
summed.

All work along x stays what it was, so vectors run over pixels as everywhere, and rows are mixed
vector by vector. For each point the mixtures of all phases and channels are the planes of a
convolution with one row of taps: one group of a planes kernel. A band of tiles goes through it
block of outputs by block of outputs, whose products at all points stay in level 1.

Stems gain: nobody prunes them, and with few channels there is little to mix. The points are 0, 1,
-1, 1/2, -1/2, 2, -2 and infinity, for which float32 sums are two to three times as far off as those
of the convolution itself. What is infinite or no number spreads to all rows of its tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.polynomial.polynomial import polyfromroots
from tvm import tirx

from ..layout import FloatArray
from ..planes import AxisGeometry, ConvGeometry
from .analysis import substitute
from .bands import Walk, walked
from .block_sparse import OUTPUT
from .followers import Follower
from .moves import in_sequence
from .pack_planes import clear_slack, lay_out, loop, vectors
from .placement import moved
from .problems import Bands, Epilogue
from .store_once import STORES_ONCE, store_freely

Matrix = npt.NDArray[np.float64]

# Each point but zero and infinity is followed by its negative, so that both share their sums.
_PAIRS = (1.0, 0.5, 2.0)
POINTS = 2 * len(_PAIRS) + 2


@lru_cache(maxsize=8)
def transforms(taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """For filters of `taps` rows: what mixes input rows, weights and products.

    [POINTS, POINTS], [POINTS, taps] and [POINTS + 1 - taps, POINTS]: output rows are
    ``third @ ((second @ weights) * (first @ inputs))``.
    """
    points = np.array([0.0] + [sign * point for point in _PAIRS for sign in (1, -1)])

    def values(terms: int) -> Matrix:
        """Of the powers below `terms`, at each point."""
        return np.vstack([points[:, None] ** np.arange(terms), np.arange(terms) == terms - 1])

    # The polynomials that are one at a point and zero at the others, and the one zero at all. The
    # points are sums of few powers of two, so zeros come out as zeros.
    inputs = np.zeros((POINTS, POINTS))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        inputs[i, :-1] = polyfromroots(others) / np.prod(point - others)
    inputs[-1] = polyfromroots(points)
    # Powers of two, so that nothing is rounded: weights take what would make inputs large.
    scale = 2.0 ** np.round(np.log2(np.abs(inputs).max(axis=1, keepdims=True)))
    return inputs / scale, values(taps) * scale, values(POINTS + 1 - taps).T


@dataclass(frozen=True)
class RowFilter:
    """A convolution as minimal filtering along its rows.

    Attributes:
        geometry: the convolution: one group, no dilation along y.
    """

    geometry: ConvGeometry

    @property
    def phases(self) -> int:
        """Phases of the rows, each with a filter of its own."""
        return len(self.geometry.y.phases)

    @property
    def taps(self) -> int:
        """Rows of the longest filter."""
        return -(-self.geometry.y.kernel // self.geometry.y.stride)

    @property
    def rows(self) -> int:
        """Output rows of a tile."""
        return POINTS + 1 - self.taps

    @property
    def columns(self) -> int:
        """Columns of the mixtures' weights: channels, phases and taps along x."""
        return self.geometry.channels * self.phases * self.geometry.x.kernel

    def blocks(self, outputs: int) -> list[int]:
        """The first output of each block of so many; the last block may overlap the one before."""
        last = self.geometry.outputs - outputs
        return [min(first, last) for first in range(0, self.geometry.outputs, outputs)]

    def mixed(self, tiles: int, outputs: int, unfolded: bool) -> ConvGeometry:
        """The convolution of the mixtures for `outputs` outputs: a group for each point.

        Its rows are tiles; its input channels and outputs go by points first.
        """
        g = self.geometry
        channels = POINTS * g.channels * self.phases
        y = AxisGeometry(tiles, 1)
        return ConvGeometry(1, channels, POINTS * outputs, y, g.x, POINTS, unfolded)

    def mix_weights(self, weight: FloatArray) -> FloatArray:
        """Of a weight [N, C, kh, kw] the mixtures, [points, N, C * phases * kw]."""
        n, c, height, width = weight.shape
        stride, taps = self.geometry.y.stride, self.taps
        padded = np.zeros((n, c, taps * stride, width))
        padded[:, :, :height] = weight
        by_phase = padded.reshape(n, c, taps, stride, width)[:, :, :, : self.phases]
        _, weights, _ = transforms(taps)
        found: FloatArray = np.einsum("pt,nctfk->pncfk", weights, by_phase).astype(np.float32)
        return found.reshape(POINTS, n, -1)


def winograd_kernel(
    kernel: tirx.PrimFunc,
    filter_: RowFilter,
    mixed: ConvGeometry,
    bands: Bands,
    lanes: int,
    epilogue: Epilogue,
    follower: Follower | None = None,
) -> tirx.PrimFunc:
    """A kernel for whole images from the one for the mixtures of a band.

    Args:
        kernel: the scheduled planes kernel of `mixed`, for one core, without an epilogue.
        filter_: the convolution.
        mixed: see `RowFilter.mixed`; its outputs are one block's.
        bands: so many rows as `mixed` has tiles, at most all of them.
        lanes: floats of a vector.
        epilogue: without a residual.
        follower: what each band does with its rows; its output is the kernel's then.

    Returns:
        The same kernel, but X is [batch, channels, height, width], Y is [batch, outputs, output
        height, output width] or the follower's, the tables are those of one block of outputs after
        the other (`indptr` in a row, `rows` and `bias` of one block only, and no bias), and the
        bias float32 [outputs] comes behind them.
    """
    if kernel.attrs.get(STORES_ONCE):
        kernel = store_freely(kernel)
    walk = _Walk(kernel, filter_, mixed, bands, lanes, epilogue, follower)
    return walked(walk)


class _Walk(Walk):
    """How the kernel of a band's mixtures walks the bands of an image."""

    def __init__(
        self,
        kernel: tirx.PrimFunc,
        filter_: RowFilter,
        mixed: ConvGeometry,
        bands: Bands,
        lanes: int,
        epilogue: Epilogue,
        follower: Follower | None,
    ) -> None:
        super().__init__(kernel, filter_.geometry, bands, lanes, follower)
        self.filter, self.mixed, self.epilogue = filter_, mixed, epilogue
        self.outputs = mixed.outputs // POINTS
        self.blocks = len(filter_.blocks(self.outputs))
        own = self.params["indptr"]
        self.segments = int(own.ty.shape[0]) - 1
        self.indptr = tirx.decl_buffer((self.blocks * self.segments + 1,), "int32", name="indptr")
        self.bias = tirx.decl_buffer((filter_.geometry.outputs,), "float32", name="bias_behind")
        self.more = [self.bias]

    @property
    def parameters(self) -> list[Any]:
        own = self.params["indptr"]
        return [self.indptr if param.same_as(own) else param for param in super().parameters]

    def _computed(
        self, n: Any, start: Any, first: Any, further: Any
    ) -> tuple[list[tirx.Stmt], list[Any]]:
        g, m = self.geometry, self.mixed
        rows = self._buffer("mixtures", (1, m.channels, m.y.size, g.x.size))
        planes = self._buffer("planes", (1, m.image_floats))
        products = self._buffer("products", tuple(map(int, self.params[OUTPUT].ty.shape)))
        zero = tirx.const(0, "int32")

        def channel(c: Any) -> tirx.Stmt:
            return in_sequence(lay_out(m, m, rows, planes, (zero, zero), c, self.lanes))

        def block(number: Any) -> tirx.Stmt:
            buffers = {self.params["X"]: planes, self.params[OUTPUT]: products}
            shift = number * self.segments
            places = {self.params["indptr"]: (self.indptr, lambda at: [at[0] + shift])}
            kernel = moved(substitute(self.kernel.body, buffers), places)
            return in_sequence([kernel, self._summed(products, number, n, start, first)])

        steps = [
            self._mixed(rows, n, first),
            loop(m.channels, channel),
            clear_slack(m, planes, zero, self.lanes),
            loop(self.blocks, block),
        ]
        return steps, [rows, planes, products]

    def _mixed(self, rows: Any, n: Any, first: Any) -> tirx.Stmt:
        """Mixtures of the input rows that the output rows from `first` on read."""
        g, phases, count = self.geometry, self.filter.phases, self.mixed.y.size
        channels, (inputs, _, _) = g.channels * phases, transforms(self.filter.taps)

        def stretch(i: Any) -> tirx.Stmt:
            t, channel = tirx.floordiv(i, channels), tirx.floormod(i, channels)
            c, phase = tirx.floordiv(channel, phases), tirx.floormod(channel, phases)
            top = (first + t * self.filter.rows) * g.y.stride + phase - g.y.before
            sources = [top + k * g.y.stride for k in range(POINTS)]

            def mix(load: Callable[[int, Any], Any]) -> tirx.Stmt:
                def pixel(at: Any) -> tirx.Stmt:
                    values = [load(k, at) for k in range(POINTS)]
                    return in_sequence(
                        [
                            tirx.BufferStore(rows, value, [0, p * channels + channel, t, at])
                            for p, value in enumerate(_mixtures(inputs, values))
                        ]
                    )

                return vectors(g.x.size, self.lanes, pixel)

            def inside(k: int, at: Any) -> Any:
                return tirx.BufferLoad(self.x, [n, c, sources[k], at])

            def anywhere(k: int, at: Any) -> Any:
                there = tirx.all(sources[k] >= 0, sources[k] < g.y.size)
                return tirx.if_then_else(there, inside(k, at), tirx.const(0, "float32"))

            whole = tirx.all(sources[0] >= 0, sources[-1] < g.y.size)
            return tirx.IfThenElse(whole, mix(inside), mix(anywhere))

        return loop(count * channels, stretch)

    def _summed(self, products: Any, number: Any, n: Any, start: Any, first: Any) -> tirx.Stmt:
        """The output rows of block `number` of the outputs, from the products at all points."""
        g, count = self.geometry, self.outputs
        _, _, sums = transforms(self.filter.taps)
        flat = len(products.ty.shape) == 3

        def stretch(i: Any) -> tirx.Stmt:
            row, t = tirx.floordiv(i, self.mixed.y.size), tirx.floormod(i, self.mixed.y.size)
            output = tirx.min(number * count, tirx.const(g.outputs - count, "int32")) + row

            def pixel(at: Any) -> tirx.Stmt:
                pixels = [t * g.x.output + at] if flat else [t, at]
                values = [
                    tirx.BufferLoad(products, [0, p * count + row, *pixels]) for p in range(POINTS)
                ]
                bias = tirx.BufferLoad(self.bias, [output])
                applied = [self.epilogue.apply(v, bias, None) for v in _sums(sums, values)]
                top = t * self.filter.rows
                return in_sequence(
                    [
                        self._stored(value, [0, output, top + k, at], (n, start, first))
                        for k, value in enumerate(applied)
                    ]
                )

            return vectors(g.x.output, self.lanes, pixel)

        return loop(count * self.mixed.y.size, stretch)

    def _stored(self, value: Any, at: list[Any], place: tuple[Any, Any, Any]) -> tirx.Stmt:
        """Store a pixel of the convolution, of the band at `place`: image, first rows."""
        n, start, first = place
        if self.rows is None:
            return tirx.BufferStore(self.y, value, [n, at[1], first + at[2], at[3]])
        return tirx.BufferStore(self.rows.buffer, value, self.rows.stored(start)(at))


def _mixtures(matrix: Matrix, values: Sequence[Any]) -> list[Any]:
    """Input rows mixed for each point: `matrix` times the values.

    For a point and its negative it is even terms plus odd ones, and even ones less odd ones.
    """
    found = []
    for p in range(POINTS):
        negative = 0 < p < POINTS - 1 and p % 2 == 0
        row = matrix[p - 1 if negative else p]
        even, odd = _sum(row[0::2], values[0::2]), _sum(row[1::2], values[1::2])
        if negative:
            found.append(even - odd)
        else:
            found.append(odd if even is None else even if odd is None else even + odd)
    return found


def _sums(matrix: Matrix, values: Sequence[Any]) -> list[Any]:
    """Products at all points summed for each output row: `matrix` times the values.

    Those of a point and its negative share a factor, but for the sign in every other row.
    """
    pairs = range(1, POINTS - 1, 2)
    both = [values[p] + values[p + 1] for p in pairs], [values[p] - values[p + 1] for p in pairs]
    return [
        _sum([*row[list(pairs)], row[0], row[-1]], [*both[k % 2], values[0], values[-1]])
        for k, row in enumerate(matrix)
    ]


def _sum(factors: Sequence[float] | Matrix, values: Sequence[Any]) -> Any:
    """The products' sum; None: all factors are zero."""
    found: Any = None
    for factor, value in zip(factors, values, strict=True):
        if factor != 0.0:
            term = value if factor == 1.0 else tirx.const(float(factor), "float32") * value
            found = term if found is None else found + term
    return found
