"""Pixels beside the vectors of a register tile: the rewrite behind planes that whole vectors miss.

A plane of 7 x 7 pixels is three vectors of 16 and one pixel. A fourth vector, or a second register
tile, costs as much as if it were full. So pixels behind the last whole tile are summed across: the
R rows of a block are the lanes of a vector, which is how its weights lie in memory, and an entry
takes one multiply-add for each of these pixels instead of R. Register tiles share them evenly, so
that nothing but their sums is added to a tile's loop; where they do not divide, some are computed
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlockRealize

from .analysis import substitute, walk
from .moves import in_sequence
from .problems import PlanesProblem, PlanesTile

Axes = Mapping[str, Any]


class SinglePixels:
    """The single pixels of a planes kernel.

    Args:
        problem, tile: of the kernel, whose ragged sum is one run.
        params: the kernel's parameters by name.
        output: what it stores to, in the layer's real shape.
    """

    def __init__(
        self, problem: PlanesProblem, tile: PlanesTile, params: Mapping[str, Any], output: Any
    ) -> None:
        self.problem, self.tile, self.params, self.output = problem, tile, params, output
        self.rows, self.dtype = problem.block_rows, output.ty.dtype
        self.sums = tirx.decl_buffer((tile.singles, self.rows), self.dtype, "beside", scope="local")

    def summed(
        self, loop: tirx.For, run: Callable[[tirx.For], tirx.Stmt], axes: Axes, slot: Any
    ) -> tirx.Stmt:
        """The ragged sum of a register tile, with its single pixels from zero to their output.

        Args:
            loop: the scheduled loop over the entries of a row block.
            run: gives such a loop its length.
            axes: those of the sum, by name.
            slot: the first row's.
        """
        nothing = tirx.Broadcast(tirx.const(0, self.dtype), self.rows)
        clear = [self._put(j, nothing) for j in range(self.tile.singles)]
        body = in_sequence([loop.body, *self._add(loop, axes)])
        longer = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body)
        return in_sequence([*clear, run(longer), *self._store(axes, slot)])

    def _pixel(self, axes: Axes, j: int) -> Any:
        """The place of single pixel j in its plane."""
        problem, tile = self.problem, self.tile
        whole, left = tile.whole(problem), problem.pixels - tile.whole(problem)
        at = (axes["v_g"] * tile.tiles + axes["v_t"]) * tile.singles + j
        if tile.singles * tile.groups(problem) * tile.tiles > left:
            at = tirx.min(at, tirx.const(left - 1, "int32"))
        return at + whole

    def _add(self, loop: tirx.For, axes: Axes) -> list[tirx.Stmt]:
        """The products of one entry."""
        (realize,) = walk(loop, SBlockRealize)
        own = zip(realize.block.iter_vars, realize.iter_values, strict=True)
        step = substitute(realize.block.body, {axis.var: value for axis, value in own})
        inside = {inner.loop_var: tirx.const(0, "int32") for inner in walk(loop.body, tirx.For)}
        product = substitute(step.value.b, inside)
        entry, first = product.a.indices
        weights = tirx.BufferLoad(product.a.source, [entry, tirx.Ramp(first, 1, self.rows)])
        index = next(
            load
            for at in product.b.indices
            for load in walk(at, TensorLoad)
            if load.source.same_as(self.params["index"])
        )
        code = []
        for j in range(self.tile.singles):
            at = [axes["v_n"], index + self._pixel(axes, j)]
            value = tirx.BufferLoad(self.params["X"], at)
            code.append(self._put(j, self._get(j) + weights * tirx.Broadcast(value, self.rows)))
        return code

    def _store(self, axes: Axes, slot: Any) -> list[tirx.Stmt]:
        """The epilogue, row by row."""
        rows, bias, residual = (self.params.get(name) for name in ("rows", "bias", "residual"))
        code = []
        for j in range(self.tile.singles):
            for r in range(self.rows):
                row = tirx.BufferLoad(rows, [slot + r])
                at = [axes["v_n"], row, self._pixel(axes, j)]
                other = None if residual is None else tirx.BufferLoad(residual, at)
                total = tirx.BufferLoad(self.sums, [j, r])
                value = self.problem.epilogue.apply(total, tirx.BufferLoad(bias, [slot + r]), other)
                code.append(tirx.BufferStore(self.output, value, at))
        return code

    def _get(self, j: int) -> Any:
        return tirx.BufferLoad(self.sums, [j, tirx.Ramp(0, 1, self.rows)])

    def _put(self, j: int, value: Any) -> tirx.Stmt:
        return tirx.BufferStore(self.sums, value, [j, tirx.Ramp(0, 1, self.rows)])
