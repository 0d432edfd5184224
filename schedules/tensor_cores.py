"""Tensor-core kernels of the CUDA target: what they compute, their choices, and the functions.

The kernel itself is CUDA text (`cuda_tensor_core.cuh`, on the instructions of `cuda_ptx.cuh`):
matrix fragments, asynchronous copies and barriers have no form in TIR. A function here names the
sizes, as constants of a C++ struct, and launches it.

Shared by the kernel and the packer: a layer's row blocks are dealt out to *teams*, one for each
thread block, and teams that share what they read form a *crew* (see `pack_tensor_cores`).
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
from tvm import te, tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from ..fragments import STEP, OperandType
from ..layout import IntArray
from ..pack_tensor_cores import TeamShape
from ..planes import AxisGeometry
from .block_sparse_moves import SCHEDULED
from .problems import Epilogue

WARP = 32
# A row of a slab is so many pixels longer than it needs: rows under each other in different banks.
SLAB_PADDING = 8
COPY_BYTES = 16

Loader = Literal["bulk", "async", "gather"]
_LOADER = {"bulk": "kBulk", "async": "kAsync", "gather": "kGather"}


@dataclass(frozen=True)
class TensorCoreProblem:
    """A layer as the tensor-core kernel sees it; equal problems share one compiled kernel.

    Attributes:
        images: of the batch.
        outputs: rows N of the weight matrix, the output channels.
        columns: columns K of the weight matrix.
        pixels: output pixels of an image.
        image_halves: elements of one image of the input.
        block_rows: R: 8, 16 or 32.
        row_blocks: row blocks of the weight, at least N / R.
        dtype: of what is multiplied. Input, weight and residual are stored so, ``"tf32"`` as
            float32 that is rounded to tf32 before; sums and bias are float32.
        out_dtype: of the output: `dtype` or ``"float32"``; with tf32 always that.
        epilogue: what is fused behind the sum.
        window: the axes (y, x) of a convolution over unpadded images. None: a column is a run of
            `pixels` elements of the image; 1 x 1, or a dense layer whose rows are the pixels.
        block_columns: columns that are mostly kept or dropped together, for the choice of a tile.
    """

    images: int
    outputs: int
    columns: int
    pixels: int
    image_halves: int
    block_rows: int
    row_blocks: int
    dtype: OperandType
    out_dtype: str
    epilogue: Epilogue
    window: tuple[AxisGeometry, AxisGeometry] | None = None
    block_columns: int = 1

    @property
    def aligned(self) -> bool:
        """The input can be copied in pieces of 16 bytes."""
        sizes = (self.pixels, self.image_halves)
        together = COPY_BYTES // self.element_bytes
        return self.window is None and all(size % together == 0 for size in sizes)

    @property
    def storage(self) -> str:
        """The dtype in which input and residual lie in memory."""
        return "float32" if self.dtype == "tf32" else self.dtype

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the input, the weight and the residual."""
        return 4 if self.dtype == "tf32" else 2

    @property
    def axes(self) -> tuple[AxisGeometry, AxisGeometry]:
        """The axes (y, x) of the convolution that this is, be it 1 x 1."""
        return self.window or (AxisGeometry(1, 1), AxisGeometry(self.pixels, 1))

    @property
    def output(self) -> tuple[int, int, int]:
        """The output's shape: [images, outputs, pixels]."""
        return (self.images, self.outputs, self.pixels)


@dataclass(frozen=True)
class TensorCoreTile:
    """One point of the kernel's schedule space.

    Attributes:
        warp_rows, warp_columns: warps that compute, over row blocks and over pixels.
        blocks: row blocks of a warp.
        warp_pixels: pixels of a warp, a multiple of 32.
        slab: columns of a slab, a multiple of 8.
        slots: slabs in shared memory.
        ahead: steps whose weights are on their way.
        cluster: thread blocks that share the columns they read; 1 before sm_90.
        producers: warps that copy.
        loader: how: by ``"bulk"`` copies (sm_90), ``"async"`` ones, or element by element, which
            any window and alignment allow (``"gather"``).
        grid: thread blocks.
        element_bytes: those of the problem.
    """

    warp_rows: int
    warp_columns: int
    blocks: int
    warp_pixels: int
    slab: int
    slots: int
    ahead: int
    cluster: int
    producers: int
    loader: Loader
    grid: int
    element_bytes: int = 2

    @property
    def consumers(self) -> int:
        """Warps that compute."""
        return self.warp_rows * self.warp_columns

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return WARP * (self.consumers + self.producers)

    @property
    def pixels(self) -> int:
        """Pixels of a thread block."""
        return self.warp_columns * self.warp_pixels

    @property
    def pitch(self) -> int:
        """Bytes from one column to the next in a slab."""
        return self.element_bytes * (self.pixels + SLAB_PADDING)

    def team(self, block_rows: int) -> TeamShape:
        """What the packer has to know."""
        return TeamShape(
            block_rows,
            self.blocks,
            self.warp_rows,
            self.cluster,
            self.slab,
            self.pitch,
            self.ahead,
        )

    def shared_bytes(self, block_rows: int) -> int:
        """Shared memory of a thread block: barriers, slabs, and weights on their way."""
        places = 4 * WARP if self.element_bytes == 2 else 16 * WARP
        step = self.element_bytes * STEP * block_rows + places
        barriers = -(-16 * self.slots // 128) * 128
        rings = self.consumers * self.ahead * step
        return barriers + self.slots * self.slab * self.pitch + rings


def window_columns(
    channels: int, window: tuple[AxisGeometry, AxisGeometry]
) -> tuple[IntArray, IntArray]:
    """The offset and the tap of each weight column of a convolution over unpadded images.

    int32 [channels * kh * kw] each, columns in the order (channel, ky, kx); offsets count from
    where the first tap of the output pixel reads.
    """
    y, x = window
    channel = np.arange(channels)[:, None, None] * (y.size * x.size)
    ky, kx = np.arange(y.kernel)[:, None], np.arange(x.kernel)
    offsets = channel + ky * (y.dilation * x.size) + kx * x.dilation
    taps = np.broadcast_to(ky * x.kernel + kx, offsets.shape)
    return offsets.ravel().astype(np.int32), taps.ravel().astype(np.int32)


def _constants(problem: TensorCoreProblem, tile: TensorCoreTile) -> dict[str, int | bool | str]:
    """The sizes that the kernel's text knows by name."""
    y, x = problem.axes
    epilogue = problem.epilogue
    return {
        "kRows": problem.block_rows,
        "kBlocks": tile.blocks,
        "kWarpPixels": tile.warp_pixels,
        "kWarpRows": tile.warp_rows,
        "kWarpColumns": tile.warp_columns,
        "kSlab": tile.slab,
        "kSlots": tile.slots,
        "kAhead": tile.ahead,
        "kCluster": tile.cluster,
        "kTeams": tile.team(problem.block_rows).teams(problem.row_blocks),
        "kProducers": tile.producers,
        "kLoader": _LOADER[tile.loader],
        "kImages": problem.images,
        "kImagePixels": problem.pixels,
        "kImageHalves": problem.image_halves,
        "kOutputs": problem.outputs,
        "kBfloat": problem.dtype == "bfloat16",
        "kWide": problem.dtype == "tf32",
        "kFloatOut": problem.out_dtype == "float32",
        "kResidual": epilogue.residual,
        "kHasLow": epilogue.low is not None,
        "kHasHigh": epilogue.high is not None,
        "kWidth": x.output,
        "kInputHeight": y.size,
        "kInputWidth": x.size,
        "kTapsY": y.kernel,
        "kTapsX": x.kernel,
        "kStrideY": y.stride,
        "kStrideX": x.stride,
        "kDilationY": y.dilation,
        "kDilationX": x.dilation,
        "kPadY": y.before,
        "kPadX": x.before,
    }


TABLES = (
    ("slab_begin", "int"),
    ("columns", "int2"),
    ("taken", "int"),
    ("counts", "unsigned char"),
    ("first", "int"),
    ("places", "int"),
    ("weights", "unsigned"),
    ("rows", "int"),
    ("bias", "float"),
)


@cache
def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def kernel_name(problem: TensorCoreProblem, tile: TensorCoreTile) -> str:
    """A name that differs between kernels that differ."""
    key = repr((sorted(asdict(problem).items()), sorted(asdict(tile).items())))
    return f"tensor_core_{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def kernel_source(problem: TensorCoreProblem, tile: TensorCoreTile) -> str:
    """CUDA text of a device function `kernel_name`: X, the tables, the bias, residual, Y, shared.

    Several of these texts can stand in one file.
    """
    name, sizes = kernel_name(problem, tile), []
    for key, value in _constants(problem, tile).items():
        kind = {bool: "bool", str: "Loader"}.get(type(value), "int")
        text = str(value).lower() if isinstance(value, bool) else value
        sizes.append(f"  static constexpr {kind} {key} = {text};")
    bounds = (("low", problem.epilogue.low), ("high", problem.epilogue.high))
    sizes += [f"  PIVOT_DEVICE float {k}() {{ return {float(v or 0)!r}f; }}" for k, v in bounds]
    tables = [f"static_cast<const {kind}*>({table})" for table, kind in TABLES]
    arguments = ["x", *(table for table, _ in TABLES), "residual"]
    lines = [
        *map(_text, ("cuda_ptx.cuh", "cuda_slabs.cuh", "cuda_tensor_core.cuh")),
        f"namespace pivot {{\nstruct {name} {{",
        *sizes,
        "};\n}  // namespace pivot",
        f"static __device__ __forceinline__ void {name}(",
        f"    {', '.join(f'const void* {a}' for a in arguments)}, void* y, void* shared) {{",
        f"  const pivot::Tables tables{{{', '.join(tables)}}};",
        f"  pivot::tensor_core<pivot::{name}>(x, tables, residual, y, shared);",
        "}\n",
    ]
    return "\n".join(lines)


def entry_source(problem: TensorCoreProblem, tile: TensorCoreTile) -> str:
    """`kernel_source` and a kernel ``entry_`` + `kernel_name` with the same arguments but the last,
    for use without TVM: it knows its cluster, and takes its shared memory at the launch.
    """
    name = kernel_name(problem, tile)
    arguments = ["x", *(table for table, _ in TABLES), "residual"]
    cluster = f"__cluster_dims__({tile.cluster}, 1, 1) " if tile.cluster > 1 else ""
    return f"""{kernel_source(problem, tile)}
extern "C" __global__ void {cluster}__launch_bounds__({tile.threads}, 1) entry_{name}(
    {", ".join(f"const void* __restrict__ {a}" for a in arguments)}, void* __restrict__ y) {{
  extern __shared__ __align__(64) unsigned char shared[];
  {name}({", ".join(arguments)}, y, shared);
}}
"""


def tensor_core_kernel(problem: TensorCoreProblem, tile: TensorCoreTile) -> tirx.PrimFunc:
    """The kernel.

    Arguments: X `storage` [images, image_halves]; the tables of `PackedFragments`, in their order;
    bias float32 [slots] (see `PackedFragments.slot_bias`); the residual `storage`
    [images, outputs, pixels], if one is fused; Y `out_dtype` [images, outputs, pixels].
    """
    with IRBuilder() as builder, build.prim_func():
        build.func_attr({SCHEDULED: True, "tirx.noalias": True})
        _body(problem, tile)
    return builder.get()


def _argument(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    return build.arg(name, build.buffer(shape, dtype))


def _body(problem: TensorCoreProblem, tile: TensorCoreTile) -> None:
    r, team = problem.block_rows, tile.team(problem.block_rows)
    teams = team.teams(problem.row_blocks)
    slabs, steps = te.var("slabs", "int32"), te.var("steps", "int32")
    x = _argument("X", (problem.images, problem.image_halves), problem.storage)
    cells = (tile.cluster, tile.warp_rows, tile.blocks)
    owned = (teams, tile.warp_rows, tile.blocks, r)
    tables = [
        _argument("slab_begin", (teams // tile.cluster + 1,), "int32"),
        _argument("columns", (slabs, tile.slab, 2), "int32"),
        _argument("taken", (slabs, tile.cluster), "int32"),
        _argument("counts", (slabs, *cells), "uint8"),
        _argument("first", (teams, tile.warp_rows), "int32"),
        _argument("places", (steps, STEP), "int32"),
        _argument("weights", (steps, STEP * r), f"uint{8 * problem.element_bytes}"),
        _argument("rows", owned, "int32"),
        _argument("bias", owned, "float32"),
    ]
    residual = x
    if problem.epilogue.residual:
        residual = _argument("residual", problem.output, problem.storage)
    y = _argument("Y", problem.output, problem.out_dtype)
    launch = {"blockIdx.x": tile.grid, "threadIdx.x": tile.threads}
    if tile.cluster > 1:
        launch["clusterCtaIdx.x"] = tile.cluster
    with ExitStack() as stack:
        for axis, extent in launch.items():
            stack.enter_context(build.launch_thread(axis, extent))
        # Without it the compiler saves registers, and spills, for a second block that has no room.
        stack.enter_context(build.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 1))
        _call(problem, tile, [x, *tables, residual], y)


def _call(problem: TensorCoreProblem, tile: TensorCoreTile, inputs: list[Any], y: Any) -> None:
    shared_bytes = tile.shared_bytes(problem.block_rows)
    shared = build.alloc_buffer((shared_bytes,), "uint8", scope="shared.dyn")
    build.evaluate(
        cuda_func_call(
            kernel_name(problem, tile),
            *(buffer.access_ptr("r") for buffer in inputs),
            y.access_ptr("w"),
            shared.access_ptr("rw"),
            source_code=kernel_source(problem, tile),
        )
    )
