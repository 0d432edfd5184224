"""Adapters of tvm_pivot, OpenVINO and MNN: outputs are right, settings are what was asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from onnx import TensorProto, helper, numpy_helper

from tvm_pivot.bench.runtimes import UnsupportedModelError, adapter, openvino
from tvm_pivot.bench.runtimes.arrays import aligned_copy
from tvm_pivot.bench.runtimes.mnn_compression import choose_block_rows, compression_file
from tvm_pivot.bench.runtimes.protocol import Array, Runtime

NAMES = ("pivot", "pivot-dense", "openvino", "openvino-sparse", "mnn", "mnn-sparse")
THREADS_SETTING = {"pivot": "threads", "openvino": "INFERENCE_NUM_THREADS", "mnn": "numThread"}

Arrays = dict[str, Array]
Shapes = Mapping[str, Sequence[int]]


def save(
    path: Path, nodes: Sequence[Any], inputs: Shapes, outputs: Shapes, weights: Mapping[str, Array]
) -> Path:
    """Write a model; inputs named "index..." are int64, all others and the outputs fp32."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name.startswith("index") else TensorProto.FLOAT, shape
            )
            for name, shape in inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in outputs.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nobody", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


def planted(outputs: int, inputs: int, rows: int, seed: int = 0) -> Array:
    """Weights with 10 % of the aligned `rows` x 1 blocks kept; 0 keeps all weights."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.5, 1.5, (outputs, inputs)) * rng.choice([-1, 1], (outputs, inputs))
    if rows:
        blocks = rng.random((-(-outputs // rows), inputs)) < 0.1
        values *= np.repeat(blocks, rows, axis=0)[:outputs]
    scaled: Array = (values / np.sqrt(inputs)).astype(np.float32)
    return scaled


def image_net(path: Path) -> Path:
    """Convolutions, one of them pruned, a pool and a dense layer."""
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "body"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "head", "bias"], ["y"], transB=1),
    ]
    weights = {
        "stem": planted(16, 27, 0).reshape(16, 3, 3, 3),
        "body": planted(32, 144, 8).reshape(32, 16, 3, 3),
        "head": planted(10, 512, 0),
        "bias": np.linspace(-1, 1, 10, dtype=np.float32),
    }
    return save(path, nodes, {"x": [1, 3, 8, 8]}, {"y": [1, 10]}, weights)


def many_ports(path: Path) -> Path:
    """Three inputs of ranks 3, 2 and 1, one of them of int64, and three outputs."""
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["product"]),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Gather", ["table", "index"], ["rows"]),
    ]
    weights = {"w": planted(16, 24, 8).T.copy(), "table": planted(7, 3, 0)}
    inputs = {"a": [2, 5, 24], "b": [5, 24], "index": [4]}
    outputs = {"product": [2, 5, 16], "sum": [2, 5, 24], "rows": [4, 3]}
    return save(path, nodes, inputs, outputs, weights)


def random_inputs(model: Path, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        port.name: rng.integers(0, 7, port.shape)
        if port.type == "tensor(int64)"
        else rng.normal(size=port.shape).astype(np.float32)
        for port in onnxruntime.InferenceSession(str(model)).get_inputs()
    }


def expected(model: Path, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def largest_error(found: Arrays, wanted: Arrays) -> float:
    assert list(found) == list(wanted)
    assert [x.shape for x in found.values()] == [x.shape for x in wanted.values()]
    return max(float(np.abs(found[name] - y).max() / np.abs(y).max()) for name, y in wanted.items())


def runtime_class(name: str) -> type[Runtime]:
    found = adapter(name)
    missing = [module for module in found.environment.modules if find_spec(module) is None]
    if missing:
        pytest.skip(f"{name} is not installed: no module {', '.join(missing)}")
    return found


Deployed = Callable[[str, Callable[[Path], Path]], tuple[Path, list[Path]]]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """(runtime, maker of a model) -> the model and what it was converted to; each made once."""
    done: dict[Any, tuple[Path, list[Path]]] = {}

    def convert(name: str, make: Callable[[Path], Path]) -> tuple[Path, list[Path]]:
        if (name, make) not in done:
            made = runtime_class(name)()
            folder = tmp_path_factory.mktemp(name)
            model = make(tmp_path_factory.mktemp("model") / "model.onnx")
            done[name, make] = model, made.convert(model, folder)
            assert all(file.parent == folder for file in done[name, make][1])
        return done[name, make]

    return convert


def allow(threads: int) -> None:
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip(f"needs {threads} CPUs")


@pytest.mark.parametrize("make", [image_net, many_ports])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_follow_the_bound_inputs(
    name: str, make: Callable[[Path], Path], deployed: Deployed
) -> None:
    model, files = deployed(name, make)
    assert all(file.stat().st_size > 0 for file in files)
    runtime = adapter(name)()
    runtime.prepare(files)
    first, second = random_inputs(model, 1), random_inputs(model, 2)
    runtime.bind(first)
    runtime.run()
    runtime.run()
    results = runtime.outputs()
    assert largest_error(results, expected(model, first)) < 1e-5
    kept = {key: value.copy() for key, value in results.items()}

    runtime.bind(second)
    runtime.run()
    assert largest_error(runtime.outputs(), expected(model, second)) < 1e-5
    assert all(np.array_equal(results[key], kept[key]) for key in kept)  # not a view
    runtime.close()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_settings_tell_the_threads(name: str, threads: int, deployed: Deployed) -> None:
    allow(threads)
    model, files = deployed(name, image_net)
    runtime = adapter(name)(threads)
    runtime.prepare(files)
    assert runtime.settings()[THREADS_SETTING[name.split("-")[0]]] == str(threads)
    inputs = random_inputs(model, 3)
    runtime.bind(inputs)
    runtime.run()
    assert largest_error(runtime.outputs(), expected(model, inputs)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_version_is_that_of_the_requirement(name: str) -> None:
    found = runtime_class(name)()
    assert found.version and found.version[0].isdigit()
    for requirement in found.environment.requirements:
        assert requirement.partition("==")[2].split(".")[0] == found.version.split(".")[0]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_operators_are_unsupported(name: str, tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="nobody")
    model = save(tmp_path / "model.onnx", [node], {"x": [1, 4]}, {"y": [1, 4]}, {})
    with pytest.raises(UnsupportedModelError, match="Frobnicate"):
        runtime_class(name)().convert(model, tmp_path)


def test_both_builds_of_pivot_are_what_they_say(deployed: Deployed) -> None:
    for name, sparse in (("pivot", "1 of 3"), ("pivot-dense", "0 of 3")):
        runtime = adapter(name)()
        runtime.prepare(deployed(name, image_net)[1])
        assert runtime.settings()["sparse layers"] == sparse
        assert runtime.settings()["target"] == "x86"


def test_openvino_computes_in_bf16_only_when_asked(deployed: Deployed) -> None:
    model, files = deployed("openvino", image_net)
    inputs = random_inputs(model, 4)
    runtime = adapter("openvino")(precision="bf16")
    try:
        runtime.prepare(files)
    except UnsupportedModelError as e:
        pytest.skip(str(e))
    assert runtime.settings()["INFERENCE_PRECISION_HINT"] == "bf16"
    runtime.bind(inputs)
    runtime.run()
    assert 1e-4 < largest_error(runtime.outputs(), expected(model, inputs)) < 5e-2
    exact = adapter("openvino")()
    exact.prepare(files)
    assert exact.settings()["INFERENCE_PRECISION_HINT"] == "f32"


def test_openvino_does_not_emulate_bf16(
    deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "_BF16_FEATURES", {"no such feature"})
    with pytest.raises(UnsupportedModelError, match="bf16"):
        adapter("openvino")(precision="bf16").prepare(deployed("openvino", image_net)[1])


def test_openvino_takes_its_sparse_option(deployed: Deployed) -> None:
    runtime = adapter("openvino-sparse")()
    runtime.prepare(deployed("openvino-sparse", image_net)[1])
    assert runtime.settings()["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] == "0.5"


def test_openvino_names_outputs_that_compiling_merges(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Identity", ["a"], ["y"])]
    model = save(tmp_path / "model.onnx", nodes, {"x": [2, 3]}, {"y": [2, 3]}, {})
    runtime = runtime_class("openvino")()
    runtime.prepare(runtime.convert(model, tmp_path))
    runtime.bind(random_inputs(model, 5))
    runtime.run()
    assert list(runtime.outputs()) == ["y"]


def test_mnn_is_compared_in_fp32_alone() -> None:
    with pytest.raises(ValueError, match="fp32"):
        adapter("mnn")(precision="bf16")


def dense_layer(kind: str, weights: Array) -> tuple[list[Any], Arrays]:
    """A layer ``x -> y`` of one kind with weights given as outputs x inputs."""
    if kind == "Gemm":
        return [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": weights}
    if kind == "MatMul":
        return [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights.T.copy()}
    nodes = [
        helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(weights)),
        helper.make_node("Transpose", ["v"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return nodes, {}


def one_layer(path: Path, kind: str, weights: Array) -> Path:
    outputs, inputs = weights.shape
    if kind == "Conv":
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
        kernel = weights.reshape(outputs, inputs // 4, 2, 2)
        shapes = {"x": [1, inputs // 4, 9, 9]}, {"y": [1, outputs, 8, 8]}
        return save(path, nodes, *shapes, {"w": kernel})
    nodes, held = dense_layer(kind, weights)
    return save(path, nodes, {"x": [3, inputs]}, {"y": [3, outputs]}, held)


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul", "transposed MatMul"])
@pytest.mark.parametrize(("rows", "choice"), [(16, 8), (8, 8), (4, 4), (2, 1), (1, 1), (0, 1)])
def test_mnn_blocks_fit_the_weights(kind: str, rows: int, choice: int, tmp_path: Path) -> None:
    model = one_layer(tmp_path / "model.onnx", kind, planted(96, 200, rows))
    assert choose_block_rows(model) == choice


def test_mnn_blocks_run_along_outputs(tmp_path: Path) -> None:
    along_inputs = planted(96, 200, 8).T.copy()
    assert choose_block_rows(one_layer(tmp_path / "model.onnx", "Gemm", along_inputs)) == 1


def test_mnn_blocks_may_end_short_and_have_a_few_holes(tmp_path: Path) -> None:
    weights = planted(92, 200, 8)
    weights[tuple(np.argwhere(weights)[0])] = 0
    assert choose_block_rows(one_layer(tmp_path / "a.onnx", "Gemm", weights)) == 8
    weights[np.random.default_rng(0).random(weights.shape) < 0.1] = 0
    assert choose_block_rows(one_layer(tmp_path / "b.onnx", "Gemm", weights)) == 1


def test_mnn_blocks_are_chosen_by_pruned_layers_alone(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "big"], ["h"]),
        helper.make_node("MatMul", ["h", "small"], ["y"]),
    ]
    weights = {"big": planted(400, 400, 0), "small": planted(64, 400, 1).T.copy()}
    model = save(tmp_path / "model.onnx", nodes, {"x": [3, 400]}, {"y": [3, 64]}, weights)
    assert choose_block_rows(model) == 1


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("rows", [8, 4, 1])
def test_mnn_stores_and_runs_sparse_weights(kind: str, rows: int, tmp_path: Path) -> None:
    model = one_layer(tmp_path / "model.onnx", kind, planted(96, 200, rows))
    sizes = {}
    for name in ("mnn", "mnn-sparse"):
        runtime = runtime_class(name)()
        folder = tmp_path / name
        folder.mkdir()
        (file,) = files = runtime.convert(model, folder)
        sizes[name] = file.stat().st_size
        runtime.prepare(files)
        inputs = random_inputs(model, 6)
        runtime.bind(inputs)
        runtime.run()
        assert largest_error(runtime.outputs(), expected(model, inputs)) < 1e-5
    assert sizes["mnn-sparse"] < 0.4 * sizes["mnn"]
    note = f"sparse, {rows}x1 blocks" if rows > 1 else "sparse, single weights"
    assert runtime.settings()["weights"] == note


@pytest.mark.parametrize("rows", [8, 4, 1, 300])
def test_mnn_compression_file_is_the_protocol_buffer(rows: int) -> None:
    message = pipeline_class()()
    message.ParseFromString(compression_file(rows))
    assert message.version == "0.0.0"
    (algorithm,) = message.algo
    assert algorithm.type == 1
    assert algorithm.prune_params.type == (rows > 1)
    blocks = algorithm.prune_params.simd_oc_pruner_params.oc_blocks
    assert list(blocks) == ([rows] if rows > 1 else [])
    assert algorithm.prune_params.HasField("level_pruner_params") == (rows == 1)
    assert message.SerializeToString() == compression_file(rows)


def pipeline_class() -> Any:
    """The message class of MNN's schema, as far as `mnn_compression` uses it."""
    field = descriptor_pb2.FieldDescriptorProto
    fields = {  # message -> (name, number, type or message, label)
        "Pipeline": [
            ("version", 1, field.TYPE_STRING, field.LABEL_REQUIRED),
            ("algo", 2, "CompressionAlgo", field.LABEL_REPEATED),
        ],
        "CompressionAlgo": [
            ("type", 1, field.TYPE_INT32, field.LABEL_OPTIONAL),
            ("prune_params", 3, "PruneParams", field.LABEL_OPTIONAL),
        ],
        "PruneParams": [
            ("type", 1, field.TYPE_INT32, field.LABEL_OPTIONAL),
            ("level_pruner_params", 2, "LevelPrunerParams", field.LABEL_OPTIONAL),
            ("simd_oc_pruner_params", 3, "SIMDOCPrunerParams", field.LABEL_OPTIONAL),
        ],
        "LevelPrunerParams": [],
        "SIMDOCPrunerParams": [("oc_blocks", 4, field.TYPE_INT32, field.LABEL_REPEATED)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="compression.proto", package="test")
    for message, members in fields.items():
        added = file.message_type.add(name=message)
        for name, number, kind, label in members:
            made = added.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                made.type, made.type_name = field.TYPE_MESSAGE, f".test.{kind}"
            else:
                made.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Pipeline"))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_aligned_copies(shape: tuple[int, ...], dtype: str) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape), dtype, order="F")
    copy = aligned_copy(array)
    assert copy.ctypes.data % 64 == 0 and copy.flags.c_contiguous and copy.flags.writeable
    assert copy.dtype == array.dtype and copy.shape == shape
    np.testing.assert_array_equal(copy, array)
    assert not np.shares_memory(copy, array)
