"""Small ONNX models, and the runs that tests of the importer compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from tvm_pivot.importer import ImportedModel, import_model

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def run(imported: ImportedModel, *inputs: np.ndarray) -> list[np.ndarray]:
    """Run an imported model through plain TVM."""
    mod = relax.get_pipeline("zero")(imported.mod)
    executable = tvm.compile(mod, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(array) for array in inputs])
    single = isinstance(result, tvm.runtime.Tensor)
    return [result.numpy()] if single else [item.numpy() for item in result]


def onnxruntime_run(model: onnx.ModelProto | str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime", reason="the oracle for ONNX models")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = model if isinstance(model, str) else model.SerializeToString()
    return list(ort.InferenceSession(source, options).run(None, feeds))


def value(name: str, shape: Any, dtype: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    array = np.random.default_rng([seed, len(name), *map(ord, name)]).standard_normal(shape)
    return numpy_helper.from_array(array.astype("float32"), name)


def make(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: tuple[onnx.TensorProto, ...] = (),
    opset: int = 17,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "small", inputs, outputs, list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def dense(rows: Any = 2, opset: int = 17) -> onnx.ModelProto:
    """y = relu(x w + b) with x [rows, 80], w [80, 60] (large enough to leave the protobuf)."""
    return make(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="mm"),
            helper.make_node("Add", ["m", "b"], ["a"], name="bias"),
            helper.make_node("Relu", ["a"], ["y"], name="act"),
        ],
        [value("x", [rows, 80])],
        [value("y", [rows, 60])],
        (weight("w", 80, 60), weight("b", 60)),
        opset,
    )


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype("float32")


def check(model: Any, feeds: dict[str, np.ndarray], **options: Any) -> ImportedModel:
    """Import an ONNX model and compare its results with ONNX Runtime's."""
    imported = import_model(model, **options)
    assert [spec.name for spec in imported.inputs] == list(feeds)
    assert [spec.shape for spec in imported.inputs] == [a.shape for a in feeds.values()]
    assert len(imported.mod["main"].params) == len(feeds)
    want = onnxruntime_run(str(model) if isinstance(model, Path) else model, feeds)
    got = run(imported, *feeds.values())
    assert [(spec.shape, spec.dtype) for spec in imported.outputs] == [
        (array.shape, str(array.dtype)) for array in want
    ]
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    return imported


def constants(imported: ImportedModel) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found.append(tuple(map(int, expr.value.shape)))

    relax.analysis.post_order_visit(imported.mod["main"], visit)
    return found
