"""Depthwise convolutions as their kernel sees them, and the tiles that it can have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..planes import AxisGeometry, ConvGeometry
from ..targets import PivotTarget
from .core_costs import core_costs
from .cpu_tiles import PARALLEL_CYCLES
from .problems import Epilogue

# Output rows of a block: 3 x 3 taps read few rows twice, and the code of 5 x 5 stays short.
MOST_ROWS = 8
MOST_PRODUCTS = 108
LEAST_LANES = 4
MOST_TAPS = 49
# Measured on one AVX-512 machine: cycles around a channel, of an output vector besides its
# multiply-adds, and of picking its pixels out of the phases of a stride.
CHANNEL_CYCLES = 8.0
VECTOR_CYCLES = 1.0
PHASE_CYCLES = 5.0
# A vector of the input that another block has read too: half a load. It tells tiles apart.
AGAIN_CYCLES = 0.5
# Beyond the rule's reach: rows of a block and vectors beside each other, and their products.
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
VECTORS = (1, 2, 3, 4)
WIDE_PRODUCTS = 2 * MOST_PRODUCTS


@dataclass(frozen=True)
class DepthwiseProblem:
    """A depthwise convolution; equal problems share one compiled kernel.

    Attributes:
        batch: images.
        channels: of the input, each of which ``rows / channels`` outputs read.
        rows: output channels.
        y, x: the two spatial axes.
        epilogue: what is fused behind the sum.
    """

    batch: int
    channels: int
    rows: int
    y: AxisGeometry
    x: AxisGeometry
    epilogue: Epilogue

    @classmethod
    def of(cls, geometry: ConvGeometry, epilogue: Epilogue) -> DepthwiseProblem:
        """A convolution with as many groups as channels."""
        g = geometry
        return cls(g.batch, g.channels, g.outputs, g.y, g.x, epilogue)

    @property
    def taps(self) -> int:
        """Weights of a channel."""
        return self.y.kernel * self.x.kernel

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The output's shape: [batch, channels, height, width]."""
        return (self.batch, self.rows, self.y.output, self.x.output)


@dataclass(frozen=True)
class DepthwiseTile:
    """One point of the depthwise kernel's schedule space.

    Attributes:
        lanes: pixels of a vector.
        vectors: vectors of an output row that are computed together.
        group_rows: output rows of a block, which walks the input rows that they read once.
        parallel: cores share the channels.
    """

    lanes: int
    vectors: int
    group_rows: int
    parallel: bool

    @property
    def width(self) -> int:
        """Pixels of an output row that are computed together."""
        return self.lanes * self.vectors


def depthwise_problem(
    geometry: ConvGeometry, epilogue: Epilogue, target: PivotTarget
) -> DepthwiseProblem | None:
    """The layer as the kernel sees it; None where the kernel does not fit.

    It takes one channel per group, a stride of 1 or 2 along rows, and planes of at least a vector.
    """
    y, x = geometry.y, geometry.x
    if geometry.groups != geometry.channels or x.stride > 2 or x.output < 2:
        return None
    problem = DepthwiseProblem.of(geometry, epilogue)
    if not _lanes(problem, target) or not 1 < y.kernel * x.kernel <= MOST_TAPS:
        return None
    return problem


def choose_depthwise(problem: DepthwiseProblem, target: PivotTarget) -> DepthwiseTile:
    """The rule's tile, for one core: of the fewest vectors the shortest, rows that waste least.

    The problem is one of `depthwise_problem`.
    """
    width = problem.x.output
    lanes = min(_lanes(problem, target), key=lambda lanes: (-(-width // lanes), lanes))
    return DepthwiseTile(lanes, 1, _block_rows(problem.y, problem.taps), False)


def share_depthwise(
    problem: DepthwiseProblem, tile: DepthwiseTile, target: PivotTarget
) -> DepthwiseTile:
    """The tile for all cores of the target, where they are worth it."""
    cycles = core_costs(target).depthwise * depthwise_cycles(problem, target)
    parallel = target.cores > 1 and cycles > PARALLEL_CYCLES
    return replace(tile, parallel=parallel)


def depthwise_space(problem: DepthwiseProblem, target: PivotTarget) -> Iterator[DepthwiseTile]:
    """The tiles that the kernel may have, for one core, each once; the rule's comes first."""
    rule = choose_depthwise(problem, target)
    yield rule
    height, width = problem.y.output, problem.x.output
    for lanes in _lanes(problem, target):
        for vectors in VECTORS:
            if vectors > 1 and vectors * lanes > width:
                continue
            for rows in sorted({min(rows, height) for rows in ROWS}):
                tile = DepthwiseTile(lanes, vectors, rows, False)
                if rows * vectors * problem.taps <= WIDE_PRODUCTS and tile != rule:
                    yield tile


def depthwise_cycles(problem: DepthwiseProblem, target: PivotTarget) -> float:
    """Predicted cycles on one core, with the rule's tile."""
    lanes = choose_depthwise(problem, target).lanes
    vectors = problem.y.output * -(-problem.x.output // lanes)
    channels = problem.batch * problem.rows
    return channels * (CHANNEL_CYCLES + vectors * _vector_cycles(problem, target))


def tile_cycles(problem: DepthwiseProblem, tile: DepthwiseTile, target: PivotTarget) -> float:
    """Predicted cycles of a tile on one core: what it computes or reads twice counts twice."""
    pieces = -(-problem.x.output // tile.width) * tile.vectors
    blocks = -(-problem.y.output // tile.group_rows)
    vectors = blocks * tile.group_rows * pieces
    again = max(0, rows_read(problem, tile) - tile.group_rows * problem.y.stride)
    cycles = vectors * _vector_cycles(problem, target)
    cycles += AGAIN_CYCLES * blocks * pieces * again * problem.x.kernel * problem.x.stride
    return problem.batch * problem.rows * (CHANNEL_CYCLES + cycles)


def rows_read(problem: DepthwiseProblem, tile: DepthwiseTile) -> int:
    """Input rows that a block of output rows reads."""
    y = problem.y
    return (tile.group_rows - 1) * y.stride + (y.kernel - 1) * y.dilation + 1


def _vector_cycles(problem: DepthwiseProblem, target: PivotTarget) -> float:
    """Cycles of a vector of the output."""
    cycles = problem.taps / target.fma_per_cycle + VECTOR_CYCLES
    return cycles + PHASE_CYCLES if problem.x.stride > 1 else cycles


def _lanes(problem: DepthwiseProblem, target: PivotTarget) -> list[int]:
    """Lengths of vectors that do not exceed a plane, longest first."""
    y, x = problem.y, problem.x
    plane = min(y.size * x.size, y.output * x.output)
    found, lanes = [], target.lanes
    while lanes >= LEAST_LANES:
        found += [lanes] if lanes <= plane else []
        lanes //= 2
    return found


def _block_rows(axis: AxisGeometry, taps: int) -> int:
    """The most rows of a block that waste the fewest where the last block overlaps."""
    most = min(MOST_ROWS, max(2, MOST_PRODUCTS // taps))
    if axis.output <= most:
        return axis.output
    return min((most, most - 1), key=lambda rows: -axis.output % rows)
