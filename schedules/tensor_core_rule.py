"""Which tile of the tensor-core kernel a layer gets: the one with the shortest predicted time.

The prediction is a roofline: what each unit of the GPU has to do, at the rate it does it. It serves
to compare tiles with each other, and with a dense layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from ..fragments import STEP
from ..targets import Gpu
from .tensor_cores import WARP, Loader, TensorCoreProblem, TensorCoreTile

# Registers of a thread: what a warp needs beside its sums, and the most there are for up to 12
# warps.
OTHER_REGISTERS, MOST_REGISTERS = 60, 168
# By block rows. With 8 a step has twice the operands per sum: fewer sums fit beside them.
MOST_SUMS = {8: 64, 16: 128, 32: 128}
# In tf32 operands are twice as wide: beside the sums of eight warps, which get 168 registers each.
MOST_TF32_SUMS = 64
REGISTERS = 65536
# In clusters, eight warps of 32 rows by 128 pixels spill three registers on matrices of fewer row
# blocks, whose sizes the compiler folds in another way.
TALL = 128
MOST_PIXELS, MOST_SLOTS = 256, 16
# Thread blocks keep this much shared memory back.
RESERVED_SHARED = 1024
SHARED_BYTES_PER_CLOCK, PORT_BYTES_PER_CLOCK = 128, 64
# Multiprocessors of a cluster share a GPC, of which some have fewer than others.
GPC = 16
# Of the rate of Hopper's warpgroup instructions, what `mma.sync` reaches.
HOPPER_MMA_SHARE = 0.62
# Eight columns read at once still share banks, though spread out (see `spread_over_banks`).
BANK_CONFLICTS = 1.2
LAUNCH_SECONDS = 3e-6
# Floats that a multiprocessor rounds to tf32; assumed, like all other conversions of its time.
ROUNDED_PER_CLOCK = 16
# Clocks that a multiprocessor's copy engine takes for one bulk copy, however short.
BULK_COPY_CLOCKS = 8


@dataclass(frozen=True)
class Roofline:
    """What a kernel has to do, and how long each unit of the GPU takes for it, in seconds.

    Attributes:
        flops: of the tensor cores, filling included.
        l2_bytes: read from the level-2 cache or written to it.
        shared_bytes: written to shared memory and read from it.
        memory_bytes: of device memory, each array once.
        tensor, l2, port, shared, memory, copies, rounding: tensor cores, level-2 cache, the
            multiprocessors' ports to it, shared memory, device memory, the instructions of copying
            warps, and the rounding of inputs to tf32.
        rounds: by how much the last round of thread blocks, not full, stretches all this.
    """

    flops: float
    l2_bytes: float
    shared_bytes: float
    memory_bytes: float
    tensor: float
    l2: float
    port: float
    shared: float
    memory: float
    copies: float
    rounding: float
    rounds: float

    @property
    def seconds(self) -> float:
        """Predicted time of a launch."""
        inside = (self.tensor, self.l2, self.port, self.shared, self.copies, self.rounding)
        busiest = max(inside)
        return max(busiest * self.rounds, self.memory) + LAUNCH_SECONDS


def _steps_of_slab(problem: TensorCoreProblem, tile: TensorCoreTile, density: float) -> float:
    """Steps of a row block in a slab, on average."""
    kept = density * tile.slab
    if problem.block_columns >= STEP:
        return kept / STEP
    some = 1 - (1 - density) ** tile.slab
    return max(some, (kept + (STEP - 1) / 2 * some) / STEP)


def _needed(problem: TensorCoreProblem, density: float, row_blocks: int) -> float:
    """The share of columns that some of so many row blocks keep, if they keep them at random."""
    return 1 - (1 - density) ** min(row_blocks, problem.row_blocks)


def _tiles(problem: TensorCoreProblem, tile: TensorCoreTile) -> tuple[int, int]:
    """Tiles over pixels, and crews."""
    runs = -(-problem.pixels // tile.pixels) * problem.images
    if tile.loader == "gather":
        runs = -(-problem.pixels * problem.images // tile.pixels)
    team = tile.team(problem.block_rows)
    return runs, team.teams(problem.row_blocks) // team.crew


def roofline(
    problem: TensorCoreProblem, tile: TensorCoreTile, density: float, gpu: Gpu
) -> Roofline:
    """The roofline of `tile` for a weight that keeps `density` of its blocks."""
    runs, crews = _tiles(problem, tile)
    pixels, team = runs * tile.pixels, tile.team(problem.block_rows)
    teams, k, size = crews * team.crew, problem.columns, problem.element_bytes
    crew_share = _needed(problem, density, team.team_blocks * team.crew)
    slabs = max(1.0, crew_share * k / tile.slab)
    steps = problem.row_blocks * slabs * _steps_of_slab(problem, tile, density / crew_share)
    flops = 2.0 * steps * STEP * problem.block_rows * pixels
    weights = steps * (size * STEP * problem.block_rows + 4 * STEP)
    passes = weights * runs * tile.warp_columns
    arriving = teams * _needed(problem, density, team.team_blocks) * k * pixels * size
    output = float(size) * prod(problem.output) * (1 + problem.epilogue.residual)
    # Read element by element, the taps of a channel find what they share in level 1.
    taps = 1 if tile.loader != "gather" else prod(axis.kernel for axis in problem.axes)
    l2 = crews * crew_share * k / taps * pixels * size + passes + output
    conflicts = BANK_CONFLICTS if problem.block_columns < 8 else 1.0
    shared = arriving + 2 * passes + steps * STEP * pixels * size * conflicts + 2 * output
    memory = float(size) * problem.images * problem.image_halves + output + weights
    clocks = gpu.multiprocessors * gpu.clock_ghz * 1e9
    tensor_rate = gpu.tensor_fma * (HOPPER_MMA_SHARE if gpu.capability >= 90 else 1.0)
    tensor_rate /= size / 2  # tf32 has half the rate of 16 bits
    rounded = steps * STEP * pixels if problem.dtype == "tf32" else 0.0
    # One instruction moves 16 bytes for each lane; without alignment two of them move 4.
    bulk_copies = crews * crew_share * k * runs
    copies = {
        "bulk": bulk_copies * BULK_COPY_CLOCKS,
        "async": arriving / (16 * WARP),
        "gather": arriving / (size * WARP),
    }
    resident = max(1, tile.grid // tile.cluster)
    tiles = runs * crews
    return Roofline(
        flops,
        l2,
        shared,
        memory,
        flops / (2 * tensor_rate * clocks),
        l2 / (gpu.l2_gbs * 1e9),
        (arriving / taps + passes) / (PORT_BYTES_PER_CLOCK * clocks),
        shared / (SHARED_BYTES_PER_CLOCK * clocks),
        memory / (gpu.memory_gbs * 1e9),
        copies[tile.loader] / clocks,
        rounded / (ROUNDED_PER_CLOCK * clocks),
        _rounds(tiles, resident, tile, gpu),
    )


def _rounds(tiles: int, resident: int, tile: TensorCoreTile, gpu: Gpu) -> float:
    """Time of all rounds over that of tiles spread evenly over the multiprocessors."""
    per_processor = max(1.0, tile.grid / gpu.multiprocessors)
    rounds = -(-tiles // resident)
    return rounds * per_processor * gpu.multiprocessors / (tiles * tile.cluster)


def _grid(problem: TensorCoreProblem, tile: TensorCoreTile, gpu: Gpu) -> int:
    """Thread blocks: as many as there are tiles, or as the GPU holds at once."""
    runs, crews = _tiles(problem, tile)
    sums = tile.blocks * problem.block_rows * tile.warp_pixels // WARP
    registers = min(MOST_REGISTERS, -(-(sums + OTHER_REGISTERS) // 8) * 8)
    by_shared = gpu.shared_bytes // (tile.shared_bytes(problem.block_rows) + RESERVED_SHARED)
    # A quarter of the registers belongs to every fourth warp.
    by_registers = REGISTERS // 4 // (-(-tile.threads // (4 * WARP)) * WARP * registers)
    processors = gpu.multiprocessors
    if tile.cluster > 1:
        processors = processors // GPC * GPC
    held = max(1, min(by_shared, by_registers)) * processors // tile.cluster
    return min(runs * crews, max(1, held)) * tile.cluster


def _loaders(problem: TensorCoreProblem, gpu: Gpu) -> tuple[Loader, ...]:
    if not problem.aligned:
        return ("gather",)
    return ("bulk", "async") if gpu.capability >= 90 else ("async",)


def _warps(problem: TensorCoreProblem) -> Iterator[tuple[int, int, int, int]]:
    """(warp rows, warp columns, blocks, warp pixels) for which there are registers."""
    r = problem.block_rows
    for warp_rows, warp_columns in ((8, 1), (4, 2), (2, 4), (1, 8), (4, 1), (2, 2), (1, 4)):
        for blocks, warp_pixels in product((1, 2, 4, 8), (32, 64, 128)):
            sums = blocks * r * warp_pixels // WARP
            if (r, warp_rows, warp_pixels) == (32, 8, 128) and problem.row_blocks < TALL:
                continue
            if problem.dtype == "tf32" and warp_rows * warp_columns > 4 and sums > MOST_TF32_SUMS:
                continue
            if sums <= MOST_SUMS[r] and warp_columns * warp_pixels <= MOST_PIXELS:
                yield warp_rows, warp_columns, blocks, warp_pixels


def _shapes(problem: TensorCoreProblem, gpu: Gpu) -> Iterator[TensorCoreTile]:
    """Every tile that fits; its grid is still to be set."""
    r = problem.block_rows
    # Copied weights double as room for 32 staged sums of each row.
    size = problem.element_bytes
    ahead = {2: {8: 8, 16: 6, 32: 5}, 4: {8: 4, 16: 3, 32: 3}}[size][r]
    for loader, warps in product(_loaders(problem, gpu), _warps(problem)):
        pixels = warps[1] * warps[3]
        if loader == "gather" and pixels % (2 * WARP):
            continue
        producers = {"bulk": 1, "async": 4, "gather": pixels // (2 * WARP)}[loader]
        clusters = (1, 2, 4, 8) if loader == "bulk" else (1,)
        for slab, cluster in product((64, 128, 256, 512), clusters):
            empty = TensorCoreTile(*warps, slab, 0, ahead, cluster, producers, loader, 1, size)
            left = gpu.shared_bytes - RESERVED_SHARED - empty.shared_bytes(r) - 16 * MOST_SLOTS
            slots = min(MOST_SLOTS, left // (slab * empty.pitch))
            if slots >= 2:
                yield replace(empty, slots=slots)


def candidates(
    problem: TensorCoreProblem, density: float, gpu: Gpu
) -> Iterator[tuple[TensorCoreTile, Roofline]]:
    """Every tile that fits, with its roofline; see `choose_tensor_core_tile`."""
    if gpu.capability < 80 or problem.block_rows not in MOST_SUMS:
        return
    for shape in _shapes(problem, gpu):
        yield resized(problem, shape, density, gpu)


def resized(
    problem: TensorCoreProblem, tile: TensorCoreTile, density: float, gpu: Gpu
) -> tuple[TensorCoreTile, Roofline]:
    """The tile with as many thread blocks as the GPU has work and room for, and its roofline."""
    tile = replace(tile, grid=_grid(problem, tile, gpu))
    return tile, roofline(problem, tile, density, gpu)


def choose_tensor_core_tile(
    problem: TensorCoreProblem, density: float, gpu: Gpu
) -> tuple[TensorCoreTile, Roofline] | None:
    """The tile with the shortest predicted time, and its roofline, for a weight that keeps
    `density` of its blocks; None if the GPU has no instructions for the kernel (before sm_80).
    """
    found = candidates(problem, density, gpu)
    return min(found, key=lambda pair: pair[1].seconds, default=None)
