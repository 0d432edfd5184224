"""Kernels that read images: they lay out the planes of some output rows at a time.

The planes of a large image do not fit the level-2 cache, and the planes kernel reads them in the
order of its columns, which no prefetcher can follow. A band of output rows reads few rows of the
image. These are copied, channel by channel, to planes that stay in level 2 while all row blocks
use them; the padding is added on the way, and no planes of the whole image are ever written.

What such a band computes may be worked on while it is in level 2, too (see `followers`). Then a
convolution that reads the image as it is goes band by band as well, without a copy. And what a band
reads may be computed for it (see `leaders`).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import WHOLE, ConvGeometry, Parts, rows_of_part
from .analysis import substitute
from .block_sparse import OUTPUT
from .followers import BandRows, Follower
from .isolated_tasks import isolated
from .leaders import Leader
from .moves import few_tasks, in_sequence
from .pack_planes import begin_of, clear_slack, lay_out, loop, stored_shape
from .placement import Place, moved, shifted
from .problems import Bands
from .store_once import STORES_ONCE, store_freely


def in_bands(
    kernel: tirx.PrimFunc,
    geometry: ConvGeometry,
    bands: Bands,
    lanes: int,
    follower: Follower | None = None,
    parts: Parts = WHOLE,
    leader: Leader | None = None,
) -> tirx.PrimFunc:
    """A kernel for whole images from the one for a band.

    Args:
        kernel: the scheduled planes kernel for ``bands.rows`` output rows of one image, for one
            core. Where the convolution is direct, a band is a stretch of pixels.
        geometry: the convolution.
        bands: at most all output rows. The last band ends with the image.
        lanes: floats of a vector.
        follower: what each band does with its rows; its output is the kernel's then. A direct
            convolution has one.
        parts: how X, and how Y and the residual hold the images. Where they are not whole the
            convolution is not direct, and nothing follows.
        leader: what computes the rows that a band reads; its input is the kernel's then. Images
            are whole, and the convolution is not direct.

    Returns:
        The same kernel, but X is [batch, channels, height, width], and Y and the residual are
        [batch, outputs, output height, output width], or parts of these; those of a direct
        convolution are as they are in its kernel for whole images. Tables of the follower come
        behind its own, and those of the leader behind these.
    """
    rows = rows_of_part(geometry.y.output, parts.written)
    if kernel.attrs.get(STORES_ONCE) and (follower or rows % bands.rows):
        kernel = store_freely(kernel)
    return walked(Walk(kernel, geometry, bands, lanes, follower, parts, leader))


def walked(walk: Walk) -> tirx.PrimFunc:
    """The kernel for whole images that walks them so."""
    kind = tirx.ForKind.PARALLEL if walk.bands.parallel else tirx.ForKind.SERIAL
    tasks = loop(walk.geometry.batch * walk.parts * walk.tasks, walk.task, kind)
    root = SBlock([], [], [], "root", few_tasks(tasks))
    body = SBlockRealize([], tirx.const(True, "bool"), root)
    return tirx.PrimFunc(walk.parameters, body, walk.kernel.ret_type, walk.kernel.attrs)


class Walk:
    """How a kernel walks the bands of an image."""

    def __init__(
        self,
        kernel: tirx.PrimFunc,
        geometry: ConvGeometry,
        bands: Bands,
        lanes: int,
        follower: Follower | None,
        parts: Parts = WHOLE,
        leader: Leader | None = None,
    ) -> None:
        g, self.parts = geometry, parts.written
        self.kernel, self.geometry, self.lanes, self.follower = kernel, g, lanes, follower
        self.params = {str(param.name): param for param in kernel.params}
        self.dtype = self.params["X"].ty.dtype
        self.bands, self.band = bands, None if g.direct else g.band(bands.rows)
        self.rows: BandRows | None = None
        rows = rows_of_part(g.y.output, self.parts)
        shape = (g.batch * self.parts, g.outputs, rows, g.x.output)
        residual = (*shape[:2], g.y.output * g.x.output) if g.direct else shape
        self.step, self.total = bands.rows, rows
        if follower is not None:
            self.rows = BandRows(follower, g.outputs, bands.rows, g.x.output, g.direct)
            self.step, self.total = self.rows.outputs, follower.y.output
            shape = (*shape[:2], follower.y.output, follower.x.output)
        self.leader = leader
        image = stored_shape(g if leader is None else leader.geometry, parts.read)
        self.x = self._buffer("X", (g.batch, g.image_floats) if g.direct else image)
        self.y = self._buffer(OUTPUT, shape)
        self.residual = self._buffer("residual", residual)
        self.tables = [] if follower is None else follower.tables
        self.tables_before = [] if leader is None else leader.tables
        self.more: list[Any] = []

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Any:
        return tirx.decl_buffer(shape, self.dtype, name=name)

    @property
    def count(self) -> int:
        """Bands of a part of an image."""
        return -(-self.total // self.step)

    @property
    def tasks(self) -> int:
        """Tasks of a part of an image."""
        return self.count if self.leader is None else min(self.count, self.bands.stretches)

    @property
    def parameters(self) -> list[Any]:
        """The kernel's parameters for whole images."""
        mine = {"X": self.x, "residual": self.residual, OUTPUT: self.y}
        params = [mine.get(name, param) for name, param in self.params.items()]
        last = 2 if "residual" in self.params else 1
        more = [*self.more, *self.tables, *self.tables_before]
        return [*params[:-last], *more, *params[-last:]]

    def task(self, t: Any) -> SBlockRealize:
        """Task `t` of all parts: a band, or a stretch of them with a leader."""
        n, number = tirx.floordiv(t, self.tasks), tirx.floormod(t, self.tasks)
        if self.leader is None:
            steps, buffers = self._band(n, number)
        else:
            begin = tirx.floordiv(number * self.count, self.tasks)
            end = tirx.floordiv((number + 1) * self.count, self.tasks)
            b, zero = tirx.Var("b", "int32"), tirx.const(0, "int32")
            up = self._first(self._start(begin + b)) - self._first(self._start(begin + b - 1))
            further = tirx.all(b > 0, tirx.EQ(up, self.leader.problem.height))
            done, buffers = self._band(n, begin + b, further)
            bands = tirx.For(b, zero, end - begin, tirx.ForKind.SERIAL, in_sequence(done))
            # The slack is cleared in front of the loop, so that TVM does not give each band planes
            # of its own. In the loop LLVM would keep values in registers that the sums need.
            assert self.band is not None
            steps = [clear_slack(self.band, buffers[0], zero, self.lanes), isolated(bands)]
        block = SBlock([], [], [], "band", in_sequence(steps), alloc_buffers=buffers)
        return SBlockRealize([], tirx.const(True, "bool"), block)

    def _band(self, n: Any, number: Any, further: Any = False) -> tuple[list[tirx.Stmt], list[Any]]:
        """A band of part `n`, and buffers for that; for the rest see `Leader.lay_out`."""
        start = self._start(number)
        steps, buffers = self._computed(n, start, self._first(start), further)
        if self.rows is not None and self.follower is not None:
            written, more = self.follower.write(self.rows, self.tables, self.y, n, start)
            steps.append(written)
            buffers += [self.rows.buffer, *more]
        return steps, buffers

    def _start(self, number: Any) -> Any:
        """The first row of the kernel's output that a band makes."""
        start = number * self.step
        if self.total % self.step:
            start = tirx.min(start, tirx.const(self.total - self.step, "int32"))
        return start

    def _first(self, start: Any) -> Any:
        """The first row of the convolution that is computed for that."""
        return start if self.rows is None else self.rows.first(start)

    def _computed(
        self, n: Any, start: Any, first: Any, further: Any
    ) -> tuple[list[tirx.Stmt], list[Any]]:
        """The convolution's rows from `first` on, and buffers for that."""
        g, width = self.geometry, self.geometry.x.output

        def placed(at: Any) -> list[Any]:
            if g.direct:
                return [n, at[1], shifted(at[2], first * width)]
            return [n, at[1], first + at[2], at[3]]

        output: tuple[Any, Place] = (self.y, placed)
        if self.rows is not None:
            output = (self.rows.buffer, self.rows.stored(start))
        places: dict[Any, tuple[Any, Place]] = {self.params[OUTPUT]: output}
        if "residual" in self.params:
            places[self.params["residual"]] = (self.residual, placed)
        if self.band is None:
            places[self.params["X"]] = (self.x, lambda at: [n, shifted(at[1], first * width)])
            return [moved(self.kernel.body, places)], []
        planes = self._buffer("planes", (1, self.band.image_floats))
        body = moved(substitute(self.kernel.body, {self.params["X"]: planes}), places)
        if self.leader is None:
            return [*self._laid_out(self.band, planes, n, first), body], [planes]
        where = (self.x, planes, n, first, further)
        steps, buffers = self.leader.lay_out(g, self.band, *where, self.lanes)
        return [*steps, body], [planes, *buffers]

    def _laid_out(self, band: ConvGeometry, planes: Any, n: Any, first: Any) -> list[tirx.Stmt]:
        """The planes of the output rows from `first` on of part `n`."""
        zero = tirx.const(0, "int32")
        image, begin = begin_of(self.geometry, self.parts, n)
        numbers, row = (image, zero), begin + first

        def channel(c: Any) -> tirx.Stmt:
            laid = lay_out(self.geometry, band, self.x, planes, numbers, c, self.lanes, row)
            return in_sequence(laid)

        return [loop(band.channels, channel), clear_slack(band, planes, zero, self.lanes)]
