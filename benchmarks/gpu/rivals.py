"""What a layer or a network is compared with: other ways to run it with torch, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.timing import graphed

Run = Callable[[], Any]

# Rivals that come first are most important, or quickest to prepare.
DENSE, SPARSE, COMPILED = range(3)
TRITON_BLOCKS = (16, 32)


@dataclass(frozen=True)
class Rival:
    """One way to compute the same.

    Attributes:
        name: for the results.
        stage: when it is measured.
        make: prepares it; raises whatever it likes.
        same: whether it has the same weights, so that its results can be checked.
    """

    name: str
    stage: int
    make: Callable[[], Run]
    same: bool = True


def _set_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def plain(run: Run, tf32: bool = False) -> Run:
    """`run` without autograd, and with TF32 on or off while it starts its kernels."""

    def step() -> Any:
        _set_tf32(tf32)
        with torch.inference_mode():
            return run()

    return step


def layer_rivals(weight: Any, x: Any, block: tuple[int, int], mode: str) -> Iterator[Rival]:
    """Rivals of ``x @ weight.T``, two matrices of one dtype on one device.

    Args:
        weight: [outputs, columns], zeros in it.
        x: [inputs, columns].
        block: rows and columns that are kept or dropped together.
        mode: of torch.compile.
    """
    linear = torch.nn.functional.linear
    for tf32, note in _precisions(weight.dtype):
        yield Rival(
            f"torch dense{note}", DENSE, lambda on=tf32: plain(lambda: linear(x, weight), on)
        )
        yield Rival(f"Triton blocks{note}", SPARSE, partial(_triton, weight, x, block, tf32))
        yield Rival(
            f"torch.compile{note}",
            COMPILED,
            lambda on=tf32: plain(partial(torch.compile(linear, mode=mode), x, weight), on),
        )
    yield Rival("torch 2:4", SPARSE, lambda: _semi_structured(weight, x), same=False)
    yield Rival("torch BSR", SPARSE, lambda: _block_sparse(weight, x, block))


def _precisions(dtype: Any) -> tuple[tuple[bool, str], ...]:
    if dtype != torch.float32:
        return ((False, ""),)
    return ((False, ", TF32 off"), (True, ", TF32 on"))


def _triton(weight: Any, x: Any, block: tuple[int, int], tf32: bool) -> Run:
    if block[0] != block[1] or block[0] not in TRITON_BLOCKS:
        raise ValueError(f"made for 16x16 and 32x32 blocks, not {block[0]}x{block[1]}")
    from benchmarks.gpu.triton_blocks import linear

    return plain(linear(weight, block[0], x, tf32), tf32)


def _semi_structured(weight: Any, x: Any) -> Run:
    """A layer of the same shape with two of four weights kept."""
    mask = torch.tensor([0, 0, 1, 1], device=weight.device, dtype=weight.dtype)
    mask = mask.tile(weight.shape[0], weight.shape[1] // 4)
    half = torch.sparse.to_sparse_semi_structured(torch.randn_like(weight) * mask)
    return plain(lambda: torch.nn.functional.linear(x, half))


def _block_sparse(weight: Any, x: Any, block: tuple[int, int]) -> Run:
    """The layer in torch's block-sparse format: [outputs, inputs] from [columns, inputs]."""
    sparse, turned = weight.to_sparse_bsr(block), x.T.contiguous()
    return plain(lambda: (sparse @ turned).T)


def network_rivals(make: Callable[[], tuple[Any, Any]], dtype: Any, mode: str) -> Iterator[Rival]:
    """Rivals of a network; `make` returns its torch module and an input, of `dtype`, on the GPU."""

    def prepared() -> tuple[Any, Any]:
        module, x = make()
        if x.ndim == 4:
            module = module.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
        return module, x

    def eager(tf32: bool) -> Run:
        module, x = prepared()
        return plain(lambda: module(x), tf32)

    def compiled(tf32: bool) -> Run:
        module, x = prepared()
        return plain(partial(torch.compile(module, mode=mode), x), tf32)

    for tf32, note in _precisions(dtype):
        yield Rival(f"torch dense{note}", DENSE, partial(eager, tf32))
        yield Rival(f"torch dense, CUDA graph{note}", SPARSE, lambda on=tf32: graphed(eager(on)))
        yield Rival(f"torch.compile{note}", COMPILED, partial(compiled, tf32))
