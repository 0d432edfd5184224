"""A few words in which the CUDA kernels are written: buffers, loops and vector copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from ..targets import WARP
from .block_sparse_moves import SCHEDULED

Shape = tuple[Any, ...]

ALL_LANES = 0xFFFFFFFF
# The widest access of one thread.
VECTOR_BYTES = 16
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


def kernel(body: Callable[[], None]) -> tirx.PrimFunc:
    """The function that `body` writes; it is complete, and no schedule is wanted for it."""
    with IRBuilder() as builder, build.prim_func():
        build.func_attr({SCHEDULED: True, "tirx.noalias": True})
        body()
    return builder.get()


def argument(name: str, shape: Shape, dtype: str) -> Any:
    """A parameter of the kernel, in the order of the calls."""
    return build.arg(name, build.buffer(shape, dtype))


def local(count: int, dtype: str = "float32") -> Any:
    """An array in registers: every index into it must be a constant."""
    return build.alloc_buffer((count,), dtype, scope="local")


def held(value: Any, dtype: str = "int32") -> Any:
    """`value`, computed once."""
    place = local(1, dtype)
    build.buffer_store(place, value, [0])
    return place[0]


def store(buffer: Any, value: Any, *index: Any) -> None:
    """``buffer[index] = value``."""
    build.buffer_store(buffer, value, list(index))


def as_float(value: Any) -> Any:
    """`value` as float32."""
    return value.astype("float32")


def zero(count: int) -> Any:
    """An array of `count` float32 zeros in registers."""
    sums = local(count)
    for i in range(count):
        store(sums, tirx.const(0, "float32"), i)
    return sums


def widest(count: int, dtype: str) -> int:
    """Elements of the widest vectors of which `count` is a multiple."""
    width = VECTOR_BYTES // BYTES[dtype]
    while count % width:
        width //= 2
    return width


def copy(to: Any, at: int, source: Any, index: list[Any], count: int, width: int) -> None:
    """``to[at:at + count] = source[..., index[-1]:index[-1] + count]`` in vectors of `width`."""
    *front, last = index
    for i in range(0, count, width):
        value = tirx.BufferLoad(source, [*front, lanes(last + i, width)])
        store(to, value, lanes(tirx.const(at + i, "int32"), width))


def lanes(start: Any, width: int) -> Any:
    """The indices of `width` neighbours."""
    return start if width == 1 else tirx.Ramp(start, tirx.const(1, "int32"), width)


def warp_sum(value: Any) -> Any:
    """The sum of a float32 over the lanes of a warp, in every lane."""
    offset = WARP // 2
    while offset:
        shuffled = tirx.op.tvm_warp_shuffle_xor(
            tirx.const(ALL_LANES, "uint32"), value, offset, WARP, WARP
        )
        value = held(value + shuffled, "float32")
        offset //= 2
    return value


def tables(blocks: int, rows: int, dtype: str) -> dict[str, Any]:
    """The arguments that hold a packed weight (see `PackedWeight`) and the bias."""
    nnz = te.var("nnz", "int32")
    return {
        "indptr": argument("indptr", (blocks + 1,), "int32"),
        "index": argument("index", (nnz,), "int32"),
        "weight": argument("weight", (nnz, rows), dtype),
        "rows": argument("rows", (blocks * rows,), "int32"),
        "bias": argument("bias", (blocks * rows,), "float32"),
    }
