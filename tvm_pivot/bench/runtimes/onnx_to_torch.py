"""An ONNX file as a torch.nn.Module, for the runtimes that start from torch.

The module is a torch.fx.GraphModule of ordinary torch functions, such as a person would have
written: it can be run, compiled and exported. torch has no such importer of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx

from .onnx_to_torch_fuse import fuse
from .onnx_to_torch_graph import Builder, Operator, Value, dtype, shape, tensor, torch_dtype
from .onnx_to_torch_layers import LAYERS
from .onnx_to_torch_moves import MOVES
from .onnx_to_torch_ops import OPERATORS
from .onnx_to_torch_recurrent import RECURRENT
from .protocol import Port, UnsupportedModelError, port

_TRANSLATORS = OPERATORS | MOVES | LAYERS | RECURRENT
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Network:
    """An ONNX file for torch.

    Attributes:
        module: in evaluation mode; takes the inputs in order and returns the output, or a tuple.
        inputs: as in the file.
        outputs: with the shapes that follow from the inputs', which the file may leave open.
    """

    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def network_from_onnx(path: Path) -> Network:
    """Read an ONNX file with static input shapes.

    Raises:
        UnsupportedModelError: the file uses what is not translated; the message names it.
    """
    model = onnx.load(str(path))
    graph = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in _STANDARD), 1)
    _refuse_unknown(graph)
    builder = Builder()
    values: dict[str, Value | None] = {}
    for initializer in graph.initializer:
        values[initializer.name] = tensor(onnx.numpy_helper.to_array(initializer))
    inputs = tuple(port(value) for value in graph.input if value.name not in values)
    for number, given in enumerate(inputs):
        kind = torch_dtype(given.dtype)
        values[given.name] = builder.input(f"input_{number}", given.shape, kind)
    for node in graph.node:
        _translate(node, values, builder, opset)
    results = [_require(values, output.name) for output in graph.output]
    outputs = tuple(
        Port(output.name, shape(value), str(dtype(value)).removeprefix("torch."))
        for output, value in zip(graph.output, results, strict=True)
    )
    builder.output(results)
    fuse(builder)
    return Network(builder.module(), inputs, outputs)


def module_from_onnx(path: Path) -> fx.GraphModule:
    """The module of `network_from_onnx`."""
    return network_from_onnx(path).module


def to_bfloat16(module: fx.GraphModule) -> fx.GraphModule:
    """Change a module from fp32 to bf16 in place: its weights and its conversions to fp32."""
    for node in module.graph.nodes:
        node.args = tuple(torch.bfloat16 if arg is torch.float32 else arg for arg in node.args)
    module.recompile()
    module.to(torch.bfloat16)
    return module


def _refuse_unknown(graph: onnx.GraphProto) -> None:
    """Name all operators that have no translation, before any work is done."""
    if graph.sparse_initializer:
        raise UnsupportedModelError("sparse initializers")
    unknown = {
        node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}"
        for node in graph.node
        if node.domain not in _STANDARD or node.op_type not in _TRANSLATORS
    }
    if unknown:
        raise UnsupportedModelError(f"no translation to torch for {', '.join(sorted(unknown))}")


def _translate(
    node: onnx.NodeProto, values: dict[str, Value | None], builder: Builder, opset: int
) -> None:
    inputs = tuple(_require(values, name) if name else None for name in node.input)
    attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
    outputs = len(node.output)
    operator = Operator(
        node.op_type, node.name or node.output[0], opset, inputs, outputs, attributes, builder
    )
    try:
        results = _TRANSLATORS[node.op_type](operator)
    except UnsupportedModelError:
        raise
    except Exception as error:  # torch refuses arguments with errors of any type
        raise operator.unsupported(f"{type(error).__name__}: {error}") from error
    if not isinstance(results, tuple):
        results = (results,)
    for position, name in enumerate(node.output):
        if not name:
            continue
        if position >= len(results):
            raise operator.unsupported(f"output {position}")
        values[name] = results[position]


def _require(values: dict[str, Value | None], name: str) -> Value:
    value = values.get(name)
    if value is None:
        raise UnsupportedModelError(f"{name!r} is used but nothing makes it")
    return value


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return tensor(onnx.numpy_helper.to_array(value))
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [item.decode() for item in value]
    return value
