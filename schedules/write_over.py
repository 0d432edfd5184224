"""Elementwise functions that write over an input: its memory is at hand, and no other is needed."""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi
from tvm import ir, sym, tirx
from tvm.ir import TensorLoad, TensorRegion

from .analysis import offset, walk


def inputs_to_write_over(func: tirx.PrimFunc) -> list[int]:
    """The places of the parameters that a finished function may write its output over.

    It stores every element of its output, the last parameter, once; before that it reads the
    element of such an input at the same place in memory, and it reads that nowhere else.
    """
    *inputs, output = func.params
    stores = walk(func.body, tirx.BufferStore)
    if len(stores) != 1 or not stores[0].buffer.same_as(output):
        return []
    turns = math.prod(_number(loop.extent) for loop in walk(func.body, tirx.For))
    if turns != _size(output):
        return []
    analyzer, place = sym.Analyzer(), offset(output, stores[0].indices)
    loads = walk(func.body, TensorLoad)
    passed_on = [arg for call in walk(func.body, ir.Call) for arg in call.args]
    found = []
    for number, param in enumerate(inputs):
        if any(param.same_as(arg) for arg in passed_on):
            continue
        own = [offset(param, load.indices) for load in loads if load.source.same_as(param)]
        same = own and _size(param) == turns and param.ty.dtype == output.ty.dtype
        if same and all(analyzer.can_prove_equal(at, place) for at in own):
            found.append(number)
    return found


def write_over(func: tirx.PrimFunc, number: int) -> tirx.PrimFunc:
    """The function with its output in the place of an input, which then has the output's shape."""
    *inputs, output = func.params
    replaced = inputs[number]
    (store,) = walk(func.body, tirx.BufferStore)

    def read(load: Any) -> Any:
        return tirx.BufferLoad(output, store.indices) if load.source.same_as(replaced) else load

    whole = [ir.Range(0, extent) for extent in output.ty.shape]

    def region(node: Any) -> Any:
        return tirx.BufferRegion(output, whole) if node.source.same_as(replaced) else node

    body = tvm_ffi.structural_map(func.body, [(TensorLoad, read), (TensorRegion, region)])
    inputs[number] = output
    return tirx.PrimFunc(inputs, body, func.ret_type, func.attrs)


def _size(buffer: Any) -> int:
    return math.prod(map(_number, buffer.ty.shape))


def _number(value: Any) -> int:
    return int(value) if isinstance(value, tirx.IntImm | int) else -1
