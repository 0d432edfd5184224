"""Functions whose buffers lie elsewhere: the rewrite behind bands, and behind padded outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad, TensorRegion

from .masked_stores import is_masked, masked_elsewhere

# From the indices of an element in one buffer those in another, in which neighbours along the
# last axis stay neighbours.
Place = Callable[[Any], list[Any]]


def moved(body: Any, places: Mapping[Any, tuple[Any, Place]]) -> Any:
    """`body` with each buffer's accesses at its new place, in the buffer that is given with it."""

    def load(node: Any) -> Any:
        buffer, place = places.get(node.source, (None, None))
        return node if place is None else tirx.BufferLoad(buffer, place(node.indices))

    def store(node: tirx.BufferStore) -> tirx.BufferStore:
        buffer, place = places.get(node.buffer, (None, None))
        return node if place is None else tirx.BufferStore(buffer, node.value, place(node.indices))

    def masked(node: tvm.ir.Call) -> Any:
        buffer, place = places.get(node.args[0], (None, None)) if is_masked(node) else (None, None)
        return node if place is None else masked_elsewhere(node, buffer, place)

    def region(node: TensorRegion) -> Any:
        buffer, _ = places.get(node.source, (None, None))
        if buffer is None:
            return node
        everything = [tvm.ir.Range(0, extent) for extent in buffer.ty.shape]
        return tirx.BufferRegion(buffer, everything)

    rewrites = [(TensorLoad, load), (tirx.BufferStore, store)]
    rewrites += [(TensorRegion, region), (tvm.ir.Call, masked)]
    return tvm_ffi.structural_map(body, rewrites)


def shifted(index: Any, by: Any) -> Any:
    """An index, or those of neighbouring elements, so many elements further on."""
    if isinstance(index, tirx.Ramp):
        return tirx.Ramp(index.base + by, index.stride, index.lanes)
    return index + by
