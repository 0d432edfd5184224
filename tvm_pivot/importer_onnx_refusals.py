"""ONNX nodes that TVM's frontend converts to something else: better refused than wrong."""

from __future__ import annotations

from collections.abc import Collection

import onnx


def refusal(node: onnx.NodeProto, used: Collection[str]) -> str:
    """Why a node of the standard operators cannot be imported, or nothing.

    Args:
        node: the node.
        used: names that other nodes or the graph's outputs read.
    """
    if node.domain not in ("", "ai.onnx"):
        return ""
    attributes = {item.name: item for item in node.attribute}
    extra = any(name in used for name in node.output[1:])

    def number(name: str, default: int) -> int:
        return attributes[name].i if name in attributes else default

    if node.op_type == "BatchNormalization" and number("training_mode", 0):
        return "it is in training mode; export the model in evaluation mode"
    if node.op_type == "LayerNormalization" and extra:
        return "its mean or standard deviation is read; compute that with other operators"
    if node.op_type == "Dropout" and extra:
        return "its mask is read; export the model in evaluation mode"
    if node.op_type == "ConvTranspose" and "output_shape" in attributes:
        return "output_shape is not supported; give pads and output_padding"
    if node.op_type == "IsInf" and not all(
        number(f"detect_{sign}", 1) for sign in ("positive", "negative")
    ):
        return "only infinities of both signs are found; compare with the one you mean"
    if node.op_type == "RoiAlign" and "mode" in attributes and attributes["mode"].s == b"max":
        return "only the mode 'avg' is supported"
    if node.op_type == "NonMaxSuppression":
        return "how many boxes it selects depends on the data; run it outside of the network"
    return ""


def used_names(graph: onnx.GraphProto) -> set[str]:
    """All names that nodes of a graph, nodes of their branches, or its outputs read."""
    used = {output.name for output in graph.output}
    for node in graph.node:
        used.update(node.input)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                used |= used_names(inner)
    return used
