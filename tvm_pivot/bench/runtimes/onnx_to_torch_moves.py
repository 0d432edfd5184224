"""Translations of ONNX operators that make constants, compute shapes, or move elements."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .onnx_to_torch_graph import Operator, dtype, is_float, shape


def _constant(op: Operator) -> Any:
    for name, value in op.attributes.items():
        if name == "value":
            return value
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
        if name in ("value_int", "value_ints"):
            return torch.tensor(value, dtype=torch.int64)
    raise op.unsupported(f"values of the kind {', '.join(op.attributes)}")


def _constant_of_shape(op: Operator) -> Any:
    value = op.get("value", torch.zeros(1))
    return value.reshape(()).expand(op.ints(0) or []).contiguous()


def _shape(op: Operator) -> Any:
    size = shape(op.input(0))
    return torch.tensor(size[op.get("start", 0) : op.get("end", len(size))], dtype=torch.int64)


def _range(op: Operator) -> Any:
    start, stop, step = (op.number(index) for index in range(3))
    return torch.arange(start, stop, step, dtype=dtype(op.input(0)))


def _reshape(op: Operator) -> Any:
    size, wanted = shape(op.input(0)), op.ints(1, "shape") or []
    if not op.get("allowzero", 0):
        wanted = [size[i] if length == 0 else length for i, length in enumerate(wanted)]
    if -1 in wanted:
        rest = -math.prod(wanted)
        wanted[wanted.index(-1)] = math.prod(size) // rest if rest else 0
    return op.emit(torch.reshape, op.input(0), tuple(wanted))


def _flatten(op: Operator) -> Any:
    size = shape(op.input(0))
    axis = op.get("axis", 1)
    axis += len(size) if axis < 0 else 0
    rows = math.prod(size[:axis])
    return op.emit(torch.reshape, op.input(0), (rows, math.prod(size[axis:])))


def _squeeze(op: Operator) -> Any:
    size = shape(op.input(0))
    axes = op.ints(1, "axes")
    if axes is None:
        dropped = {axis for axis, length in enumerate(size) if length == 1}
    else:
        dropped = {op.axis(axis, len(size)) for axis in axes}
    kept = tuple(length for axis, length in enumerate(size) if axis not in dropped)
    return op.emit(torch.reshape, op.input(0), kept)


def _unsqueeze(op: Operator) -> Any:
    size = list(shape(op.input(0)))
    axes = op.ints(1, "axes") or []
    rank = len(size) + len(axes)
    for axis in sorted(op.axis(axis, rank) for axis in axes):
        size.insert(axis, 1)
    return op.emit(torch.reshape, op.input(0), tuple(size))


def _transpose(op: Operator) -> Any:
    rank = len(shape(op.input(0)))
    return op.emit(torch.permute, op.input(0), tuple(op.get("perm", range(rank)[::-1])))


def _expand(op: Operator) -> Any:
    wanted = np.broadcast_shapes(shape(op.input(0)), tuple(op.ints(1) or ()))
    return op.emit(torch.broadcast_to, op.input(0), wanted)


def _concat(op: Operator) -> Any:
    parts = [op.input(index) for index in range(len(op.inputs))]
    return op.emit(torch.cat, parts, op.axis(op.get("axis", 0), len(shape(parts[0]))))


def _split(op: Operator) -> Any:
    size = shape(op.input(0))
    axis = op.axis(op.get("axis", 0), len(size))
    lengths = op.ints(1, "split")
    if lengths is None:
        each = math.ceil(size[axis] / op.outputs)
        lengths = [min(each, size[axis] - each * i) for i in range(op.outputs)]
    parts = op.emit(torch.split, op.input(0), lengths, axis)
    return tuple(op.emit(operator.getitem, parts, i) for i in range(op.outputs))


def _slice(op: Operator) -> Any:
    x, size = op.input(0), shape(op.input(0))
    starts, ends = op.ints(1, "starts") or [], op.ints(2, "ends") or []
    axes = op.ints(3, "axes") or list(range(len(starts)))
    steps = op.ints(4, "steps") or [1] * len(starts)
    chosen = [slice(None)] * len(size)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = op.axis(axis, len(size))
        taken = range(size[axis])[start:end:step]
        if step < 0:  # torch slices forwards only
            x = op.emit(torch.flip, x, (axis,))
            last = size[axis] - 1
            taken = range(last - taken[0], last - taken[-1] + 1, -step) if taken else range(0)
        chosen[axis] = slice(taken.start, taken.stop, taken.step)
    return op.emit(operator.getitem, x, tuple(chosen))


def _gather(op: Operator) -> Any:
    x, indices = op.input(0), op.input(1)
    size, wanted = shape(x), shape(indices)
    axis = op.axis(op.get("axis", 0), len(size))
    if isinstance(indices, Tensor):
        indices = indices.to(torch.int64) % size[axis]  # they may count from the end
        if indices.ndim == 0:
            return op.emit(torch.select, x, axis, int(indices))
    else:
        from_end = op.emit(operator.lt, indices, 0)
        other = op.emit(operator.add, indices, size[axis])
        indices = op.emit(torch.where, from_end, other, indices)
    if isinstance(x, Tensor) and is_float(x) and axis == 0 and len(size) == 2:
        return op.emit(F.embedding, indices, x)
    rows = op.emit(torch.index_select, x, axis, op.emit(torch.reshape, indices, (-1,)))
    return op.emit(torch.reshape, rows, (*size[:axis], *wanted, *size[axis + 1 :]))


def _tile(op: Operator) -> Any:
    return op.emit(torch.tile, op.input(0), tuple(op.ints(1, "repeats") or ()))


def _pad(op: Operator) -> Any:
    x, rank = op.input(0), len(shape(op.input(0)))
    pads = op.ints(1, "pads") or []
    axes = [op.axis(axis, rank) for axis in op.ints(3) or range(rank)]
    both = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        both[axis] = (pads[i], pads[i + len(axes)])
    mode = op.get("mode", "constant")
    torch_mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(mode)
    if torch_mode is None:
        raise op.unsupported(f"mode {mode}")
    while both and both[0] == (0, 0):
        both.pop(0)
    if not both:
        return x
    flat = [amount for pair in reversed(both) for amount in pair]
    if torch_mode != "constant":
        return op.emit(F.pad, x, flat, torch_mode)
    fill = op.number(2)
    return op.emit(F.pad, x, flat, torch_mode, op.get("value", 0) if fill is None else fill)


def _depth_to_space(op: Operator) -> Any:
    batch, channels, height, width = shape(op.input(0))
    block = op.get("blocksize")
    if op.get("mode", "DCR") == "CRD":
        return op.emit(F.pixel_shuffle, op.input(0), block)
    depth = channels // block**2
    parts = op.emit(torch.reshape, op.input(0), (batch, block, block, depth, height, width))
    mixed = op.emit(torch.permute, parts, (0, 3, 4, 1, 5, 2))
    return op.emit(torch.reshape, mixed, (batch, depth, height * block, width * block))


MOVES: dict[str, Callable[[Operator], Any]] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda op: torch.tensor(math.prod(shape(op.input(0)))),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
