"""A block-sparse layer as one would write it in Triton: R x R blocks, float32 sums.

One program makes R outputs of some inputs: it walks the kept blocks of its row of blocks, and
multiplies each by the columns of the input that it meets. Importing this needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

_CONFIGS = [
    triton.Config({"TILE": tile}, num_warps=warps, num_stages=stages)
    for tile in (64, 128, 256)
    for warps in (4, 8)
    for stages in (3, 5)
]


@triton.autotune(configs=_CONFIGS, key=["inputs", "columns", "outputs"])
@triton.jit
def _kernel(
    x, blocks, places, starts, y, inputs, columns, outputs,
    SIZE: tl.constexpr, TILE: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    m = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, SIZE)
    precision: tl.constexpr = "tf32" if TF32 else "ieee"
    sums = tl.zeros((TILE, SIZE), tl.float32)
    for block in range(tl.load(starts + row), tl.load(starts + row + 1)):
        k = tl.load(places + block) * SIZE + inner
        some = tl.load(x + m[:, None] * columns + k[None, :], mask=m[:, None] < inputs, other=0.0)
        weight = tl.load(blocks + block * SIZE * SIZE + inner[None, :] * SIZE + inner[:, None])
        sums = tl.dot(some, weight, sums, input_precision=precision)
    at = y + m[:, None] * outputs + (row * SIZE + inner)[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), mask=m[:, None] < inputs)


def linear(weight: Any, size: int, x: Any, tf32: bool) -> Callable[[], Any]:
    """``x @ weight.T`` as a function; weight [outputs, columns] on the GPU, x [inputs, columns]."""
    packed = weight.to_sparse_bsr((size, size))
    blocks = packed.values().contiguous()
    starts, places = (i.to(torch.int32) for i in (packed.crow_indices(), packed.col_indices()))
    (inputs, columns), outputs = x.shape, weight.shape[0]
    y = torch.empty(inputs, outputs, device=x.device, dtype=x.dtype)

    def run() -> Any:
        grid = lambda how: (outputs // size, triton.cdiv(inputs, how["TILE"]))  # noqa: E731
        _kernel[grid](x, blocks, places, starts, y, inputs, columns, outputs, SIZE=size, TF32=tf32)
        return y

    return run
