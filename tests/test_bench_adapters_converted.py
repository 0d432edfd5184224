"""Adapters of LiteRT, DeepSparse, ncnn and plain TVM, each run in a worker as in a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_pivot.bench.environments import environments_of, install_command, is_installed
from tvm_pivot.bench.runtimes import UnsupportedModelError, litert_convert, ncnn
from tvm_pivot.bench.runtimes.deepsparse import DeepSparse
from tvm_pivot.bench.runtimes.litert_onnx import channels_last_ranks, prepared
from tvm_pivot.bench.runtimes.protocol import Array, Port
from tvm_pivot.bench.specs import RuntimeSpec, resolve
from tvm_pivot.bench.workers import Worker, WorkerError

RUNTIMES = ("litert", "deepsparse", "ncnn", "tvm")
THREADS_SETTING = {"deepsparse": "num_cores", "tvm": "threads"}

Arrays = dict[str, Array]
Shapes = Mapping[str, Sequence[int]]


def save(
    path: Path,
    nodes: Sequence[Any],
    inputs: Shapes,
    outputs: Shapes,
    weights: Mapping[str, Any],
    *,
    opset: int = 17,
    ir_version: int = 8,
) -> Path:
    """Write a model of fp32 inputs and outputs."""

    def ports(shapes: Shapes) -> list[Any]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]

    tensors = [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "tiny", ports(inputs), ports(outputs), tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("nobody", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), str(path))
    return path


def random(*shape: int) -> Array:
    values = np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    scaled: Array = values.astype(np.float32)
    return scaled


def image(path: Path) -> Path:
    """Convolutions, a residual, pools and a dense layer."""
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "body"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["d", "c"], ["e"]),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "head", "bias"], ["y"], transB=1),
    ]
    weights = {
        "stem": random(8, 3, 3, 3),
        "body": random(8, 8, 3, 3),
        "head": random(10, 8),
        "bias": np.linspace(-1, 1, 10, dtype=np.float32),
    }
    return save(path, nodes, {"x": [1, 3, 12, 16]}, {"y": [1, 10]}, weights)


def cubes(path: Path) -> Path:
    """Two inputs and two outputs whose shapes say nothing of the order of their axes."""
    nodes = [
        helper.make_node("Conv", ["/in/x", "w"], ["c"], pads=[1, 0, 1, 0]),
        helper.make_node("Relu", ["c"], ["/out/y"]),
        helper.make_node("Mul", ["/out/y", "b:0"], ["z"]),
    ]
    cube = [1, 6, 6, 6]
    inputs, outputs = {"b:0": cube, "/in/x": cube}, {"z": cube, "/out/y": cube}
    return save(path, nodes, inputs, outputs, {"w": random(6, 6, 3, 1)})


def squares(path: Path) -> Path:
    """The same in one dimension."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[2, 0]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return save(path, nodes, {"x": [1, 6, 6]}, {"y": [1, 6, 6]}, {"w": random(6, 6, 3)})


def sequence(path: Path) -> Path:
    """A feed-forward block as in transformers, its constants computed in the graph."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["n"], axis=-1),
        helper.make_node("MatMul", ["n", "up"], ["u"]),
        helper.make_node("Sqrt", ["two"], ["root"]),
        helper.make_node("Div", ["u", "root"], ["v"]),
        helper.make_node("Erf", ["v"], ["e"]),
        helper.make_node("Add", ["e", "one"], ["f"]),
        helper.make_node("Mul", ["u", "f"], ["g"]),
        helper.make_node("Mul", ["g", "half"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["d"]),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    weights = {
        "scale": np.linspace(0.5, 1.5, 8, dtype=np.float32),
        "shift": np.linspace(-1, 1, 8, dtype=np.float32),
        "up": random(8, 16),
        "down": random(16, 8),
        "two": np.float32(2),
        "one": np.float32(1),
        "half": np.float32(0.5),
    }
    return save(path, nodes, {"x": [1, 8, 8]}, {"y": [1, 8, 8]}, weights)


def rows(path: Path) -> Path:
    """Dense layers on several rows."""
    nodes = [
        helper.make_node("Gemm", ["x", "first"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "second"], ["y"]),
    ]
    weights = {"first": random(16, 24), "second": random(16, 8)}
    return save(path, nodes, {"x": [5, 24]}, {"y": [5, 8]}, weights)


def strange(path: Path) -> Path:
    """An operator that nobody has."""
    nodes = [helper.make_node("Strange", ["x"], ["y"], domain="nobody")]
    return save(path, nodes, {"x": [1, 4]}, {"y": [1, 4]}, {})


MODELS = (image, cubes, squares, sequence, rows)


def inputs_of(model: Path, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        port.name: rng.normal(size=port.shape).astype(np.float32)
        for port in onnxruntime.InferenceSession(str(model)).get_inputs()
    }


def computed(model: Path | onnx.ModelProto, inputs: Arrays) -> Arrays:
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@dataclass(frozen=True)
class Workers:
    """A runtime's two processes, the one that converts and the one that runs."""

    name: str
    converter: Worker
    runner: Worker
    folder: Path

    def convert(self, make: Callable[[Path], Path]) -> tuple[Path, list[str]]:
        model = make(self.folder / f"{make.__name__}.onnx")
        target = self.folder / make.__name__
        target.mkdir()
        reply = self.converter.request("convert", timeout=120, model=str(model), folder=str(target))
        return model, reply["files"]

    def prepare(self, files: list[str]) -> dict[str, str]:
        settings: dict[str, str] = self.runner.request("prepare", timeout=60, files=files)[
            "settings"
        ]
        return settings

    def outputs(self, inputs: Arrays, other: Arrays) -> Arrays:
        """What it computes for `inputs`, read after `other` was bound."""
        files = [self.folder / name for name in ("inputs.npz", "other.npz", "outputs.npz")]
        for file, arrays in zip(files, (inputs, other), strict=False):
            np.savez(file, *arrays.values())
        paths = dict(zip(("inputs", "other", "outputs"), map(str, files), strict=True))
        reply = self.runner.request("check", timeout=60, names=list(inputs), **paths)
        with np.load(files[2]) as found:
            return dict(zip(reply["names"], found.values(), strict=True))


@pytest.fixture(scope="module", params=RUNTIMES)
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    spec = installed(request.param)
    with (
        Worker(spec, threads=1, precision="fp32", environment=spec.adapter.converter) as converter,
        Worker(spec, threads=1, precision="fp32") as runner,
    ):
        yield Workers(spec.name, converter, runner, tmp_path_factory.mktemp(spec.name))


def installed(name: str) -> RuntimeSpec:
    (spec,) = resolve([name])
    for environment in environments_of(spec.adapter):
        if not is_installed(environment):
            where = environment.name or ", ".join(environment.modules)
            pytest.skip(f"{name} needs {where}: {install_command(name)}")
    return spec


@pytest.mark.parametrize("make", MODELS)
def test_outputs_are_right_for_inputs_in_turn(
    workers: Workers, make: Callable[[Path], Path]
) -> None:
    model, files = workers.convert(make)
    settings = workers.prepare(files)
    assert settings[THREADS_SETTING.get(workers.name, "num_threads")] == "1"
    first, second = inputs_of(model, 0), inputs_of(model, 1)
    for inputs, other in ((first, second), (second, first), (first, second)):
        found, wanted = workers.outputs(inputs, other), computed(model, inputs)
        assert list(found) == list(wanted)
        for name, y in wanted.items():
            assert found[name].shape == y.shape and found[name].dtype == y.dtype
            assert np.abs(found[name] - y).max() < 2e-6 * np.abs(y).max() + 1e-6


def test_a_model_that_cannot_be_taken_is_said_to_be_unsupported(workers: Workers) -> None:
    with pytest.raises(WorkerError) as refusal:
        workers.prepare(workers.convert(strange)[1])
    assert refusal.value.unsupported


def test_preparation_for_onnx2tf_changes_no_result(tmp_path: Path) -> None:
    model = sequence(tmp_path / "model.onnx")
    proto = onnx.load(str(model))
    (folded,) = (node for node in proto.graph.node if node.op_type == "Sqrt")
    proto.graph.node.remove(folded)  # what onnxsim, which may not be here, would fold
    proto.graph.initializer.append(numpy_helper.from_array(np.sqrt(np.float32(2)), "root"))
    onnx.save(proto, str(model))
    result = prepared(model)
    names = [node.name for node in result.graph.node]
    assert all(names) and len(set(names)) == len(names)
    assert "LayerNormalization" not in {node.op_type for node in result.graph.node}
    (divisor,) = (t for t in result.graph.initializer if t.name.endswith("/divisor"))
    assert list(divisor.dims) == [1]
    inputs = inputs_of(model, 0)
    np.testing.assert_allclose(computed(result, inputs)["y"], computed(model, inputs)["y"], 1e-5)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize(("axis", "shape"), [(-1, [6]), (1, [5, 6]), (-2, [5, 6])])
def test_layer_normalisation_over_any_axes_is_spelt_out(
    tmp_path: Path, opset: int, axis: int, shape: list[int]
) -> None:
    nodes = [helper.make_node("LayerNormalization", ["x", "scale"], ["y"], axis=axis, epsilon=0.1)]
    sizes = {"x": [2, 5, 6]}, {"y": [2, 5, 6]}
    model = save(tmp_path / "m.onnx", nodes, *sizes, {"scale": random(*shape)}, opset=opset)
    inputs = inputs_of(model, 0)
    result = computed(prepared(model), inputs)["y"]
    np.testing.assert_allclose(result, computed(model, inputs)["y"], atol=1e-6)


def test_only_inputs_of_layers_with_windows_become_channels_last(tmp_path: Path) -> None:
    ranks = {
        make.__name__: channels_last_ranks(onnx.load(str(make(tmp_path / "m.onnx"))))
        for make in MODELS
    }
    assert ranks == {
        "image": {4},
        "cubes": {4},
        "squares": {3},
        "sequence": set(),
        "rows": set(),
    }


def test_order_of_axes_is_read_off_shapes_where_they_tell() -> None:
    def fitting(declared: Sequence[int], shape: Sequence[int]) -> list[tuple[int, ...]]:
        return litert_convert._fitting(Port("y", tuple(declared), "float32"), tuple(shape))

    assert fitting([1, 3, 8, 8], [1, 8, 8, 3]) == [(0, 2, 3, 1)]
    assert fitting([1, 3, 8, 8], [1, 3, 8, 8]) == [(0, 1, 2, 3)]
    assert fitting([4, 4], [4, 4]) == [(0, 1)]
    assert fitting([1, 6, 6], [1, 6, 6]) == [(0, 1, 2), (0, 2, 1)]
    assert fitting([-1, 10], [1, 10]) == [(0, 1)]
    with pytest.raises(UnsupportedModelError, match=r"y of shape \(1, 3, 8, 8\)"):
        fitting([1, 3, 8, 8], [1, 8, 3, 8])


def test_order_of_axes_is_read_off_values_where_shapes_do_not_tell() -> None:
    wanted = random(1, 5, 5, 5)
    orders = [(0, 1, 2, 3), (0, 2, 3, 1)]
    for axes in orders:
        assert litert_convert._nearest(orders, wanted, wanted.transpose(axes) + 1e-4) == axes


def test_deepsparse_gets_files_as_old_as_it_knows_them(tmp_path: Path) -> None:
    node = [helper.make_node("Relu", ["x"], ["y"])]
    sizes: tuple[Shapes, Shapes] = {"x": [1, 4]}, {"y": [1, 4]}
    old = save(tmp_path / "old.onnx", node, *sizes, {})
    assert DeepSparse().convert(old, tmp_path) == [old]
    newer = save(tmp_path / "newer.onnx", node, *sizes, {}, ir_version=10)
    (copy,) = DeepSparse().convert(newer, tmp_path)
    assert copy.parent == tmp_path and onnx.load(str(copy)).ir_version == 8
    newest = save(tmp_path / "newest.onnx", node, *sizes, {}, opset=18)
    with pytest.raises(UnsupportedModelError, match="version 18 of ONNX's operators"):
        DeepSparse().convert(newest, tmp_path)


def test_ncnn_files_with_operators_of_pnnx_alone_are_refused(tmp_path: Path) -> None:
    param = tmp_path / "model.param"
    param.write_text("7767517\n2 2\nInput in0 0 1 in0\nReLU relu_0 1 1 in0 out0\n")
    ncnn._require_known_operators(param)
    param.write_text("7767517\n2 2\nInput in0 0 1 in0\naten::erf e 1 1 in0 a\nF.pad p 1 1 a out0\n")
    with pytest.raises(UnsupportedModelError, match=r"ncnn has no F\.pad, aten::erf"):
        ncnn._require_known_operators(param)


def test_ncnn_ports_that_pnnx_dropped_are_noticed() -> None:
    example = (
        'ex.input("in0", ncnn.Mat(in0.numpy(), batch_index=0).clone())\n'
        'ex.input("in1", ncnn.Mat(in1.numpy(), batch_index=233).clone())\n'
    )
    a, b, c = (Port(name, (1, 4), "float32") for name in "abc")
    found = ncnn._batches(ncnn._INPUT, example, "in", (a, b))
    assert [(port["name"], port["key"], port["batch"]) for port in found] == [
        ("a", "in0", 0),
        ("b", "in1", 233),
    ]
    with pytest.raises(UnsupportedModelError, match="pnnx made 2 of the 3 inputs"):
        ncnn._batches(ncnn._INPUT, example, "in", (a, b, c))
