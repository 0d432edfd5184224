"""The planes kernel on CUDA cores: R x 1 blocks times pixels, any convolution or dense layer.

A warp takes one row block and some pixels per lane, and keeps R sums for each of them in
registers. An entry's R weights are the same for all lanes, so the cache hands them out in one
access, and its inputs are neighbours, so they come in whole lines. Pixels are numbered through
all images: small images of a large batch still fill warps.

No padded copy of the input is made. A table gives each entry its offset from the pixel's own
place in the image, and another one bit for its row of taps and one for its column; each lane
knows which of them lie inside the image for its pixels, and takes zeros for the others.

Where row blocks and pixels are too few to fill the GPU, several warps share the entries of a row
block and add their sums up in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as build

from ..layout import IntArray
from ..planes import AxisGeometry, ConvGeometry
from ..targets import WARP
from . import cuda_code as code
from .problems import Epilogue

# Taps of one axis: the masks of both share 32 bits, of which the sign is left out.
MOST_TAPS = 15
# Static shared memory of a block, on every GPU.
SHARED_BYTES = 48 << 10


@dataclass(frozen=True)
class CudaPlanes:
    """A layer as the kernel sees it; equal problems share one compiled kernel.

    Attributes:
        geometry: the convolution; a dense layer's rows are the pixels of one.
        block_rows: R.
        row_blocks: row blocks of the packed weight, all channel groups together.
        epilogue: what is fused behind the sum.
        dtype: of input, weight, residual and output; sums and the bias are float32.
    """

    geometry: ConvGeometry
    block_rows: int
    row_blocks: int
    epilogue: Epilogue
    dtype: str = "float32"

    @property
    def pixels(self) -> int:
        """Output pixels of an image."""
        return self.geometry.y.output * self.geometry.x.output

    @property
    def image(self) -> int:
        """Elements of an input image."""
        return self.geometry.channels * self.geometry.y.size * self.geometry.x.size

    @property
    def masked(self) -> bool:
        """Whether some tap of some pixel lies outside the image."""
        return not all(_inside(axis) for axis in (self.geometry.y, self.geometry.x))

    @property
    def adjacent(self) -> bool:
        """Whether neighbouring output pixels read neighbouring inputs, over row ends too."""
        return self.geometry.direct

    @property
    def output(self) -> tuple[int, int, int]:
        """The output's shape: [batch, rows, pixels]."""
        return (self.geometry.batch, self.geometry.outputs, self.pixels)


@dataclass(frozen=True)
class CudaTile:
    """One point of the kernel's schedule space.

    Attributes:
        pixels: of a lane.
        vector: of these, how many are neighbours, loaded and stored together.
        splits: warps that share the entries of a row block.
        warps: of a thread block; a multiple of `splits`.
        unroll: entries per step, whose loads are under way together.
    """

    pixels: int
    vector: int
    splits: int
    warps: int
    unroll: int

    @property
    def blocks(self) -> int:
        """Row blocks of a thread block."""
        return self.warps // self.splits


def _inside(axis: AxisGeometry) -> bool:
    last = (axis.output - 1) * axis.stride + (axis.kernel - 1) * axis.dilation - axis.before
    return axis.before == 0 and last < axis.size


def is_supported(geometry: ConvGeometry) -> bool:
    """Whether the masks have a bit for every tap."""
    return max(geometry.y.kernel, geometry.x.kernel) <= MOST_TAPS


def tap_tables(geometry: ConvGeometry, group: int = 0) -> tuple[IntArray, IntArray]:
    """For each weight column of `group`: its offset from a pixel's place, and its mask bits.

    int32 [channels / groups * kh * kw] each.
    """
    y, x = geometry.y, geometry.x
    channels = geometry.channels // geometry.groups
    channel = (group * channels + np.arange(channels))[:, None, None] * (y.size * x.size)
    down = (np.arange(y.kernel) * y.dilation * x.size)[:, None]
    right = np.arange(x.kernel) * x.dilation
    bits = (1 << np.arange(y.kernel))[:, None] | (1 << (MOST_TAPS + np.arange(x.kernel)))
    offset = np.asarray((channel + down + right).ravel(), np.int32)
    return offset, np.tile(np.asarray(bits.ravel(), np.int32), channels)


def planes_kernel(problem: CudaPlanes, tile: CudaTile) -> tirx.PrimFunc:
    """The kernel.

    Arguments: X [batch, image], indptr, index, weight, rows, bias (see `PackedWeight`; index holds
    offsets from a pixel's place, see `tap_tables`, in vectors; bias is in slot order), taps int32
    like index where the problem is masked, residual (if fused) and Y, both [batch, rows, pixels].
    """
    return code.kernel(_Planes(problem, tile).write)


class _Planes:
    """The kernel's text, part by part."""

    def __init__(self, problem: CudaPlanes, tile: CudaTile) -> None:
        self.problem, self.tile = problem, tile
        # TVM makes one access of a vector only where it can prove that it is aligned: so pixels,
        # and the offsets of what they read, are counted in vectors.
        self.vectors = problem.pixels // tile.vector
        self.total = problem.geometry.batch * self.vectors

    def write(self) -> None:
        """All of it."""
        problem, tile, dtype = self.problem, self.tile, self.problem.dtype
        batch = problem.geometry.batch
        self.x = code.argument("X", (batch, problem.image), dtype)
        self.tables = code.tables(problem.row_blocks, problem.block_rows, dtype)
        if problem.masked:
            nnz = self.tables["index"].shape[0]
            self.tables["taps"] = code.argument("taps", (nnz,), "int32")
        self.residual = None
        if problem.epilogue.residual:
            self.residual = code.argument("residual", problem.output, dtype)
        self.y = code.argument("Y", problem.output, dtype)
        groups = -(-self.total // (WARP * self.tile.pixels // tile.vector))
        blocks = -(-problem.row_blocks // tile.blocks)
        with (
            build.launch_thread("blockIdx.x", blocks) as by_rows,
            build.launch_thread("blockIdx.y", groups) as group,
            build.launch_thread("threadIdx.y", tile.warps) as warp,
            build.launch_thread("threadIdx.x", WARP) as lane,
        ):
            self._thread(by_rows, group, warp, lane)

    def _thread(self, by_rows: Any, group: Any, warp: Any, lane: Any) -> None:
        problem, tile = self.problem, self.tile
        shared = None
        if tile.splits > 1:
            shape = (tile.blocks, tile.splits, problem.block_rows * tile.pixels, WARP)
            shared = build.alloc_buffer(shape, "float32", scope="shared")
        # Blocks beyond the last repeat it: they store the same values again.
        last = tirx.const(problem.row_blocks - 1, "int32")
        own = by_rows * tile.blocks + tirx.floordiv(warp, tile.splits)
        block = code.held(tirx.min(own, last))
        share = tirx.floormod(warp, tile.splits)
        count = tile.pixels // tile.vector
        owned = [code.held(self._vector(group, lane, j)) for j in range(count)]
        sums = self._sums(block, share, owned)
        if shared is None:
            for j, vector in enumerate(owned):
                self._finish(block, vector, sums, j * tile.vector)
        else:
            self._add_up(shared, sums, block, share, warp, group, lane)

    def _vector(self, group: Any, lane: Any, j: Any) -> Any:
        """The number of a lane's vector j of pixels; beyond the last one, that is repeated."""
        at = (group * (self.tile.pixels // self.tile.vector) + j) * WARP + lane
        return tirx.min(at, tirx.const(self.total - 1, "int32"))

    def _split(self, vector: Any) -> tuple[Any, Any]:
        """A vector's image, and its number there."""
        if self.problem.geometry.batch == 1:
            return tirx.const(0, "int32"), vector
        return tirx.floordiv(vector, self.vectors), tirx.floormod(vector, self.vectors)

    def _place(self, vector: Any) -> Any:
        """Where a vector lies: the offset of its first tap in the input, in vectors."""
        problem, y, x = self.problem, self.problem.geometry.y, self.problem.geometry.x
        image, inside = self._split(vector)
        if problem.adjacent:
            return image * (problem.image // self.tile.vector) + inside
        row, column = tirx.floordiv(inside, x.output), tirx.floormod(inside, x.output)
        at = (row * y.stride - y.before) * x.size + column * x.stride - x.before
        return image * problem.image + at

    def _mask(self, pixel: Any) -> Any:
        """The bits of the taps that lie inside the image for a pixel."""
        y, x = self.problem.geometry.y, self.problem.geometry.x
        _, inside = self._split(pixel)
        place = (tirx.floordiv(inside, x.output), tirx.floormod(inside, x.output))
        bits: Any = tirx.const(0, "int32")
        for axis, at, first in ((y, place[0], 0), (x, place[1], MOST_TAPS)):
            for k in range(axis.kernel):
                source = at * axis.stride + (k * axis.dilation - axis.before)
                valid = tirx.all(source >= 0, source < axis.size)
                bit = tirx.const(1 << (first + k), "int32")
                bits = bits | tirx.Select(valid, bit, tirx.const(0, "int32"))
        return bits

    def _sums(self, block: Any, share: Any, owned: list[Any]) -> Any:
        """This warp's part of the sums: float32 [R * pixels] in registers."""
        problem, tile, indptr = self.problem, self.tile, self.tables["indptr"]
        rows = problem.block_rows
        sums = code.zero(rows * tile.pixels)
        places = [code.held(self._place(vector)) for vector in owned]
        masks = [code.held(self._mask(pixel)) for pixel in owned] if problem.masked else []
        begin, end = code.held(indptr[block] + share), code.held(indptr[block + 1])
        steps = tirx.floordiv(end - begin + (tile.splits - 1), tile.splits)
        with build.serial(0, tirx.max(steps, tirx.const(0, "int32"))) as step:
            entry = code.held(begin + step * tile.splits) * tile.unroll
            at = code.local(tile.unroll, "int32")
            width = code.widest(tile.unroll, "int32")
            code.copy(at, 0, self.tables["index"], [entry], tile.unroll, width)
            taps = None
            if problem.masked:
                taps = code.local(tile.unroll, "int32")
                code.copy(taps, 0, self.tables["taps"], [entry], tile.unroll, width)
            inputs = code.local(tile.unroll * tile.pixels, problem.dtype)
            for u in range(tile.unroll):
                for j, place in enumerate(places):
                    tap = None if taps is None else (masks[j] & taps[u], taps[u])
                    offset = (place + at[u]) * tile.vector
                    self._load(inputs, u * tile.pixels + j * tile.vector, offset, tap)
            weights = code.local(tile.unroll * rows, problem.dtype)
            for u in range(tile.unroll):
                width = code.widest(rows, problem.dtype)
                zero = tirx.const(0, "int32")
                code.copy(weights, u * rows, self.tables["weight"], [entry + u, zero], rows, width)
            for u in range(tile.unroll):
                for r in range(rows):
                    for p in range(tile.pixels):
                        at_sum = r * tile.pixels + p
                        product = code.as_float(weights[u * rows + r]) * code.as_float(
                            inputs[u * tile.pixels + p]
                        )
                        code.store(sums, sums[at_sum] + product, at_sum)
        return sums

    def _load(self, to: Any, at: int, offset: Any, tap: tuple[Any, Any] | None) -> None:
        """Load one vector of inputs; `tap`: the bits it needs, and those of them that it has."""
        zero = tirx.const(0, "int32")
        if tap is None:
            code.copy(to, at, self.x, [zero, offset], self.tile.vector, self.tile.vector)
            return
        value = tirx.if_then_else(
            tirx.EQ(*tap),
            tirx.BufferLoad(self.x, [zero, offset]),
            tirx.const(0, self.problem.dtype),
        )
        code.store(to, value, at)

    def _finish(self, block: Any, vector: Any, sums: Any, first: int) -> None:
        """Epilogue and store of one vector of pixels, for all rows."""
        problem, tile = self.problem, self.tile
        image, inside = self._split(vector)
        inside = inside * tile.vector
        for r in range(problem.block_rows):
            slot = block * problem.block_rows + r
            place = [image, self.tables["rows"][slot], inside]
            others = None
            if self.residual is not None:
                others = code.local(tile.vector, problem.dtype)
                code.copy(others, 0, self.residual, place, tile.vector, tile.vector)
            done = code.local(tile.vector, problem.dtype)
            for p in range(tile.vector):
                other = None if others is None else code.as_float(others[p])
                value = sums[r * tile.pixels + first + p]
                value = problem.epilogue.apply(value, self.tables["bias"][slot], other)
                code.store(done, value.astype(problem.dtype), p)
            whole = tirx.BufferLoad(done, [code.lanes(tirx.const(0, "int32"), tile.vector)])
            code.store(self.y, whole, *place[:2], code.lanes(inside, tile.vector))

    def _add_up(
        self, shared: Any, sums: Any, block: Any, share: Any, warp: Any, group: Any, lane: Any
    ) -> None:
        """Sum the parts of all warps; each of them finishes some of the values."""
        problem, tile = self.problem, self.tile
        values = problem.block_rows * tile.pixels
        mine = tirx.floordiv(warp, tile.splits)
        for i in range(values):
            code.store(shared, sums[i], mine, share, i, lane)
        build.evaluate(tirx.op.tvm_storage_sync("shared"))
        with build.serial(0, values // tile.splits) as turn:
            i = code.held(turn * tile.splits + share)
            total: Any = tirx.const(0, "float32")
            for part in range(tile.splits):
                total = total + shared[mine, part, i, lane]
            total = code.held(total, "float32")
            j = tirx.floormod(i, tile.pixels)
            vector = code.held(self._vector(group, lane, tirx.floordiv(j, tile.vector)))
            image, inside = self._split(vector)
            inside = inside * tile.vector + tirx.floormod(j, tile.vector)
            slot = code.held(block * problem.block_rows + tirx.floordiv(i, tile.pixels))
            place = [image, self.tables["rows"][slot], inside]
            other = None if self.residual is None else code.as_float(self.residual[tuple(place)])
            value = problem.epilogue.apply(total, self.tables["bias"][slot], other)
            code.store(self.y, value.astype(problem.dtype), *place)
