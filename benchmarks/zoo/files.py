"""Networks that come as ONNX files from elsewhere, and files brought into a form all can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
from numpy.typing import NDArray
from onnx import numpy_helper

from .pruning import Mask, apply_mask

Weights = dict[str, NDArray[np.float32]]


def read(path: Path, opset: int) -> onnx.ModelProto:
    """The model, converted to ``opset``, with its weights as constants.

    Old exporters list weights as inputs too, which keeps runtimes from folding batch norms.
    """
    model = onnx.version_converter.convert_version(onnx.load(path), opset)
    used = {name for node in model.graph.node for name in node.input}
    weights = {tensor.name for tensor in model.graph.initializer}
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in weights:
            del model.graph.input[index]
    for index in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[index].name not in used:
            del model.graph.initializer[index]
    model.ir_version = 8  # what opset 17 asks for
    return model


def prunable_initializers(model: onnx.ModelProto) -> Weights:
    """Convolution weights [O, I, kh, kw] by name: no depthwise ones and no stem, as elsewhere."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    weights = {name: numpy_helper.to_array(tensors[name]) for name in names}
    # A depthwise weight sees one channel, the stem three.
    return {name: weight for name, weight in weights.items() if weight.shape[1] > 3}


def prune_initializers(
    model: onnx.ModelProto, masks_of: Callable[[Weights], dict[str, Mask]]
) -> None:
    """Prunes a model in place by the masks chosen for its weights, keeping each one's norm."""
    weights = prunable_initializers(model)
    masks = masks_of(weights)
    for tensor in model.graph.initializer:
        if tensor.name in masks:
            pruned = apply_mask(weights[tensor.name], masks[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(pruned, tensor.name))


def fold(model: onnx.ModelProto | Path, path: Path) -> None:
    """Writes ``model`` with constants and batch norms folded, in standard operators only.

    ``path`` may be where ``model`` lies. Shape arithmetic, which some converters cannot read,
    becomes constants.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    folded = path.with_suffix(".folded")
    options.optimized_model_filepath = str(folded)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    result = onnx.load(folded)
    folded.unlink()
    standard = [entry.version for entry in result.opset_import if entry.domain == ""]
    del result.opset_import[:]
    result.opset_import.append(onnx.helper.make_opsetid("", standard[0]))
    onnx.save(result, path)


def declare_output(path: Path, shape: tuple[int, ...]) -> None:
    """Gives the only output of an exported network its ``shape`` where that was left open."""
    model = onnx.load(path)
    (output,) = model.graph.output
    dims = output.type.tensor_type.shape.dim
    if tuple(d.dim_value for d in dims) != shape:
        for dim, size in zip(dims, shape, strict=True):
            dim.dim_value = size
        onnx.save(model, str(path))
