"""ONNX files written such that onnx2tf understands them. Nothing changes what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_AXES_ARE_AN_INPUT = 18  # since this version of ONNX's operators


def prepared(path: Path) -> onnx.ModelProto:
    """Read an ONNX file for onnx2tf.

    All nodes have names, what is constant is folded, layer normalisation is spelt out, and GELU is
    written as onnx2tf recognises it.
    """
    model = onnx.load(str(path))
    if _has_constants(model.graph):
        import onnxsim

        model, _ = onnxsim.simplify(model, perform_optimization=False)
    _spell_out_layer_normalisation(model)
    _give_divisors_a_rank(model.graph)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return onnx.shape_inference.infer_shapes(model)


def channels_last_ranks(model: onnx.ModelProto) -> set[int]:
    """The ranks of tensors that layers with windows (convolutions, pools) of a model work on.

    onnx2tf assumes that inputs of these ranks are images, or their like in 1-D and 3-D.
    """
    weights = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found = set()
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in weights:
            found.add(weights[node.input[1]])
        for attribute in node.attribute:
            if attribute.name == "kernel_shape":
                found.add(len(attribute.ints) + 2)
        if node.op_type.startswith("Global"):
            found.add(4)
    return found


def _has_constants(graph: onnx.GraphProto) -> bool:
    """Whether a node computes with nothing but constants."""
    known = {tensor.name for tensor in graph.initializer}
    return any(known.issuperset(node.input) for node in graph.node)


def _spell_out_layer_normalisation(model: onnx.ModelProto) -> None:
    """Replace LayerNormalization, for which onnx2tf reduces the wrong axis where it keeps NxSxC."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        scale_rank = ranks.get(node.input[1]) if node.op_type == "LayerNormalization" else None
        if scale_rank is None or len(node.output) > 1:
            nodes.append(node)
        else:
            nodes.extend(_layer_normalisation(model.graph, node, scale_rank, opset))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _layer_normalisation(
    graph: onnx.GraphProto, node: onnx.NodeProto, scale_rank: int, opset: int
) -> list[onnx.NodeProto]:
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    axis = attributes.get("axis", -1)
    axes = list(range(axis if axis < 0 else -scale_rank, 0))
    result = node.output[0]
    steps: list[onnx.NodeProto] = []

    def constant(name: str, value: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(value), f"{result}/{name}")
        graph.initializer.append(tensor)
        return str(tensor.name)

    def step(operator: str, *inputs: str, **options: Any) -> str:
        output = f"{result}/{len(steps)}"
        steps.append(helper.make_node(operator, inputs, [output], **options))
        return output

    def mean(of: str) -> str:
        if opset < _AXES_ARE_AN_INPUT:
            return step("ReduceMean", of, axes=axes)
        return step("ReduceMean", of, constant(f"axes {len(steps)}", np.array(axes, np.int64)))

    centred = step("Sub", node.input[0], mean(node.input[0]))
    variance = mean(step("Mul", centred, centred))
    epsilon = constant("epsilon", np.float32(attributes.get("epsilon", 1e-5)))
    deviation = step("Sqrt", step("Add", variance, epsilon))
    scaled = step("Mul", step("Div", centred, deviation), node.input[1])
    if len(node.input) > 2 and node.input[2]:
        step("Add", scaled, node.input[2])
    steps[-1].output[0] = result
    return steps


def _give_divisors_a_rank(graph: onnx.GraphProto) -> None:
    """Make constants of rank 0 ones of rank 1 where they divide what Erf is taken of.

    onnx2tf finds the square root of 2 in GELU by comparing a float32 with a double, which NumPy
    does in float32 for arrays and in double for scalars.
    """
    scalars = {tensor.name: tensor for tensor in graph.initializer if not tensor.dims}
    before_erf = {node.input[0] for node in graph.node if node.op_type == "Erf"}
    for node in graph.node:
        if node.op_type == "Div" and node.input[1] in scalars and node.output[0] in before_erf:
            array = numpy_helper.to_array(scalars[node.input[1]]).reshape(1)
            node.input[1] = f"{node.output[0]}/divisor"
            graph.initializer.append(numpy_helper.from_array(array, node.input[1]))
