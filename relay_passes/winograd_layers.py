"""Layers of few channels as minimal filtering along their rows (see `winograd`): the rule's choice.

A stem takes a good part of a pruned network's time, since nobody prunes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax, tirx

from ..layout import FloatArray, PackedWeight
from ..pivot import natural_rows
from ..planes import ConvGeometry
from ..schedules import cpu_tiles, tile_rule
from ..schedules.block_sparse import BEYOND, planes_kernel
from ..schedules.block_sparse_moves import schedule_planes
from ..schedules.choices import Choice
from ..schedules.cost import packing_cycles, reading_cycles
from ..schedules.problems import Epilogue, PlanesProblem, PlanesTile
from ..schedules.winograd import POINTS, RowFilter, winograd_kernel
from ..targets import PivotTarget
from .detect import planes_problem
from .layers import Handover, Layer, Plan, PlannedLayer
from .pack_layer import LayerKernel, pack_planes_layer

# Input channels of a stem. With many, a layer may be pruned, and then zeros are worth more.
MOST_CHANNELS = 4
# Rows of a filter: with more, tiles are too low to save much; with one there is nothing to save.
TAPS = range(2, 5)
# Cycles per vector: of mixing the rows of a phase, and of summing products and storing a tile.
MIX_CYCLES, SUM_CYCLES = 30.0, 42.0
# Tiles of a band, beyond which nothing is gained.
MOST_TILES = 8
# Of level 2, for what a band lays out and computes.
BAND_SHARE = 0.5
# It must promise at least this much.
MARGIN = 0.9


def row_filter(
    layer: Layer, plan: Plan, epilogue: Epilogue, target: PivotTarget
) -> RowFilter | None:
    """The layer as minimal filtering; None where it cannot be."""
    found, g = RowFilter(layer.geometry), layer.geometry
    if target.family != "x86" or target.precision != "float32":
        return None
    if layer.op != "conv2d" or plan.form != "planes" or not plan.keep_all or epilogue.residual:
        return None
    stem = g.channels <= MOST_CHANNELS and g.groups == 1 and g.y.dilation == 1
    if not stem or found.taps not in TAPS or found.rows > g.y.output:
        return None
    # Without taps along x mixtures would be planes themselves.
    return None if found.mixed(1, 1, unfolded=False).direct else found


@dataclass(frozen=True)
class Band:
    """A band of tiles.

    Attributes:
        choice: how its kernel is made.
        cycles: predicted cycles on one core.
        floats: what it lays out.
    """

    choice: Choice
    cycles: float
    floats: int


@lru_cache(maxsize=256)
def best_band(found: RowFilter, tiles: int, target: PivotTarget) -> Band:
    """The band of so many tiles with the fewest predicted cycles."""
    return min(_bands(found, tiles, target), key=lambda band: band.cycles)


def _bands(found: RowFilter, tiles: int, target: PivotTarget) -> Iterator[Band]:
    g, one = found.geometry, replace(target, cores=1)
    stretches = found.phases * g.channels * tiles * -(-g.x.size // target.lanes)
    sums = g.outputs * tiles * -(-g.x.output // target.lanes)
    for rows in target.block_rows:
        for unfolded in (False, True) if rows <= g.outputs else ():
            mixed, entries = found.mixed(tiles, rows, unfolded), POINTS * found.columns
            problem = block_problem(mixed, rows, found.columns)
            tile, block = tile_rule(one).choose_planes(problem, entries, one)
            cycles = MIX_CYCLES * stretches + packing_cycles(mixed.image_floats, target)
            cycles += -(-g.outputs // rows) * block + SUM_CYCLES * sums
            choice = Choice("winograd", rows, tile, keep_all=True, unfolded=unfolded)
            choice = replace(choice, band_rows=tiles * found.rows)
            yield Band(choice, cycles, mixed.image_floats)


def block_problem(mixed: ConvGeometry, rows: int, columns: int) -> PlanesProblem:
    """One block of outputs, as the planes kernel sees it."""
    weights: FloatArray = np.zeros((POINTS * rows, columns), np.float32)
    return planes_problem(_layer(mixed, weights), _plan(mixed), Epilogue())


def choose_winograd(
    planned: PlannedLayer, epilogue: Epilogue, target: PivotTarget
) -> Choice | None:
    """How a layer is made so by itself; None where that is not predicted to be faster."""
    found = row_filter(planned.layer, planned.plan, epilogue, target)
    if found is None:
        return None
    choice, cycles = winograd_cycles(found, target)
    return choice if cycles < MARGIN * planned.plan.cycles else None


@lru_cache(maxsize=64)
def winograd_cycles(found: RowFilter, target: PivotTarget) -> tuple[Choice, float]:
    """The best choice for a layer by itself, and its predicted cycles on one core."""
    g, room = found.geometry, BAND_SHARE * target.l2_bytes
    # A line is read before it is written.
    written = 2.0 * reading_cycles(g.batch * g.outputs * g.y.output * g.x.output, target)
    points = []
    for tiles in range(1, min(MOST_TILES, g.y.output // found.rows) + 1):
        band = best_band(found, tiles, target)
        if tiles == 1 or 4 * band.floats <= room:
            count = g.batch * -(-g.y.output // band.choice.band_rows)
            points.append((band.choice, count * band.cycles + written))
    return min(points, key=lambda point: point[1])


def winograd_layer(
    layer: Layer,
    choice: Choice,
    epilogue: Epilogue,
    target: PivotTarget,
    handover: Handover | None,
) -> LayerKernel:
    """The kernel of a layer; see `winograd_kernel`."""
    found, tile, dtype = RowFilter(layer.geometry), choice.tile, target.precision
    assert isinstance(tile, PlanesTile)
    g, rows, tiles = layer.geometry, choice.block_rows, choice.band_rows // found.rows
    mixed = found.mixed(tiles, rows, choice.unfolded)
    problem = block_problem(mixed, rows, found.columns)
    follower = None if handover is None else handover.follower
    count = g.batch * -(-g.y.output // choice.band_rows)
    cycles = -(-count // target.cores) * best_band(found, tiles, target).cycles
    bands = cpu_tiles.share_bands(choice.band_rows, cycles, target)
    packed = _packed(found, layer, mixed, problem, tile)
    others = () if handover is None else handover.tables

    def make() -> tirx.PrimFunc:
        kernel = schedule_planes(planes_kernel(problem, tile, dtype), problem, tile)
        lanes = target.stored_lanes
        return winograd_kernel(kernel, found, mixed, bands, lanes, epilogue, follower)

    def tables(bias: FloatArray) -> tuple[npt.NDArray[Any], ...]:
        index, none = np.pad(packed.index, (0, BEYOND)), np.zeros(packed.rows.size, np.float32)
        return (packed.indptr, index, packed.data, packed.rows, none, bias, *others)

    output = (g.batch, g.outputs, g.y.output, g.x.output)
    if follower is not None:
        output = (*output[:2], follower.y.output, follower.x.output)
    key = (g, mixed, problem, tile, bands, epilogue, follower)
    return LayerKernel(key, make, output, tables, dtype)


def _layer(mixed: ConvGeometry, matrix: FloatArray) -> Layer:
    """The convolution of a block's mixtures as a layer."""
    shape = (mixed.outputs, mixed.channels // POINTS, 1, mixed.x.kernel)
    return Layer(relax.Var("mixed"), "conv2d", shape, matrix, mixed)


def _plan(mixed: ConvGeometry) -> Plan:
    rows = mixed.outputs // POINTS
    slots = (natural_rows(rows, rows),) * POINTS
    return Plan("planes", rows, False, True, 0, 0.0, slots, unfolded=mixed.unfolded)


def _packed(
    found: RowFilter, layer: Layer, mixed: ConvGeometry, problem: PlanesProblem, tile: PlanesTile
) -> PackedWeight:
    """Block after block of the outputs: `indptr` goes on, `rows` are those of one block."""
    weights = found.mix_weights(layer.matrix.reshape(layer.shape))
    rows = problem.block_rows
    parts = []
    for first in found.blocks(rows):
        matrix = weights[:, first : first + rows].reshape(POINTS * rows, -1)
        packed, _ = pack_planes_layer(_layer(mixed, matrix), _plan(mixed), problem, tile)
        parts.append(packed)
    steps = np.concatenate([np.diff(part.indptr) for part in parts])
    return replace(
        parts[0],
        indptr=np.concatenate([[0], np.cumsum(steps)]).astype(np.int32),
        index=np.concatenate([part.index for part in parts]),
        data=np.concatenate([part.data for part in parts]),
    )
