"""TE computes of the block-sparse kernel family.

Planes form: activations are channel planes, one flat row of floats per image in which every
channel (and stride phase) is a plane. A weight entry names the offset of its plane, and a kernel
tap is a shifted offset, so dense, 1x1, k x k, strided, dilated and grouped layers are one compute:

    acc[b, r, q] = sum over p of  weight[e, r] * X[index[e] + start(tile) + q],  e = indptr[b] + p

Rows form, for few input rows (matrix-vector): the vector runs over the R rows of a block, or over
R rows with columns of their own, and only kept weights are read.

TE needs constant extents, so `p` runs to the longest possible row block while a function is
scheduled; `finish` (in block_sparse_moves) then gives that loop its own length per row block and
puts the output where it belongs, which `Kernel.place` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

OUTPUT = "Y"
Index = Sequence[Any]


@dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator before it is stored: + bias, + residual, then clip.

    `low` and `high` bound the result (ReLU is ``low=0``, ReLU6 ``low=0, high=6``).
    """

    residual: bool = False
    low: float | None = None
    high: float | None = None

    def apply(self, value: Any, bias: Any, residual: Any | None) -> Any:
        value = value + bias
        if residual is not None:
            value = value + residual
        if self.low is not None:
            value = te.max(value, tirx.const(self.low, "float32"))
        if self.high is not None:
            value = te.min(value, tirx.const(self.high, "float32"))
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

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def compact(self) -> bool:
        """Output pixels are adjacent in the planes: no gaps between output rows."""
        return self.pitch == self.width

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
    """

    lanes: int
    vectors: int
    tiles: int
    group_rows: int
    parallel: bool

    @property
    def width(self) -> int:
        return self.lanes * self.vectors


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
    """

    inputs: int
    columns: int
    rows: int
    row_blocks: int
    block_rows: int
    own_columns: bool
    epilogue: Epilogue

    @property
    def output(self) -> tuple[int, ...]:
        """The output's shape: [inputs, rows]."""
        return (self.inputs, self.rows)


@dataclass(frozen=True)
class RowsTile:
    """One point of the rows kernel's schedule space: entries per step, and all cores or one."""

    unroll: int
    parallel: bool


@dataclass(frozen=True)
class Kernel:
    """An unscheduled kernel.

    Attributes:
        func: the TE function; its last parameter is the output in the order of computation.
        shape: the output's real shape.
        place: from the table of output rows and an index of computation, the real index.
    """

    func: tirx.PrimFunc
    shape: tuple[int, ...]
    place: Callable[[Any, Index], list[Any]]


def _tables(blocks: int, rows: int, own_columns: bool = False) -> dict[str, Any]:
    nnz = te.var("nnz", "int32")
    index_shape = (nnz, rows) if own_columns else (nnz,)
    return {
        "indptr": te.placeholder((blocks + 1,), "int32", name="indptr"),
        "index": te.placeholder(index_shape, "int32", name="index"),
        "weight": te.placeholder((nnz, rows), "float32", name="weight"),
        "rows": te.placeholder((blocks * rows,), "int32", name="rows"),
        "bias": te.placeholder((blocks * rows,), "float32", name="bias"),
    }


def _stretch(i: Any, step: int, total: int) -> Any:
    """Start of stretch i of length `step`; the last one overlaps so that it ends at `total`."""
    if total % step == 0:
        return i * step
    return te.min(i * step, tirx.const(total - step, "int32"))


def _kernel(
    problem: PlanesProblem | RowsProblem,
    inputs: list[Any],
    value: Callable[[Index], Any],
    domain: Sequence[Any],
    place: Callable[[Any, Index], list[Any]],
    slot: Callable[[Index], Any],
) -> Kernel:
    """Close a compute: the epilogue over `domain`, and the function's argument list."""
    tables = {t.op.name: t for t in inputs}
    shape = problem.output
    other = None
    if problem.epilogue.residual:
        other = te.placeholder(shape, "float32", name="residual")

    def epilogue(*index: Any) -> Any:
        residual = None if other is None else other(*place(tables["rows"], index))
        return problem.epilogue.apply(value(index), tables["bias"][slot(index)], residual)

    y = te.compute(domain, epilogue, name=OUTPUT)
    args = [*inputs, *([] if other is None else [other]), y]
    return Kernel(te.create_prim_func(args), shape, place)


def planes_kernel(problem: PlanesProblem, tile: PlanesTile) -> Kernel:
    """The planes kernel.

    Arguments: X [batch, image_floats], indptr, index, weight, rows, bias (see `PackedWeight`;
    index holds offsets; bias is in slot order), residual (if fused) and Y, both
    [batch, rows, pixels] or, where output rows have gaps, [batch, rows, height, width].
    """
    r_, w_ = problem.block_rows, tile.width
    tables = _tables(problem.row_blocks, r_)
    x = te.placeholder((problem.batch, problem.image_floats), "float32", name="X")
    p = te.reduce_axis((0, problem.columns), name="p")
    if problem.compact:
        span, total, scale = tile.tiles * w_, problem.pixels, 1
    else:
        span, total, scale = tile.group_rows, problem.height, problem.pitch
    groups = -(-total // span)

    def start(g: Any) -> Any:
        return _stretch(g, span, total)

    def product(n: Any, g: Any, b: Any, t: Any, r: Any, q: Any) -> Any:
        entry = tables["indptr"][b] + p
        position = tables["index"][entry] + start(g) * scale + t * w_ + q
        return te.sum(tables["weight"][entry, r] * x[n, position], axis=p)

    domain = (problem.batch, groups, problem.row_blocks, tile.tiles, r_, w_)
    acc = te.compute(domain, product, name="acc")
    if problem.compact:

        def place(rows: Any, index: Index) -> list[Any]:
            n, g, b, t, r, q = index
            return [n, rows[b * r_ + r], start(g) + t * w_ + q]

        inputs = [x, *tables.values()]
        return _kernel(
            problem, inputs, lambda i: acc(*i), domain, place, lambda i: i[2] * r_ + i[4]
        )
    return _squeezed(problem, tile, [x, *tables.values()], acc, start)


def _squeezed(
    problem: PlanesProblem,
    tile: PlanesTile,
    inputs: list[Any],
    acc: Any,
    start: Callable[[Any], Any],
) -> Kernel:
    """Output rows have gaps in the planes: a strip of them is squeezed out as it is stored."""
    r_, w_ = problem.block_rows, tile.width
    batch, groups, blocks, tiles = acc.shape[:4]
    strip = te.compute(
        (batch, groups, blocks, r_, tiles * w_),
        lambda n, g, b, r, q: acc[n, g, b, q // w_, r, q % w_],
        name="strip",
    )
    lanes = min(tile.lanes, 1 << (problem.width.bit_length() - 1))
    pieces = -(-problem.width // lanes)

    def column(index: Index) -> Any:
        return _stretch(index[5], lanes, problem.width) + index[6]

    def place(rows: Any, index: Index) -> list[Any]:
        n, g, b, r, oy = index[:5]
        return [n, rows[b * r_ + r], start(g) + oy, column(index)]

    def value(index: Index) -> Any:
        n, g, b, r, oy = index[:5]
        return strip[n, g, b, r, oy * problem.pitch + column(index)]

    domain = (batch, groups, blocks, r_, tile.group_rows, pieces, lanes)
    return _kernel(problem, inputs, value, domain, place, lambda i: i[2] * r_ + i[3])


def rows_kernel(problem: RowsProblem, tile: RowsTile) -> Kernel:
    """The rows (matrix-vector) kernel.

    Arguments: X [inputs, columns], indptr, index, weight, rows, bias (see `PackedWeight` and,
    with own columns, `SlicedWeight`), residual (if fused) and Y, both [inputs, rows].
    """
    r_, u_, m_ = problem.block_rows, tile.unroll, problem.inputs
    tables = _tables(problem.row_blocks, r_, problem.own_columns)
    x = te.placeholder((m_, problem.columns), "float32", name="X")
    p = te.reduce_axis((0, -(-problem.columns // u_)), name="p")

    def product(b: Any, m: Any, u: Any, r: Any) -> Any:
        entry = (tables["indptr"][b] + p) * u_ + u
        at = tables["index"][(entry, r) if problem.own_columns else entry]
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
    return _kernel(problem, inputs, value, domain, place, lambda i: i[0] * r_ + i[2])
