"""Small layers as tuning sees them, what they compute, and a network of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.targets import PRESETS, PivotTarget
from tvm_pivot.tuning.tasks import LayerTask

AVX2 = PRESETS["x86-avx2"]


def weights(rows: int, columns: int, block: int, density: float, seed: int = 0) -> Any:
    """float32 [rows, columns] with blocks of `block` rows kept."""
    rng = np.random.default_rng(seed)
    kept = rng.random((rows // block, columns)) < density
    matrix = rng.standard_normal((rows, columns)) * np.repeat(kept, block, axis=0)
    return matrix.astype(np.float32)


def conv_layer(
    channels: int = 8, outputs: int = 16, size: int = 9, kernel: int = 3, stride: int = 1
) -> Layer:
    """A pruned convolution of one image, padded so that it keeps its size."""
    axis = AxisGeometry(size, kernel, stride, 1, kernel // 2, kernel // 2)
    matrix = weights(outputs, channels * kernel**2, 8, 0.3)
    geometry = ConvGeometry(1, channels, outputs, axis, axis)
    shape = (outputs, channels, kernel, kernel)
    return Layer(relax.Var("conv"), "conv2d", shape, matrix, geometry)


def dense_layer(inputs: int = 48, outputs: int = 32, rows: int = 1, density: float = 0.2) -> Layer:
    """A dense layer of `rows` input rows, unstructured."""
    geometry = ConvGeometry(1, inputs, outputs, AxisGeometry(1, 1), AxisGeometry(rows, 1))
    matrix = weights(outputs, inputs, 1, density)
    return Layer(relax.Var("dense"), "dense", matrix.shape, matrix, geometry)


def task_of(
    layer: Layer, target: PivotTarget = AVX2, epilogue: Epilogue | None = None
) -> LayerTask:
    """Its task, with the plan that the rule gives it."""
    plan = plan_layer(layer, target, sparse=True).plan
    return LayerTask.of(layer, plan, epilogue or Epilogue(low=0.0), target)


def convolved(layer: Layer, x: Any, bias: Any) -> Any:
    """What a convolution computes, in float64: [1, outputs, height, width]."""
    g = layer.geometry
    w = torch.from_numpy(layer.matrix.reshape(layer.shape).astype(float))
    image = torch.from_numpy(x.astype(float))
    y = torch.nn.functional.conv2d(image, w, stride=g.y.stride, padding=g.y.before)
    return y.numpy() + bias.astype(float)[:, None, None]


def network(path: Path, seed: int = 0) -> Path:
    """An ONNX file: two pruned convolutions that are alike, and a third."""
    rng = np.random.default_rng(seed)
    shapes = [(16, 8, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3)]
    nodes, constants, name = [], [], "x"
    for i, shape in enumerate(shapes):
        w = weights(shape[0], int(np.prod(shape[1:])), 8, 0.25, seed=min(i, 1)).reshape(shape)
        b = rng.standard_normal(shape[0]).astype(np.float32)
        constants += [numpy_helper.from_array(w, f"w{i}"), numpy_helper.from_array(b, f"b{i}")]
        pads = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
        inputs = [name, f"w{i}", f"b{i}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{i}"], name=f"conv{i}", **pads))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"y{i}"]))
        name = f"y{i}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8, 12, 12))
    y = helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 16, 12, 12))
    graph = helper.make_graph(nodes, "small", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path
