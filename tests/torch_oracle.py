"""Small ONNX graphs as torch modules, compared with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from importer_oracle import make, onnxruntime_run, value
from onnx import helper, numpy_helper

from tvm_pivot.bench.runtimes.onnx_to_torch import Network, network_from_onnx

Arrays = dict[str, np.ndarray]


def data(*shape: int, positive: bool = False) -> np.ndarray:
    """Numbers that depend on the shape alone."""
    array = np.random.default_rng([7, *shape]).standard_normal(shape).astype("float32")
    return np.abs(array) + 0.1 if positive else array


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, "int64")


@dataclass
class Case:
    """One operator on inputs, then on constants; None is an optional one left out."""

    op: str
    inputs: Sequence[np.ndarray]
    constants: Sequence[np.ndarray | None] = ()
    opset: int = 17
    outputs: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [f"{key}={number}" for key, number in self.attributes.items()]
        return ",".join([f"{self.op}-{self.opset}", *given]).replace(" ", "")

    def model(self) -> tuple[onnx.ModelProto, Arrays]:
        """The model of the one operator, and its inputs."""
        feeds = {f"x{i}": array for i, array in enumerate(self.inputs)}
        weights = {f"c{i}": array for i, array in enumerate(self.constants)}
        names = [*feeds, *(name if weights[name] is not None else "" for name in weights)]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, **self.attributes)
        return model_of([node], feeds, outputs, weights, self.opset), feeds


def model_of(
    nodes: list[onnx.NodeProto],
    feeds: Arrays,
    outputs: Sequence[str],
    weights: dict[str, np.ndarray | None],
    opset: int = 17,
) -> onnx.ModelProto:
    """A model with inputs like `feeds`; what it gives is for ONNX to find out."""
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    model = make(
        nodes,
        [value(name, array.shape, types[name]) for name, array in feeds.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        tuple(numpy_helper.from_array(a, name) for name, a in weights.items() if a is not None),
        opset,
    )
    return onnx.shape_inference.infer_shapes(model)


def translate(model: onnx.ModelProto, folder: Path) -> Network:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return network_from_onnx(path)


def run(module: Any, feeds: Arrays) -> list[np.ndarray]:
    with torch.inference_mode():
        results = module(*map(torch.tensor, feeds.values()))
    return [r.numpy() for r in (results if isinstance(results, tuple) else (results,))]


def agree(model: onnx.ModelProto, feeds: Arrays, folder: Path) -> Network:
    """Compare the module with ONNX Runtime: values, shapes and types."""
    network = translate(model, folder)
    want = onnxruntime_run(model, feeds)
    assert [port.name for port in network.inputs] == list(feeds)
    assert [port.shape for port in network.outputs] == [array.shape for array in want]
    assert [port.dtype for port in network.outputs] == [str(array.dtype) for array in want]
    close(run(network.module, feeds), want)
    return network


def close(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def functions(network: Network) -> list[str]:
    """Names of what the module calls, in order."""
    calls = (node for node in network.module.graph.nodes if node.op.startswith("call"))
    return [getattr(node.target, "__name__", str(node.target)) for node in calls]


def case(
    op: str,
    inputs: Sequence[np.ndarray],
    constants: Sequence[np.ndarray | None] = (),
    opset: int = 17,
    outputs: int = 1,
    **attributes: Any,
) -> Case:
    return Case(op, inputs, constants, opset, outputs, attributes)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)
