"""A layer's kernel and its tables: its weights packed the way the chosen tile walks them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from ..layout import BlockShape, FloatArray, IntArray, PackedWeight, SlicedWeight
from ..pack import column_tiles, join, pack
from ..planes import ConvGeometry
from ..schedules.problems import Panel, PlanesProblem, PlanesTile
from .layers import Layer, Plan

Tables = Callable[[FloatArray], tuple[npt.NDArray[Any], ...]]


@dataclass(frozen=True, eq=False)
class LayerKernel:
    """A layer's kernel.

    Attributes:
        key: equal keys ask for the same kernel.
        make: makes it.
        output: the shape of what it returns.
        tables: what it takes between its input and its residual, for a bias float32 [N].
        dtype: of what it reads and returns.
        residual: the shape of what it adds, if that is another than `output`.
    """

    key: object
    make: Callable[[], tirx.PrimFunc]
    output: tuple[int, ...]
    tables: Tables
    dtype: str = "float32"
    residual: tuple[int, ...] = ()


def tables_of(
    packed: PackedWeight | SlicedWeight,
    more: tuple[npt.NDArray[Any], ...] = (),
    dtype: str = "float32",
    beyond: int = 0,
) -> Tables:
    """The tables of a packed weight, of `dtype`.

    Args:
        packed: the weight.
        more: tables that follow the bias.
        dtype: of weights and bias.
        beyond: zeros behind the index.
    """
    index = np.pad(packed.index, (0, beyond)) if beyond else packed.index
    return lambda bias: (
        packed.indptr,
        index,
        packed.data.astype(dtype, copy=False),
        packed.rows,
        bias[packed.rows].astype(dtype, copy=False),
        *more,
    )


def pack_planes_layer(
    layer: Layer, plan: Plan, problem: PlanesProblem, tile: PlanesTile
) -> tuple[PackedWeight, tuple[IntArray, ...]]:
    """The packed weight of all channel groups, and the tables that only a panel needs.

    Without a panel the index holds offsets in the planes; with one it holds rows of the panel, and
    the offsets of its lines are a table of their own.
    """
    geometry, columns = layer.geometry, layer.matrix.shape[1]
    lines, places = panel_tables(geometry, problem, tile) if tile.panel else (None, None)
    parts = [
        pack(
            matrix,
            BlockShape(plan.block_rows),
            unroll=tile.unroll(problem),
            slots=plan.slots[group],
            columns=geometry.offsets(group) if places is None else places,
            keep_all=plan.keep_all,
            tiles=tile.k_tiles,
            tile_of=column_tiles(columns, tile.k_tiles, problem.taps),
            runs=tile.runs,
            run_of=panel_runs(geometry, tile),
        )
        for group, matrix in enumerate(layer.group_matrices())
    ]
    return join(parts), () if lines is None else (lines,)


def panel_tables(
    geometry: ConvGeometry, problem: PlanesProblem, tile: PlanesTile
) -> tuple[IntArray, IntArray]:
    """The offset of each line, and for each column the row of its tile's panel that it starts at.

    int32 [channels * lines] and int32 [columns].
    """
    panel = Panel(problem, tile)
    offset, line, down = geometry.lines(shared=tile.slides > 0)
    if problem.compact:  # every column is a line
        offset = geometry.offsets()
        line = np.arange(problem.columns, dtype=np.int32)
        down = np.zeros_like(line)
    copies = np.arange(panel.copies)
    offset = (offset[:, None] + copies * geometry.pitch).ravel().astype(np.int32)
    line, down = line * panel.copies + down % panel.copies, down - down % panel.copies
    tile_of = column_tiles(problem.columns, tile.k_tiles, problem.taps)
    first = np.minimum(tile_of * panel.channels, problem.channels - panel.channels)
    place: IntArray = ((line - first * panel.lines) * panel.height + down).astype(np.int32)
    return offset, place


def panel_runs(geometry: ConvGeometry, tile: PlanesTile) -> IntArray | None:
    """The run of each column, int32 [columns]; None: there is one. The farthest right go first."""
    return tile.slides - geometry.shifts() if tile.slides else None
