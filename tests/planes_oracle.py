"""Layers as the planes kernel sees them, and their packed weights, for tests of tiles and bands."""

import numpy as np
from hypothesis import strategies as st

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import column_tiles, join, pack
from tvm_pivot.planes import ConvGeometry
from tvm_pivot.relay_passes.pack_layer import panel_tables
from tvm_pivot.schedules.problems import Epilogue, PlanesProblem

PLAIN = Epilogue()


def problem_of(g, rows, row_blocks, epilogue=PLAIN):
    height, width, taps = g.y.output, g.x.output, g.y.kernel * g.x.kernel
    if g.pitch == width:
        height, width = 1, height * width
    pitch = width if height == 1 else g.pitch
    columns = g.channels // g.groups * taps
    return PlanesProblem(
        g.batch, g.image_floats, columns, g.outputs, row_blocks, rows,
        height, width, pitch, epilogue, taps, g.groups, len(g.y.phases) * g.x.kernel, g.y.halo,
    )  # fmt: skip


def packed_for(g, problem, weight, tile):
    """As the lowering does it: the packed weight, and the tables of a panel."""
    columns, taps = weight.shape[1], g.y.kernel * g.x.kernel
    tile_of = column_tiles(columns, tile.k_tiles, taps)
    lines, places = None, None
    if tile.panel:
        lines, places = panel_tables(g, problem, tile)
    parts = [
        pack(
            part,
            BlockShape(problem.block_rows),
            columns=g.offsets(group) if places is None else places,
            tiles=tile.k_tiles,
            tile_of=tile_of,
        )
        for group, part in enumerate(np.split(weight, g.groups))
    ]
    return join(parts), [] if lines is None else [lines]


def drawn_weight(draw: st.DrawFn, g: ConvGeometry, rows: int) -> np.ndarray:
    """A weight matrix of R x 1 blocks, of which none, some or all are kept."""
    columns = g.channels // g.groups * g.y.kernel * g.x.kernel
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    mask = rng.random((-(-g.outputs // rows), columns)) < draw(st.sampled_from([0.0, 0.1, 0.6, 1]))
    mask = np.repeat(mask, rows, axis=0)[: g.outputs]
    return np.where(mask, rng.standard_normal(mask.shape), 0).astype(np.float32)
