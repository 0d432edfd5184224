"""The compiler gives rows the orders that pivoting finds: same outputs, fuller blocks, told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from planted_masks import blocks, cells, diagonal, shuffled, with_noise
from tvm import relax

import tvm_pivot
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.relay_passes.pivot_layer import SearchTime
from tvm_pivot.targets import resolve

MASKS = {
    "blocks": shuffled(blocks((64, 96 * 9), (8, 1), 0.12, 0), 0),
    "noisy": shuffled(with_noise(blocks((61, 96 * 9), (8, 1), 0.12, 1), 3, 0, 0.1, 1), 1),
    "diagonal": shuffled(diagonal(64, 96 * 9, 8), 2),
    "chance": np.random.default_rng(3).random((64, 96 * 9)) < 0.1,
}


def network(mask: NDArray[np.bool_], seed: int) -> onnx.ModelProto:
    """``x [1, 96, 14, 14] -> 3x3 convolution with this mask [64, 864] -> ReLU -> 1x1 -> y``."""
    rng = np.random.default_rng(seed)
    first = np.where(mask, rng.standard_normal(mask.shape), 0).reshape(-1, 96, 3, 3)
    last = rng.standard_normal((24, 64, 1, 1)) * (rng.random((24, 64, 1, 1)) < 0.3)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["y"], name="last"),
    ]
    weights = [
        numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in (("w", first), ("v", last))
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 96, 14, 14))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 24, 14, 14))
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("target", ["x86", "x86-avx2"])
def test_outputs_stay_as_they_are(name: str, target: str) -> None:
    model = network(MASKS[name], 5)
    x = np.random.default_rng(6).standard_normal((1, 96, 14, 14)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, {"x": x})
    net = tvm_pivot.build(model, target=target, pivot_seconds=60)
    np.testing.assert_allclose(net.run(x), expected, atol=1e-4 * np.abs(expected).max())
    layer = net.report.layers[0]
    if name == "chance":
        assert layer.pivot is None or layer.pivot.kind == "searched"
        return
    assert layer.pivot is not None
    assert layer.pivot.after > 0.75 > 0.5 > layer.pivot.before
    assert f"pivot: {layer.pivot.kind}, fill" in str(net.report)
    assert layer.pivot.kind == ("block-diagonal" if name == "diagonal" else "equal support")


@pytest.mark.parametrize("seed", range(3))
def test_predicted_cycles_never_grow(seed: int) -> None:
    """With any time for the search, a plan is at least as good as without."""
    rng = np.random.default_rng(seed)
    mask = cells(128, 4, 0.4, seed) if seed == 0 else rng.random((128, 64)) < rng.random((128, 1))
    weight = np.where(shuffled(mask, seed), 1, 0).astype(np.float32)
    rows, columns = weight.shape
    geometry = ConvGeometry(1, columns, rows, AxisGeometry(1, 1), AxisGeometry(192, 1))
    layer = Layer(relax.Var("layer"), "dense", (columns, rows), weight, geometry)
    target = resolve("x86")
    planted = plan_layer(layer, target, True)
    searched = plan_layer(layer, target, True, SearchTime(60.0))
    dense = plan_layer(layer, target, False)
    assert searched.plan.cycles <= planted.plan.cycles <= dense.plan.cycles


def test_inspect_tells_the_pivots(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(network(MASKS["blocks"], 7), path)
    report = tvm_pivot.inspect(path, pivot_seconds=0.0)
    (layer, _) = report.layers
    assert layer.pivot is not None
    assert (layer.pivot.kind, layer.pivot.after) == ("equal support", 1.0)
    assert tvm_pivot.Report.from_json(report.to_json()) == report
