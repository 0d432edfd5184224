"""TE computes of the block-sparse kernel family.

Planes form: activations are channel planes, one flat row of floats per image in which every
channel (and stride phase) is a plane. A weight entry names the offset of its plane, and a kernel
tap is a shifted offset, so dense, 1x1, k x k, strided, dilated and grouped layers are one compute:

    acc[b, r, q] = sum over p of  weight[e, r] * X[index[e] + start(tile) + q],  e = indptr[b] + p

The columns may be cut into tiles whose inputs stay in level 1 while all row blocks walk them; the
accumulators rest in a buffer between two tiles (see `carried_sums`). A tile's inputs may also be
copied first, into a panel of aligned vectors: loads that straddle cache lines cost twice, and
planes that are a power of two apart evict each other.

Rows form, for few input rows (matrix-vector): the vector runs over the R rows of a block, or over
R rows with columns of their own, and only kept weights are read. Where a step's columns lie in a
window, a lookup in registers gathers them (see `lookup`).

TE needs constant extents, so `p` runs to the longest possible row block while a function is
scheduled; `finish` (in block_sparse_moves) then gives that loop its own length per row block and
puts the output where it belongs, which `Kernel.place` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from .core_costs import INPUTS_AHEAD
from .problems import Panel, PlanesProblem, PlanesTile, RowsProblem, RowsTile
from .row_sum import AHEAD

# Indices behind the last one that a kernel may read.
BEYOND = max(AHEAD, INPUTS_AHEAD)
OUTPUT = "Y"
STRIP = "strip"
PANEL = "panel"
Index = Sequence[Any]


@dataclass(frozen=True)
class Kernel:
    """An unscheduled kernel.

    Attributes:
        func: the TE function; its last parameter is the output in the order of computation.
        shape: the output's real shape.
        place: from the table of output rows and an index of computation, the real index.
        segment: from the axes of the sum, by name, the place of its row block in `indptr`.
        walked: axes of an index of computation in front of those that one task's sums have.
    """

    func: tirx.PrimFunc
    shape: tuple[int, ...]
    place: Callable[[Any, Index], list[Any]]
    segment: Callable[[Mapping[str, Any]], Any]
    walked: int = 0


def _tables(
    blocks: int,
    rows: int,
    own_columns: bool = False,
    segments: int = 1,
    window: int = 0,
    dtype: str = "float32",
    index_dtype: str = "int32",
) -> dict[str, Any]:
    nnz, indices = te.var("nnz", "int32"), te.var("indices", "int32")
    index_shape = (nnz, rows) if own_columns else (indices,)
    tables = {
        "indptr": te.placeholder((segments * blocks + 1,), "int32", name="indptr"),
        "index": te.placeholder(index_shape, index_dtype, name="index"),
        "weight": te.placeholder((nnz, rows), dtype, name="weight"),
        "rows": te.placeholder((blocks * rows,), "int32", name="rows"),
        "bias": te.placeholder((blocks * rows,), dtype, name="bias"),
    }
    if window:
        tables["starts"] = te.placeholder((nnz,), "int32", name="starts")
    return tables


def _stretch(i: Any, step: int, total: int, count: int | None = None) -> Any:
    """Start of stretch i of length `step`; the last one overlaps so that it ends at `total`.

    With a `count` larger than it takes, the last ones all end there.
    """
    if step >= total:
        return tirx.const(0, "int32")
    if total % step == 0 and (count is None or count * step == total):
        return i * step
    return te.min(i * step, tirx.const(total - step, "int32"))


def _kernel(
    problem: PlanesProblem | RowsProblem,
    inputs: list[Any],
    value: Callable[[Index], Any],
    domain: Sequence[Any],
    place: Callable[[Any, Index], list[Any]],
    slot: Callable[[Index], Any],
    segment: Callable[[Mapping[str, Any]], Any],
    walked: int = 0,
    biased: bool = False,
) -> Kernel:
    """Close a compute: the epilogue over `domain`, and the function's argument list.

    With `biased` the values have their bias already.
    """
    tables = {t.op.name: t for t in inputs}
    shape = problem.output
    other = None
    if problem.epilogue.residual:
        other = te.placeholder(shape, tables["bias"].dtype, name="residual")

    def epilogue(*index: Any) -> Any:
        residual = None if other is None else other(*place(tables["rows"], index))
        bias = None if biased else tables["bias"][slot(index)]
        return problem.epilogue.apply(value(index), bias, residual)

    y = te.compute(domain, epilogue, name=OUTPUT)
    args = [*inputs, *([] if other is None else [other]), y]
    return Kernel(te.create_prim_func(args), shape, place, segment, walked)


def planes_kernel(problem: PlanesProblem, tile: PlanesTile, dtype: str = "float32") -> Kernel:
    """The planes kernel; `dtype` is that of activations, weights and sums.

    Arguments: X [batch, image_floats], indptr, index, weight, rows, bias (see `PackedWeight`;
    index holds offsets, and behind them `BEYOND` that are loaded but not used; bias is in slot
    order), residual (if fused) and Y, both [batch, rows, pixels] or, where output rows have gaps,
    [batch, rows, height, width]. With a panel, lines int32 [channels * lines] follows the bias:
    offsets; index then holds rows of the panel, which begins with channel `first_channel` of the
    tile.
    """
    r_, w_ = problem.block_rows, tile.width
    tables = _tables(problem.row_blocks, r_, segments=tile.k_tiles * tile.runs, dtype=dtype)
    x = te.placeholder((problem.batch, problem.image_floats), dtype, name="X")
    most = problem.columns + tile.runs * (tile.unroll(problem) - 1)
    p = te.reduce_axis((0, most), name="p")
    walk = _Walk(problem, tile)
    panel = None
    copied = Panel(problem, tile)
    if tile.panel:
        lines = problem.channels * copied.lines
        tables["lines"] = te.placeholder((lines,), "int32", name="lines")
        panel = _panel(walk, copied, x, tables["lines"])

    def product(n: Any, g: Any, h: Any, s: Any, b: Any, t: Any, r: Any, q: Any) -> Any:
        entry = tables["indptr"][walk.segment(h, s, b)] * tile.unroll(problem) + p
        at = tables["index"][entry]
        if panel is None:
            value = x[n, at + walk.start(g) * walk.scale + walk.column(t) + q]
        else:
            # The remainder bounds what a task reads, for the schedule; `finish` drops it. A
            # remainder of division by one would be dropped at once, and the index with it.
            first = at % max(2, copied.rows - copied.height + copied.reach + 1)
            down, right = _split(t * w_ + q, tile.panel_pitch, tile.tiles * w_)
            value = panel[n, g, h, s, first + down, right]
        return te.sum(tables["weight"][entry, r] * value, axis=p)

    domain = (*walk.domain, tile.tiles, r_, w_)
    acc = te.compute(domain, product, name="acc")
    inputs = [x, *tables.values()]
    if not (problem.compact or tile.within_rows(problem)):
        return _squeezed(problem, tile, inputs, acc, walk)

    def place(rows: Any, index: Index) -> list[Any]:
        n, g, h, _, b, t, r, q = index
        row, first = rows[walk.block(h, b) * r_ + r], walk.start(g)
        if problem.compact:
            return [n, row, first + t * w_ + q]
        return [n, row, first, walk.column(t) + q]

    def slot(index: Index) -> Any:
        return walk.block(index[2], index[4]) * r_ + index[6]

    return _kernel(
        problem,
        inputs,
        lambda i: acc(*i),
        domain,
        place,
        slot,
        walk.named_segment,
        WALKED,
        tile.in_assembly,
    )


def first_channel(s: Any, problem: PlanesProblem, tile: PlanesTile) -> Any:
    """The channel at which the panel of K tile s begins; the last panel ends with the channels."""
    return _stretch(s, Panel(problem, tile).channels, problem.channels, tile.k_tiles)


def _panel(walk: _Walk, panel: Panel, x: Any, lines: Any) -> Any:
    """The inputs of one K tile, line by line: what row blocks read again and again."""

    def copy(n: Any, g: Any, h: Any, s: Any, k: Any, q: Any) -> Any:
        line, row = _split(k, panel.height, panel.rows)
        first = first_channel(s, walk.problem, walk.tile) * panel.lines
        at = lines[first + line] + (walk.start(g) + row) * walk.scale
        return x[n, at + walk.left(g) + q]

    shape = (*walk.domain[:WALKED], panel.rows, walk.tile.panel_pitch)
    return te.compute(shape, copy, name=PANEL)


def _split(i: Any, inner: int, total: int) -> tuple[Any, Any]:
    """Quotient and remainder of `i`, which is less than `total`, by `inner`."""
    if inner == 1:
        return i, tirx.const(0, "int32")
    if total <= inner:
        return tirx.const(0, "int32"), i
    return i // inner, i % inner


# Axes of the planes kernel in front of a task's row blocks: images, groups, stretches, K tiles.
WALKED = 4


@dataclass(frozen=True)
class _Walk:
    """How the planes kernel walks a layer: groups of pixels, stretches of row blocks, K tiles."""

    problem: PlanesProblem
    tile: PlanesTile

    @property
    def span(self) -> int:
        """Pixels, or output rows where they have gaps, of a group."""
        return self.tile.tiles * self.tile.width if self.problem.compact else self.tile.group_rows

    @property
    def total(self) -> int:
        """Pixels or output rows of an image."""
        return self.tile.whole(self.problem) if self.problem.compact else self.problem.height

    @property
    def scale(self) -> int:
        """Floats of the planes that belong to one unit of the span."""
        return 1 if self.problem.compact else self.problem.pitch

    @property
    def per_stretch(self) -> int:
        """Row blocks of a stretch."""
        return -(-self.problem.row_blocks // self.tile.stretches)

    @property
    def domain(self) -> tuple[int, ...]:
        """Extents of the axes n, g, h, s, b."""
        tile, groups = self.tile, self.tile.groups(self.problem)
        return (self.problem.batch, groups, tile.stretches, tile.k_tiles, self.per_stretch)

    def start(self, g: Any) -> Any:
        """Where group g begins: its first pixel or output row."""
        across = self.tile.across(self.problem)
        return _stretch(g if across == 1 else g // across, self.span, self.total)

    def left(self, g: Any) -> Any:
        """The column of the output at which group g begins."""
        across = self.tile.across(self.problem)
        if across == 1:
            return tirx.const(0, "int32")
        return _stretch(g % across, self.tile.columns(self.problem), self.problem.width)

    def column(self, t: Any) -> Any:
        """Where register tile t begins, from the beginning of its group."""
        tile, problem = self.tile, self.problem
        if tile.within_rows(problem):
            end = problem.width - tile.last(problem) * tile.lanes
            return te.min(t * tile.width, tirx.const(end, "int32"))
        return t * tile.width

    def block(self, h: Any, b: Any) -> Any:
        """The number of row block b of stretch h."""
        total, count = self.problem.row_blocks, self.tile.stretches
        return _stretch(h, self.per_stretch, total, count) + b

    def segment(self, h: Any, s: Any, b: Any) -> Any:
        """The place in `indptr` of the first run of that row block in K tile s."""
        return (s * self.problem.row_blocks + self.block(h, b)) * self.tile.runs

    def named_segment(self, axes: Mapping[str, Any]) -> Any:
        """The same, for axes by name."""
        return self.segment(axes["v_h"], axes["v_s"], axes["v_b"])


def _squeezed(
    problem: PlanesProblem, tile: PlanesTile, inputs: list[Any], acc: Any, walk: _Walk
) -> Kernel:
    """Output rows have gaps in the planes: a strip of them is squeezed out as it is stored."""
    r_, w_ = problem.block_rows, tile.width
    strip = te.compute(
        (*walk.domain, r_, tile.tiles * w_),
        lambda n, g, h, s, b, r, q: acc[n, g, h, s, b, q // w_, r, q % w_],
        name=STRIP,
    )
    columns = tile.columns(problem)
    lanes = tile.lanes if tile.masked(problem) else min(tile.lanes, 1 << (columns.bit_length() - 1))
    pieces = -(-columns // lanes)
    pitch = tile.panel_pitch or problem.pitch

    def column(index: Index) -> Any:
        return (0 if pieces == 1 else _stretch(index[7], lanes, columns)) + index[8]

    def slot(index: Index) -> Any:
        return walk.block(index[2], index[4]) * r_ + index[5]

    def place(rows: Any, index: Index) -> list[Any]:
        row, left = walk.start(index[1]) + index[6], walk.left(index[1])
        return [index[0], rows[slot(index)], row, left + column(index)]

    def value(index: Index) -> Any:
        return strip(*index[:6], index[6] * pitch + column(index))

    domain = (*walk.domain, r_, tile.group_rows, pieces, lanes)
    segment, biased = walk.named_segment, tile.in_assembly
    return _kernel(problem, inputs, value, domain, place, slot, segment, WALKED, biased)


def rows_kernel(problem: RowsProblem, tile: RowsTile) -> Kernel:
    """The rows (matrix-vector) kernel.

    Arguments: X [inputs, columns], indptr, index, weight, rows, bias (see `PackedWeight` and,
    with own columns, `SlicedWeight`; index is of `RowsProblem.index_dtype`), starts (with
    windows), residual (if fused) and Y, both [inputs, rows].
    """
    r_, u_, m_ = problem.block_rows, tile.unroll, problem.inputs
    tables = _tables(
        problem.row_blocks,
        r_,
        problem.own_columns,
        window=problem.window,
        index_dtype=problem.index_dtype,
    )
    x = te.placeholder((m_, problem.columns), "float32", name="X")
    p = te.reduce_axis((0, -(-problem.columns // u_)), name="p")

    def product(b: Any, m: Any, u: Any, r: Any) -> Any:
        entry = (tables["indptr"][b] + p) * u_ + u
        at = tables["index"][(entry, r) if problem.own_columns else entry].astype("int32")
        if problem.window:
            at = tables["starts"][entry] + at
        return te.sum(tables["weight"][entry, r] * x[m, at], axis=p)

    acc = te.compute((problem.row_blocks, m_, u_, r_), product, name="acc")

    def place(rows: Any, index: Index) -> list[Any]:
        b, m, r = index
        return [m, rows[b * r_ + r]]

    def value(index: Index) -> Any:
        b, m, r = index
        total = acc[b, m, 0, r]
        for u in range(1, u_):
            total = total + acc[b, m, u, r]
        return total

    domain = (problem.row_blocks, m_, r_)
    inputs = [x, *tables.values()]
    return _kernel(
        problem, inputs, value, domain, place, lambda i: i[0] * r_ + i[2], lambda axes: axes["v_b"]
    )
