"""Whole networks for CUDA, run on the emulated device, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cuda_emulation import emulated_gpu
from relax_nets import chained, conv, make, normal
from tvm import relax

import tvm_pivot
from benchmarks import zoo
from tvm_pivot import build

__all__ = ["emulated_gpu"]

# Of the range of the output.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "tf32": 3e-3}
# Name, variant, target, precision, and what makes it small. GPUs before sm_80 lack the instructions
# of the tensor-core kernels: for them everything runs on CUDA cores.
CASES = (
    ("resnet20_cifar", "8x1@0.2", "cuda", "float32", {}),
    ("resnet20_cifar", "8x1@0.2", "cuda-sm75", "float16", {}),
    ("resnet20_cifar", "16x1@0.2", "cuda", "float16", {}),
    ("mobilenet_v1", "8x1@0.1", "cuda", "float32", {"image": 32}),
    ("lstm", "8x1@0.1", "cuda", "float32", {"length": 2}),
    ("bert2", "16x1@0.1", "cuda", "float16", {"length": 8}),
    ("resnet20_cifar", "16x1@0.2", "cuda", "bfloat16", {}),
    ("resnet20_cifar", "8x1@0.2", "cuda", "tf32", {}),
    ("bert2", "16x1@0.1", "cuda", "bfloat16", {"length": 8}),
)


def load(name: str, variant: str, sizes: dict[str, int], request: pytest.FixtureRequest) -> Path:
    """A network of the standing set."""
    if name.endswith("_cifar") or name == "ultraface":
        request.getfixturevalue("shared_data")
    return Path(zoo.load(name, variant, **sizes))


@pytest.mark.parametrize(("name", "variant", "target", "precision", "sizes"), CASES)
def test_network_on_the_emulated_gpu(
    name: str,
    variant: str,
    target: str,
    precision: str,
    sizes: dict[str, int],
    emulated_gpu: None,
    request: pytest.FixtureRequest,
) -> None:
    path = load(name, variant, sizes, request)
    x = zoo.example_input(name, **sizes).numpy()
    reference = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    net = build(path, target=target, precision=precision, pivot_seconds=0)
    kernels = [layer.kernel for layer in net.report.layers if layer.mode == "sparse"]
    assert kernels
    if name.startswith("resnet"):  # the others have too few pixels here
        tensor_cores = any("tensor_cores" in kernel for kernel in kernels)
        assert tensor_cores == (target == "cuda" and precision != "float32")
    assert net.report.compiled_moves is None or net.report.compiled_moves.gathers == 0
    # The second run replays what the first one recorded, where that pays.
    for inputs in (x, np.ascontiguousarray(np.flip(x, -1)) * np.float32(0.5)):
        (expected,) = reference.run(None, {reference.get_inputs()[0].name: inputs})
        got = net.run(inputs)
        assert (got.shape, got.dtype) == (expected.shape, np.float32)
        assert np.max(np.abs(got - expected)) <= TOLERANCE[precision] * np.ptp(expected)


def test_a_network_survives_export_and_loading(emulated_gpu: None, tmp_path: Path) -> None:
    weight = normal(8, 4, 3, 3) * (np.random.default_rng(0).random((1, 4, 3, 3)) < 0.3)
    body = chained(conv(weight.astype(np.float32), padding=1), relax.op.nn.relu)
    mod = make(body, (2, 4, 6, 6))
    on_cpu, on_gpu = (build(mod, target=t) for t in ("x86", "cuda"))
    loaded = tvm_pivot.load(on_gpu.export(tmp_path / "net.pivot"))
    assert loaded.manifest == on_gpu.manifest
    assert loaded.manifest.target.gpu is not None
    x = np.random.default_rng(1).standard_normal(on_cpu.inputs[0].shape).astype(np.float32)
    first, again = loaded.run(x), loaded.run(2 * x)
    np.testing.assert_allclose(first, on_cpu.run(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again, on_cpu.run(2 * x), rtol=1e-4, atol=1e-4)
    assert not np.shares_memory(first, again)
    with pytest.raises(tvm_pivot.InputError, match="expected float32"):
        loaded.run(x.astype(np.float64))
