"""The rows (matrix-vector) kernel on CUDA cores: R x 1 blocks times a few input rows.

What counts is that the weights come from memory at its full speed. The lanes of a warp take one
entry each: its R weights in one access, neighbours of those of the next lane, and its input by its
column. Several warps share a row block, and add their sums up in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as build

from ..targets import WARP
from . import cuda_code as code
from .problems import RowsProblem

# Input rows times R: the sums of one lane.
MOST_SUMS = 64


@dataclass(frozen=True)
class CudaRowsTile:
    """One point of the kernel's schedule space.

    Attributes:
        splits: warps that share a row block.
        blocks: row blocks of a thread block.
        unroll: entries of a lane whose loads are under way together.
    """

    splits: int
    blocks: int
    unroll: int


def rows_kernel(problem: RowsProblem, tile: CudaRowsTile, dtype: str) -> tirx.PrimFunc:
    """The kernel.

    Arguments: X [inputs, columns], indptr, index, weight, rows, bias (see `PackedWeight`),
    residual (if fused) and Y, both [inputs, rows]. X, weight, residual and Y are of `dtype`.
    """
    return code.kernel(_Rows(problem, tile, dtype).write)


class _Rows:
    """The kernel's text, part by part."""

    def __init__(self, problem: RowsProblem, tile: CudaRowsTile, dtype: str) -> None:
        self.problem, self.tile, self.dtype = problem, tile, dtype
        self.values = problem.block_rows * problem.inputs

    def write(self) -> None:
        """All of it."""
        problem, tile, dtype = self.problem, self.tile, self.dtype
        self.x = code.argument("X", (problem.inputs, problem.columns), dtype)
        self.tables = code.tables(problem.row_blocks, problem.block_rows, dtype)
        self.residual = None
        if problem.epilogue.residual:
            self.residual = code.argument("residual", problem.output, dtype)
        self.y = code.argument("Y", problem.output, dtype)
        blocks = -(-problem.row_blocks // tile.blocks)
        with (
            build.launch_thread("blockIdx.x", blocks) as group,
            build.launch_thread("threadIdx.y", tile.splits * tile.blocks) as warp,
            build.launch_thread("threadIdx.x", WARP) as lane,
        ):
            self._thread(group, warp, lane)

    def _thread(self, group: Any, warp: Any, lane: Any) -> None:
        problem, tile = self.problem, self.tile
        shape = (tile.blocks, tile.splits, self.values)
        shared = build.alloc_buffer(shape, "float32", scope="shared")
        # Blocks beyond the last repeat it: they store the same values again.
        last = tirx.const(problem.row_blocks - 1, "int32")
        mine, share = tirx.floordiv(warp, tile.splits), tirx.floormod(warp, tile.splits)
        block = code.held(tirx.min(group * tile.blocks + mine, last))
        sums = self._sums(block, share, lane)
        totals = [code.warp_sum(sums[i]) for i in range(self.values)]
        with build.If(tirx.EQ(lane, 0)), build.Then():
            for i, total in enumerate(totals):
                code.store(shared, total, mine, share, i)
        build.evaluate(tirx.op.tvm_storage_sync("shared"))
        with build.If(tirx.EQ(share, 0)), build.Then():
            for first in range(0, self.values, WARP):
                with build.If(lane + first < self.values), build.Then():
                    self._finish(shared, block, mine, lane + first)

    def _sums(self, block: Any, share: Any, lane: Any) -> Any:
        """This lane's part of the sums: float32 [R * inputs] in registers."""
        problem, tile, indptr = self.problem, self.tile, self.tables["indptr"]
        rows, inputs = problem.block_rows, problem.inputs
        sums = code.zero(self.values)
        begin, end = code.held(indptr[block]), code.held(indptr[block + 1])
        stride = tile.splits * tile.unroll * WARP
        with build.serial(0, tirx.floordiv(end - begin + (stride - 1), stride)) as step:
            for u in range(tile.unroll):
                place = ((step * tile.splits + share) * tile.unroll + u) * WARP + lane
                entry = code.held(begin + place)
                at = code.held(tirx.min(entry, end - 1))
                weights = code.local(rows, self.dtype)
                width = code.widest(rows, self.dtype)
                zero = tirx.const(0, "int32")
                code.copy(weights, 0, self.tables["weight"], [at, zero], rows, width)
                column = code.held(self.tables["index"][at])
                for m in range(inputs):
                    x = code.as_float(self.x[m, column])
                    x = code.held(tirx.Select(entry < end, x, tirx.const(0, "float32")), "float32")
                    for r in range(rows):
                        i = r * inputs + m
                        code.store(sums, sums[i] + code.as_float(weights[r]) * x, i)
        return sums

    def _finish(self, shared: Any, block: Any, mine: Any, i: Any) -> None:
        """Add up and store one value."""
        problem, tile = self.problem, self.tile
        total: Any = tirx.const(0, "float32")
        for part in range(tile.splits):
            total = total + shared[mine, part, i]
        total = code.held(total, "float32")
        slot = code.held(block * problem.block_rows + tirx.floordiv(i, problem.inputs))
        place = (tirx.floormod(i, problem.inputs), self.tables["rows"][slot])
        other = None if self.residual is None else code.as_float(self.residual[place])
        value = problem.epilogue.apply(total, self.tables["bias"][slot], other)
        code.store(self.y, value.astype(self.dtype), *place)
