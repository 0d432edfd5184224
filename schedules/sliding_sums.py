"""Sums that slide: how the taps of a row share one line of a panel, and all loads are aligned.

A tap that reads s columns right of its pixel adds ``w * x[i + s]`` to pixel i: in vectors that
begin at whole multiples of their length, lane i of the input meets lane i of the sums of pixels
that lie s columns further left. So a row block walks its entries in runs, the farthest tap first,
and between two runs all its sums move one lane down:

    y[i] = a0[i] + (a1[i + 1] + (a2[i + 2])),   a_s = the sums of run s, all of aligned vectors

The last lanes of every row of the panel get sums of no pixel; they are not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from .analysis import substitute, walk
from .moves import in_sequence

RESUMED = "acc_resumed"


def slide_sums(
    loop: tirx.For, run: Callable[[int], tirx.Stmt], slides: int, carried: bool
) -> tirx.Stmt:
    """The ragged loop of a planes kernel as runs of entries, between which the sums slide.

    Args:
        loop: over the entries of a row block; inside are its unrolled rows and vectors.
        run: makes the loop over a run, from its number.
        slides: how often the sums slide; 0: there is one run.
        carried: mark where sums of the K tile before are added (see `carry_sums`): they have slid.
    """
    if slides == 0:
        return run(0)
    sums = _Sums(loop)
    code = [run(0)]
    for i in range(1, slides + 1):
        code += sums.slide()
        if i == slides and carried:
            code.append(sums.resume())
        code.append(run(i))
    return in_sequence(code)


class _Sums:
    """The accumulators of a row block's loop, vector by vector."""

    def __init__(self, loop: tirx.For) -> None:
        self.rows, self.vectors = (
            inner for inner in reversed(walk(loop, tirx.For)) if inner.kind == tirx.ForKind.UNROLLED
        )
        (self.lane,) = (
            inner for inner in walk(loop, tirx.For) if inner.kind == tirx.ForKind.VECTORIZED
        )
        (realize,) = walk(self.lane, SBlockRealize)
        axes = zip(realize.block.iter_vars, realize.iter_values, strict=True)
        self.store = substitute(realize.block.body, {axis.var: value for axis, value in axes})

    def at(self, row: int, vector: int) -> list[Any]:
        """The indices of one vector."""
        place = ((self.rows, row), (self.vectors, vector), (self.lane, 0))
        values = {loop.loop_var: tirx.const(value, "int32") for loop, value in place}
        *first, lane = (substitute(index, values) for index in self.store.indices)
        return [*first, tirx.Ramp(lane, 1, int(self.lane.extent))]

    def slide(self) -> list[tirx.Stmt]:
        """Move every sum one lane down, from vector to vector."""
        lanes, count = int(self.lane.extent), int(self.vectors.extent)
        code: list[tirx.Stmt] = []
        for row in range(int(self.rows.extent)):
            for vector in range(count):
                own, following = self.at(row, vector), self.at(row, min(vector + 1, count - 1))
                pair = [tirx.BufferLoad(self.store.buffer, at) for at in (own, following)]
                moved = tirx.Shuffle(pair, [tirx.const(i, "int32") for i in range(1, lanes + 1)])
                code.append(tirx.BufferStore(self.store.buffer, moved, own))
        return code

    def resume(self) -> tirx.Stmt:
        """A block in which every sum is stored as it is."""
        code: list[tirx.Stmt] = []
        for row in range(int(self.rows.extent)):
            for vector in range(int(self.vectors.extent)):
                at = self.at(row, vector)
                value = tirx.BufferLoad(self.store.buffer, at)
                code.append(tirx.BufferStore(self.store.buffer, value, at))
        block = SBlock([], [], [], RESUMED, in_sequence(code))
        return SBlockRealize([], tirx.const(True, "bool"), block)
