"""Layers as the planes kernel sees them, and their packed weights, for tests of tiles and bands."""

from itertools import product

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import column_tiles, join, pack
from tvm_pivot.planes import SLACK, AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.pack_layer import panel_runs, panel_tables, tables_of
from tvm_pivot.schedules.block_sparse import BEYOND
from tvm_pivot.schedules.problems import Epilogue, PlanesProblem

PLAIN = Epilogue()


@st.composite
def geometries(draw, unfolded):
    """Convolutions that lay out planes, of up to 17 x 17 pixels."""
    axes = []
    for _ in range(2):
        kernel, stride = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2]))
        dilation = draw(st.integers(1, 2))
        reach = (kernel - 1) * dilation
        same = draw(st.booleans())
        pads = [reach // 2, reach - reach // 2] if same else [draw(st.integers(0, reach))] * 2
        axes.append(AxisGeometry(draw(st.integers(reach + 1, 17)), kernel, stride, dilation, *pads))
    g = ConvGeometry(
        draw(st.integers(1, 2)), draw(st.integers(1, 5)), 8, *axes, unfolded=draw(unfolded)
    )
    assume(not g.direct)
    return g


def problem_of(g, rows, row_blocks, epilogue=PLAIN):
    height, width, taps = g.y.output, g.x.output, g.y.kernel * g.x.kernel
    if g.pitch == width:
        height, width = 1, height * width
    pitch = width if height == 1 else g.pitch
    columns = g.channels // g.groups * taps
    return PlanesProblem(
        g.batch, g.image_floats, columns, g.outputs, row_blocks, rows,
        height, width, pitch, epilogue, taps, g.groups, len(g.y.phases) * g.x.kernel, g.y.halo,
        len(g.y.phases) * len(g.plane_starts), 0 if g.unfolded else g.x.halo,
    )  # fmt: skip


def convolution(g, weight, x, bias, residual, epilogue):
    """The convolution in float64, and the sum of the magnitudes."""
    x = np.pad(x, [(0, 0), (0, 0), *((max(a.before, 0), max(a.after, 0)) for a in (g.y, g.x))])
    shape = (g.outputs, g.channels // g.groups, g.y.kernel, g.x.kernel)

    def conv(w, image):
        return torch.nn.functional.conv2d(
            torch.from_numpy(image.astype(float)),
            torch.from_numpy(w.reshape(shape).astype(float)),
            stride=(g.y.stride, g.x.stride),
            dilation=(g.y.dilation, g.x.dilation),
            groups=g.groups,
        ).numpy()

    value = conv(weight, x) + bias[:, None, None]
    magnitude = conv(abs(weight), abs(x)) + abs(bias)[:, None, None]
    if epilogue.residual:
        value, magnitude = value + residual, magnitude + abs(residual)
    low = -np.inf if epilogue.low is None else epilogue.low
    high = np.inf if epilogue.high is None else epilogue.high
    return np.clip(value, low, high), magnitude


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
            unroll=tile.unroll(problem),
            columns=g.offsets(group) if places is None else places,
            tiles=tile.k_tiles,
            tile_of=tile_of,
            runs=tile.runs,
            run_of=panel_runs(g, tile),
        )
        for group, part in enumerate(np.split(weight, g.groups))
    ]
    return join(parts), [] if lines is None else [lines]


def random_planes(g, rng):
    """Images as planes, with zeros around them: float32 [batch, image_floats]."""
    if g.direct:
        return rng.standard_normal((g.batch, g.image_floats)).astype(np.float32)
    phases = len(g.y.phases), len(g.x.phases)
    planes = np.zeros((g.batch, g.channels, *phases, g.plane_height, g.pitch), np.float32)
    for a, phase_y in enumerate(g.y.phases):
        rows = slice(*g.y.filled(phase_y, g.plane_height))
        for b, phase_x in enumerate(g.x.phases):
            part = planes[:, :, a, b, rows, slice(*g.x.filled(phase_x, g.pitch))]
            part[...] = rng.standard_normal(part.shape)
    return np.pad(planes.reshape(g.batch, -1), [(0, 0), (0, SLACK)])


def planes_of(g, parts, x):
    """The planes by definition: float32 [batch * parts, image_floats]."""
    part, starts = g.in_parts(parts), g.plane_starts
    shape = (g.batch, parts, g.channels, len(g.y.phases), len(starts), part.plane_height, g.pitch)
    found = np.zeros(shape, np.float32)
    for p, (a, phase), (b, (column, cell)), row in product(
        range(parts), enumerate(g.y.phases), enumerate(starts), range(part.plane_height)
    ):
        y = g.y.source(phase, p * part.y.output + row)
        at = g.x.source(g.x.phases[column], cell + np.arange(g.pitch))
        inside = (at >= 0) & (at < g.x.size)
        if 0 <= y < g.y.size:
            found[:, p, :, a, b, row, inside] = x[:, :, y, at[inside]].transpose(2, 0, 1)
    return np.pad(found.reshape(g.batch * parts, -1), [(0, 0), (0, SLACK)])


def tables_for(packed, bias, more=()):
    """What a planes kernel takes between its planes and its residual, for a bias [rows]."""
    return list(tables_of(packed, tuple(more), beyond=BEYOND)(bias))


def drawn_weight(draw: st.DrawFn, g: ConvGeometry, rows: int) -> np.ndarray:
    """A weight matrix of R x 1 blocks, of which none, some or all are kept."""
    columns = g.channels // g.groups * g.y.kernel * g.x.kernel
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    mask = rng.random((-(-g.outputs // rows), columns)) < draw(st.sampled_from([0.0, 0.1, 0.6, 1]))
    mask = np.repeat(mask, rows, axis=0)[: g.outputs]
    return np.where(mask, rng.standard_normal(mask.shape), 0).astype(np.float32)
