"""Weights of an ONNX model: taken out of the protobuf, external files and sparse forms included."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from .errors import ModelImportError
from .importer_common import check_size

Weight = npt.NDArray[Any]

# Weights up to this many elements stay in the protobuf: operator adapters and shape arithmetic
# look at them. Larger ones never pass through ONNX's C++ code, which copies and caps at 2 GiB.
KEEP_ELEMENTS = 4096


def take_weights(model: onnx.ModelProto, folder: Path | None, source: str) -> dict[str, Weight]:
    """Load external data and move the large weights of `model` (changed in place) out of it.

    Each weight that moves leaves a typed graph input of its name behind, so that the rest is
    still a valid model. Initializers listed as inputs too (as old exporters did) lose that entry.

    Args:
        model: the model; its initializers and Constant nodes shrink.
        folder: where external data lies, None for a model without a path.
        source: how messages name the model.

    Returns:
        The weights taken out, by name.

    Raises:
        ModelImportError: a tensor is damaged, or its external file is missing or out of bounds.
    """
    graph = model.graph
    for tensor in _all_tensors(model):
        _load_external(tensor, folder, source)
    names = [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]
    for name, count in Counter(names).items():
        if not name or count > 1:
            raise ModelImportError(
                f"{source}: {count} weights are named {name!r}; give each a name of its own"
            )
    taken = {sparse.values.name: _densify(sparse, source) for sparse in graph.sparse_initializer}
    del graph.sparse_initializer[:]
    small = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > KEEP_ELEMENTS:
            taken[tensor.name] = to_numpy(tensor, source)
        else:
            small.append(tensor)
    _promote_constants(graph, taken, source)
    inputs = [item for item in graph.input if item.name not in set(names)]
    inputs += [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(weight.dtype), weight.shape
        )
        for name, weight in taken.items()
    ]
    _replace(graph.initializer, small)
    _replace(graph.input, inputs)
    return taken


def to_numpy(tensor: onnx.TensorProto, source: str) -> Weight:
    """The array in `tensor`, of its declared shape.

    Raises:
        ModelImportError: the declared type is not one of arrays, or the data do not fill the shape.
    """
    check_size(tensor.dims, f"weight {tensor.name!r}", source)
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor)).reshape(tuple(tensor.dims))
    except Exception as error:  # numpy_helper raises whatever its decoding step does
        raise ModelImportError(
            f"{source}: weight {tensor.name!r} of shape {tuple(tensor.dims)} cannot be read "
            f"({error}); get an undamaged copy of the model, or export it again"
        ) from error


def _replace(field: Any, items: list[Any]) -> None:
    # Items may live in the field itself, so they are copied before it is cleared.
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def _promote_constants(graph: onnx.GraphProto, taken: dict[str, Weight], source: str) -> None:
    """Turn large Constant nodes of the main graph into weights."""
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            continue
        for attribute in node.attribute:
            if attribute.name == "value" and math.prod(attribute.t.dims) > KEEP_ELEMENTS:
                if len(node.output) != 1 or node.output[0] in taken:
                    raise ModelImportError(
                        f"{source}: Constant node {node.name!r} must write one new name, not "
                        f"{list(node.output)}; export the model again"
                    )
                taken[node.output[0]] = to_numpy(attribute.t, source)
                del graph.node[index]
                break


def _densify(sparse: onnx.SparseTensorProto, source: str) -> Weight:
    """The dense array of a sparse weight; indices are flat [NNZ] or coordinates [NNZ, rank]."""
    name = sparse.values.name
    check_size(sparse.dims, f"sparse weight {name!r}", source)
    values = to_numpy(sparse.values, source).reshape(-1)
    indices = to_numpy(sparse.indices, source)
    shape = tuple(sparse.dims)
    try:
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
        if flat.shape != values.shape or (flat < 0).any():
            raise ValueError(f"{flat.size} indices for {values.size} values, or a negative index")
        dense = np.zeros(math.prod(shape), values.dtype)
        dense[flat] = values
    except (ValueError, IndexError, TypeError) as error:
        raise ModelImportError(
            f"{source}: the indices of sparse weight {name!r} do not fit shape {shape} ({error}); "
            "export the model again"
        ) from error
    return dense.reshape(shape)


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the model: weights, attributes, subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(graph)


def _load_external(tensor: onnx.TensorProto, folder: Path | None, source: str) -> None:
    """Read a tensor's external bytes into it; a tensor that holds its data is left alone."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    what = f"{source}: weight {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise ModelImportError(
            f"{what} lies in the external file {location!r}, but this model was given without a "
            "path; pass the path of the .onnx file, or onnx.load(path), which reads external data"
        )
    check_size(tensor.dims, f"weight {tensor.name!r}", source)
    path = _inside(folder, location, what)
    offset, length = (_byte_count(entries, key, what) for key in ("offset", "length"))
    size = path.stat().st_size
    start = offset or 0
    count = size - start if length is None else length
    if start > size or count > size - start:
        raise ModelImportError(
            f"{what} needs bytes {start} to {start + count} of {str(path)!r}, which has {size}; "
            "the file is truncated or belongs to another model: copy both again"
        )
    with path.open("rb") as file:
        file.seek(start)
        tensor.raw_data = file.read(_needed(tensor, count, length is None))
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT


def _needed(tensor: onnx.TensorProto, count: int, to_the_end: bool) -> int:
    """Bytes to read: without a length, files that hold more weights must not be read whole."""
    if not to_the_end:
        return count
    try:
        itemsize = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except KeyError:
        return count
    return min(count, int(math.prod(tensor.dims)) * itemsize)


def _inside(folder: Path, location: str, what: str) -> Path:
    """The file `location` names in `folder`, links resolved, checked to lie inside it."""
    base = folder.resolve()
    try:
        path = (base / location).resolve()
        inside = bool(location) and path != base and path.is_relative_to(base)
        exists = inside and path.is_file()
    except (ValueError, OSError) as error:  # NUL bytes, link loops, names too long
        raise ModelImportError(
            f"{what} names the external file {location!r}, which is no file name ({error}); "
            "export the model again"
        ) from error
    if not inside:
        raise ModelImportError(
            f"{what} names the external file {location!r}, which is outside the model's folder "
            f"{str(folder)!r} and is not read; move the data next to the model and save it again"
        )
    if not exists:
        raise ModelImportError(
            f"{what} needs the external file {location!r}, which is missing from "
            f"{str(folder)!r}; copy it next to the model"
        )
    return path


def _byte_count(entries: dict[str, str], key: str, what: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ModelImportError(
            f"{what} has the external {key} {text!r}, which is not a byte count; "
            "export the model again"
        )
    return int(text)
