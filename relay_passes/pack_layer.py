"""The tables of a layer's planes kernel: its weights packed the way the chosen tile walks them."""

from __future__ import annotations

import numpy as np

from ..layout import BlockShape, IntArray, PackedWeight
from ..pack import column_tiles, join, pack
from ..schedules.block_sparse import tile_columns
from ..schedules.problems import PlanesTile
from .layers import Layer, Plan


def pack_planes_layer(
    layer: Layer, plan: Plan, tile: PlanesTile
) -> tuple[PackedWeight, tuple[IntArray, ...]]:
    """The packed weight of all channel groups, and the tables that only a panel needs.

    Without a panel the index holds offsets in the planes; with one it holds columns, counted from
    the first one of the panel, and the offsets are a table of their own.
    """
    geometry, columns = layer.geometry, layer.matrix.shape[1]
    taps = 1 if tile.panel else geometry.y.kernel * geometry.x.kernel
    tile_of = column_tiles(columns, tile.k_tiles, taps)
    parts = [
        pack(
            matrix,
            BlockShape(plan.block_rows),
            slots=plan.slots[group],
            columns=panel_columns(columns, tile.k_tiles) if tile.panel else geometry.offsets(group),
            keep_all=plan.keep_all,
            tiles=tile.k_tiles,
            tile_of=tile_of,
        )
        for group, matrix in enumerate(layer.group_matrices())
    ]
    return join(parts), (geometry.offsets(),) if tile.panel else ()


def panel_columns(columns: int, k_tiles: int) -> IntArray:
    """The place of each column in its tile's panel: int32 [columns]."""
    length = tile_columns(columns, k_tiles)
    first = np.minimum(column_tiles(columns, k_tiles, 1) * length, columns - length)
    place: IntArray = (np.arange(columns) - first).astype(np.int32)
    return place
