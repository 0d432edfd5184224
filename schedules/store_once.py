"""Kernels that store every element of their output once, so that they may write over the residual.

Where groups of pixels do not divide the output, the last one overlaps its neighbour, and both
compute what they share. A residual that the output replaces would be added twice there. So a
group stores only what the groups before it do not, vector by vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlockRealize

from .analysis import substitute, walk
from .block_sparse import OUTPUT, Index, Kernel
from .problems import PlanesProblem, PlanesTile

STORES_ONCE = "pivot.stores_once"


def store_once(
    func: tirx.PrimFunc, kernel: Kernel, problem: PlanesProblem, tile: PlanesTile
) -> tirx.PrimFunc:
    """A finished planes kernel that stores no element twice, marked `STORES_ONCE`.

    The mark holds for weights whose row blocks repeat no row. Then the residual, too, is loaded
    once per element, by the task that stores there and before it does.

    Unchanged if there is no residual, or if more overlaps than groups by whole vectors.
    """
    if not problem.epilogue.residual or not _divides(problem, tile):
        return func
    overlaps = _overlaps(problem, tile)
    rows = next(param for param in func.params if param.name == "rows")
    loops = walk(func.body, tirx.For)
    first_lane = {
        loop.loop_var: tirx.const(0, str(loop.loop_var.ty.dtype))
        for loop in loops
        if loop.kind == tirx.ForKind.VECTORIZED
    }

    def guard(node: SBlockRealize) -> Any:
        if node.block.name_hint != OUTPUT:
            return node
        index = [substitute(value, first_lane) for value in node.iter_values]
        place = kernel.place(rows, index)
        new = [place[cut.axis] >= cut.number(index) * cut.span for cut in overlaps]
        return SBlockRealize(node.iter_values, tirx.all(*new), node.block)

    body = func.body
    if overlaps:
        body = tvm_ffi.structural_map(body, (SBlockRealize, guard))
    done = tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)
    return done.with_attr(STORES_ONCE, True)


@dataclass(frozen=True)
class _Cut:
    """An axis of the output, into what stretches it is cut, and which one an index is in."""

    axis: int
    span: int
    number: Callable[[Index], Any]


def _overlaps(problem: PlanesProblem, tile: PlanesTile) -> list[_Cut]:
    """The cuts whose last stretch overlaps the one before it."""
    across = tile.across(problem)
    if tile.singles:
        return []
    if problem.compact:
        cuts = [(problem.pixels, _Cut(2, tile.tiles * tile.width, lambda index: index[1]))]
    elif tile.within_rows(problem):  # groups are whole rows, of which register tiles may overlap
        cuts = [(problem.width, _Cut(3, tile.width, lambda index: index[5]))]
    else:
        cuts = [(problem.height, _Cut(2, tile.group_rows, lambda index: index[1] // across))]
        if across > 1:
            across_rows = _Cut(3, tile.columns(problem), lambda index: index[1] % across)
            cuts.append((problem.width, across_rows))
    return [cut for total, cut in cuts if total % cut.span]


def store_over(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A marked kernel that writes over its residual: it has no other output."""
    *params, residual, output = func.params
    # One parameter, for the compiler takes two to be different memory.
    body = substitute(func.body, {output: residual})
    return tirx.PrimFunc([*params, residual], body, func.ret_type, func.attrs)


def store_freely(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A marked kernel without its mark, free to store elements twice: that is faster."""

    def unguarded(node: SBlockRealize) -> Any:
        if node.block.name_hint != OUTPUT:
            return node
        return SBlockRealize(node.iter_values, tirx.const(True, "bool"), node.block)

    body = tvm_ffi.structural_map(func.body, (SBlockRealize, unguarded))
    done = tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)
    return done.without_attr(STORES_ONCE)


def _divides(problem: PlanesProblem, tile: PlanesTile) -> bool:
    """Whether whole vectors cover the pixels, and stretches the row blocks, without overlap."""
    if problem.row_blocks % tile.stretches:
        return False
    if tile.singles:  # then tiles do not overlap, but single pixels may be computed twice
        tiles = tile.groups(problem) * tile.tiles
        return tiles * (tile.width + tile.singles) == problem.pixels
    if problem.compact:
        return problem.pixels % tile.lanes == 0
    lanes = min(tile.lanes, 1 << (problem.width.bit_length() - 1))
    if tile.slides:
        columns = tile.columns(problem)
        return problem.width % columns == 0 and (tile.masked(problem) or columns % lanes == 0)
    return problem.width % lanes == 0
