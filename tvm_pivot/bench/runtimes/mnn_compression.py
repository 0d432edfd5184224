"""What MNN's converter wants to be told about pruned weights: the block shape, in a small file.

The converter stores a layer sparse if told so by a file of compression parameters, a Protocol
Buffers message. Its schema (package MNN.Compression) as far as used here::

    message Pipeline        { required string version = 1; repeated CompressionAlgo algo = 2; }
    message CompressionAlgo { optional CompressionType type = 1;      // PRUNE = 1
                              optional PruneParams prune_params = 3; }
    message PruneParams     { optional PruneType type = 1;            // RANDOM = 0, SIMD_OC = 1
                              optional LevelPrunerParams level_pruner_params = 2;
                              optional SIMDOCPrunerParams simd_oc_pruner_params = 3; }
    message SIMDOCPrunerParams { repeated int32 oc_blocks = 4; }      // rows of a block

A block is so many consecutive output channels at one input, all stored if one is not zero. The
message holds for the whole network: the converter leaves layers dense that gain nothing by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Array

_VARINT, _BYTES = 0, 2  # wire types
_PRUNE = 1
_RANDOM, _SIMD_OC = 0, 1

# MNN has kernels for these heights: 8 for AVX-512; elsewhere 8 is as fast as 4.
_BLOCK_ROWS = (8, 4)
# Blocks are used when at least this share of the non-zero weights is in blocks without a zero.
_SHARE_IN_BLOCKS = 0.95
# The converter leaves layers with fewer zeros dense whatever it is told.
_LEAST_ZEROS = 0.3


def compression_file(block_rows: int) -> bytes:
    """The message that says: pruned, in blocks of `block_rows` rows; 1 means single weights."""
    if block_rows > 1:
        blocks = _field(3, _field(4, block_rows))
        params = _field(1, _SIMD_OC) + blocks
    else:
        params = _field(1, _RANDOM) + _field(2, b"")
    algorithm = _field(1, _PRUNE) + _field(3, params)
    return _field(1, b"0.0.0") + _field(2, algorithm)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def choose_block_rows(model: Path) -> int:
    """The tallest block that the pruned weights of an ONNX file come in: 8, 4, or 1 for none.

    All layers with 30 % zeros or more count, each by its non-zero weights.
    """
    import onnx

    graph = onnx.load(str(model)).graph
    pruned = [kept for w in _layer_weights(graph) if (kept := w != 0).mean() <= 1 - _LEAST_ZEROS]
    total = sum(int(kept.sum()) for kept in pruned)
    for rows in _BLOCK_ROWS:
        in_blocks = sum(_kept_in_full_blocks(kept, rows) for kept in pruned)
        if total and in_blocks >= _SHARE_IN_BLOCKS * total:
            return rows
    return 1


def _kept_in_full_blocks(kept: Array, rows: int) -> int:
    """How many True of `kept` (outputs x inputs) are in aligned groups of `rows` rows x 1 column
    that are all True; the last group may be shorter."""
    per_group = np.add.reduceat(kept, np.arange(0, len(kept), rows), axis=0, dtype=np.int64)
    last = len(kept) - rows * (len(per_group) - 1)
    sizes = np.full((len(per_group), 1), rows)
    sizes[-1] = last
    return int(per_group[per_group == sizes].sum())


def _layer_weights(graph: Any) -> Iterator[Array]:
    """The constant weights of the layers that MNN has sparse kernels for, as outputs x inputs."""
    constants = _constants(graph)
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in constants:
            continue
        weights = constants[node.input[1]]
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type == "Conv":
            if attributes.get("group", 1) == 1:
                yield weights.reshape(len(weights), -1)
        elif weights.ndim == 2:
            yield weights if attributes.get("transB", 0) else weights.T


def _constants(graph: Any) -> dict[str, Array]:
    """Arrays the file holds, by name: initializers, Constant nodes, and transposes of them."""
    from onnx import numpy_helper

    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            constants[node.output[0]] = numpy_helper.to_array(attributes["value"].t)
        elif node.op_type == "Transpose" and node.input[0] in constants:
            order = tuple(attributes["perm"].ints) if "perm" in attributes else None
            constants[node.output[0]] = constants[node.input[0]].transpose(order)
    return constants
