"""The runtimes that start from torch, and what the module is made of that they start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from importer_oracle import onnxruntime_run
from onnx import TensorProto, numpy_helper
from torch_oracle import Arrays, agree, close, data, functions, ints, model_of, node, run, translate

from tvm_pivot.bench.environments import install_command, is_ready
from tvm_pivot.bench.runtimes.onnx_to_torch import to_bfloat16
from tvm_pivot.bench.specs import resolve
from tvm_pivot.bench.workers import Worker

LONG = 300.0
X = data(3, 5)


def test_dense_layers_become_linear_with_bias(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "b m", "a"), node("Relu", "a", "y")]
    feeds, weights = {"x": data(2, 3, 5)}, {"w": data(5, 4), "b": data(4)}
    network = agree(model_of(nodes, feeds, ["y"], weights), feeds, tmp_path)
    assert functions(network) == ["linear", "relu"]
    assert sorted(tuple(p.shape) for p in network.module.parameters()) == [(4,), (4, 5)]
    # The sum is an output too: then it cannot be part of anything.
    network = agree(model_of(nodes, feeds, ["y", "m"], weights), feeds, tmp_path)
    assert functions(network) == ["linear", "add", "relu"]


def test_batch_norm_becomes_part_of_the_convolution(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c"), node("BatchNormalization", "c s b m v", "y")]
    weights = {"w": data(6, 4, 3, 2)} | dict(
        zip("sbm", (data(6), data(6) / 2, data(6) * 3), strict=True)
    )
    weights["v"] = data(6, positive=True)
    feeds = {"x": data(2, 4, 9, 8)}
    assert functions(agree(model_of(nodes, feeds, ["y"], weights), feeds, tmp_path)) == ["conv2d"]


@pytest.mark.parametrize("form", ["x e 2", "x 2 e", "x2 e", "e2 x"])
@pytest.mark.parametrize("inner", ["Div", "Mul"])
def test_gelu_is_found_in_pieces(form: str, inner: str, tmp_path: Path) -> None:
    products = {
        "x e 2": [node("Mul", "x e", "p"), node("Mul", "p half", "y")],
        "x 2 e": [node("Mul", "x half", "p"), node("Mul", "p e", "y")],
        "x2 e": [node("Mul", "half x", "p"), node("Mul", "e p", "y")],
        "e2 x": [node("Mul", "e half", "p"), node("Mul", "x p", "y")],
    }
    nodes = [node(inner, "x root", "r"), node("Erf", "r", "f"), node("Add", "f one", "e")]
    root = np.float32(2**0.5 if inner == "Div" else 0.5**0.5)
    weights = {"root": root, "one": np.float32(1), "half": np.float32(0.5)}
    feeds = {"x": X}
    model = model_of([*nodes, *products[form]], feeds, ["y"], weights)
    assert functions(agree(model, feeds, tmp_path)) == ["gelu"]


def test_what_is_almost_gelu_stays_as_it_is(tmp_path: Path) -> None:
    nodes = [node("Div", "x root", "r"), node("Erf", "r", "f"), node("Add", "f one", "e")]
    nodes += [node("Mul", "x e", "p"), node("Mul", "p half", "y")]
    feeds = {"x": X}
    for name in ("root", "one", "half"):
        weights = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
        weights[name] = np.float32(0.7)
        network = agree(model_of(nodes, feeds, ["y"], weights), feeds, tmp_path)
        assert "gelu" not in functions(network)


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_found_in_pieces(square: str, affine: bool, tmp_path: Path) -> None:
    mean = {"axes": [-1]}
    nodes = [
        node("ReduceMean", "x", "m", **mean),
        node("Sub", "x m", "d"),
        node(square, "d two" if square == "Pow" else "d d", "q"),
        node("ReduceMean", "q", "v", **mean),
        node("Add", "v eps", "ve"),
        node("Sqrt", "ve", "s"),
        node("Div", "d s", "n"),
        node("Mul", "n w", "nw"),
        node("Add", "nw b", "y"),
    ]
    weights = {"two": np.float32(2), "eps": np.float32(1e-3), "w": data(5), "b": data(5) / 2}
    feeds = {"x": X}
    model = model_of(nodes if affine else nodes[:-2], feeds, ["y" if affine else "n"], weights)
    assert functions(agree(model, feeds, tmp_path)) == ["layer_norm"]
    weights["w"] = data(3, 1)  # not of the normalised axis
    network = agree(model_of(nodes, feeds, ["y"], weights), feeds, tmp_path)
    assert functions(network) == ["layer_norm", "mul", "add"]


def test_arithmetic_on_shapes_leaves_no_trace(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape first", "n"),
        node("Mul", "n two", "n2"),
        node("Unsqueeze", "n2 axis", "n3"),
        node("Concat", "n3 rest", "wanted", axis=0),
        node("Reshape", "x wanted", "r"),
        node("ConstantOfShape", "wide", "zeros", value=numpy_helper.from_array(np.float32([2]))),
        node("Range", "first limit one", "range"),
        node("Cast", "range", "floats", to=TensorProto.FLOAT),
        node("Add", "zeros floats", "c"),
        node("Add", "r c", "y"),
    ]
    scalars = {"first": 0, "limit": 20, "one": 1, "two": 2}
    weights: dict[str, np.ndarray | None] = {k: np.array(v) for k, v in scalars.items()}
    weights |= {"axis": ints(0), "rest": ints(-1), "wide": ints(20)}
    feeds = {"x": data(2, 40)}
    network = agree(model_of(nodes, feeds, ["y"], weights), feeds, tmp_path)
    assert functions(network) == ["reshape", "add"]
    assert [tuple(parameter.shape) for parameter in network.module.parameters()] == [(20,)]


def test_keys_of_attention_are_transposed_in_two_steps(tmp_path: Path) -> None:
    """TorchInductor takes a single permutation for a transposition."""
    nodes = [
        node("Transpose", "q", "qt", perm=[0, 2, 1, 3]),
        node("Transpose", "k", "kt", perm=[0, 2, 3, 1]),
        node("MatMul", "qt kt", "s"),
        node("Softmax", "s", "p", axis=-1),
        node("Transpose", "v", "vt", perm=[0, 2, 1, 3]),
        node("MatMul", "p vt", "y"),
    ]
    feeds = {name: data(1, 4, 4, 8) + i for i, name in enumerate("qkv")}
    network = agree(model_of(nodes, feeds, ["y"], {}), feeds, tmp_path)
    steps = ["permute", "permute", "transpose", "matmul", "softmax", "permute", "matmul"]
    assert functions(network) == steps


def convolutional() -> tuple[onnx.ModelProto, Arrays]:
    """Convolution, batch norm, pooling and two outputs, of which one is softmax."""
    nodes = [
        node("Conv", "x w b", "c", pads=[1, 1, 1, 1]),
        node("BatchNormalization", "c s o m v", "n"),
        node("Relu", "n", "r"),
        node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
        node("ReduceMean", "p", "g", axes=[2, 3], keepdims=0),
        node("Gemm", "g d e", "logits", transB=1),
        node("Cast", "logits", "f", to=TensorProto.FLOAT),
        node("Softmax", "f", "y"),
    ]
    weights: dict[str, np.ndarray | None] = {
        "w": data(8, 3, 3, 3),
        "b": data(8),
        "d": data(5, 8) / 10,
    }
    weights |= {"s": data(8), "o": data(8) / 2, "m": data(8), "v": data(8, positive=True)}
    weights["e"] = data(5)
    feeds = {"x": data(1, 3, 8, 8)}
    return model_of(nodes, feeds, ["y", "p"], weights), feeds


def test_the_module_can_be_exported(tmp_path: Path) -> None:
    model, feeds = convolutional()
    network = agree(model, feeds, tmp_path)
    assert functions(network)[:3] == ["conv2d", "relu", "max_pool2d"]
    exported = torch.export.export(network.module, tuple(map(torch.tensor, feeds.values())))
    close(run(exported.module(), feeds), onnxruntime_run(model, feeds))


def test_a_module_in_bf16_computes_in_bf16(tmp_path: Path) -> None:
    model, feeds = convolutional()
    module = to_bfloat16(translate(model, tmp_path).module)
    with torch.inference_mode():
        results = module(torch.tensor(feeds["x"]).bfloat16())
    assert {result.dtype for result in results} == {torch.bfloat16}
    for got, want in zip(results, onnxruntime_run(model, feeds), strict=True):
        error = np.abs(got.float().numpy() - want).max() / np.abs(want).max()
        assert 1e-5 < error < 0.05


@pytest.mark.parametrize(
    ("runtime", "threads", "precision", "tolerance"),
    [
        ("torch", 2, "fp32", 1e-5),
        ("torch", 1, "bf16", 0.05),
        ("torch-compile", 1, "fp32", 1e-5),
        ("executorch", 2, "fp32", 1e-5),
    ],
)
def test_adapters_give_the_outputs_of_onnx_runtime(
    runtime: str, threads: int, precision: str, tolerance: float, tmp_path: Path
) -> None:
    (spec,) = resolve([runtime])
    if not is_ready(spec.adapter):
        pytest.skip(f"{runtime} is not installed: {install_command(runtime)}")
    model, feeds = convolutional()
    path, folder = tmp_path / "model.onnx", tmp_path / "deployed"
    onnx.save(model, path)
    folder.mkdir()
    np.savez(tmp_path / "x.npz", *feeds.values())
    np.savez(tmp_path / "other.npz", *(-array for array in feeds.values()))
    files = {key: str(tmp_path / f"{key}.npz") for key in ("other", "outputs")}
    with Worker(spec, threads=threads, precision=precision) as worker:
        deployed = worker.request("convert", timeout=LONG, model=str(path), folder=str(folder))
        prepared = worker.request("prepare", timeout=LONG, files=deployed["files"])
        checked = worker.request(
            "check", timeout=LONG, inputs=str(tmp_path / "x.npz"), names=list(feeds), **files
        )
        timed = worker.request("time", timeout=LONG, warm=1, calls=3)
    assert prepared["settings"]["threads"] == str(threads)
    assert prepared["version"] and len(timed["seconds"]) == 3
    assert checked["names"] == ["y", "p"]
    with np.load(tmp_path / "outputs.npz") as arrays:
        for name, want in zip(arrays.files, onnxruntime_run(model, feeds), strict=True):
            assert arrays[name].dtype == want.dtype and arrays[name].shape == want.shape
            assert np.abs(arrays[name] - want).max() <= tolerance * np.abs(want).max()
