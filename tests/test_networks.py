"""Whole networks, compiled for x86, against ONNX Runtime and torch.

ResNet-50 runs at its full size; the others at sizes that keep the same kinds of layers, since what
differs at full size is time alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import zoo
from tvm_pivot import build
from tvm_pivot.report import Report

Outputs = tuple[NDArray[np.float32], ...]
TOLERANCE = 1e-3  # of the range of the reference's output


@dataclass(frozen=True)
class Case:
    """A network of the standing set, and whether the compiler gets the ONNX file or the module."""

    name: str
    variant: str
    image: int | None = None
    length: int | None = None
    torch: bool = False
    layers: int | None = None  # pruned layers, where they are not one per pruned weight

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}-{'torch' if self.torch else 'onnx'}"


CASES = (
    Case("resnet50", "8x1@0.1"),
    Case("resnet50", "dlmc@0.1", image=64),
    Case("resnet18", "16x1@0.1", image=64, torch=True),
    Case("resnet18", "dense", image=64),
    Case("vgg16", "8x1@0.1", image=32),
    Case("mobilenet_v1", "8x1@0.1", image=96),
    Case("mobilenet_v2", "4x1@0.2", image=96, torch=True),
    Case("bert2", "16x1@0.1", length=64),
    Case("mlp", "1x1@0.1"),
    Case("mlp_b1", "hidden-diag@0.125"),
    # A recurrence over 4 steps: one product with all inputs, one per step with the state before
    # it, except at the first, whose state is zero.
    Case("lstm", "8x1@0.1", length=4, torch=True, layers=4),
    Case("gru", "8x1@0.1", length=4, torch=True, layers=4),
    Case("lstm", "8x1@0.1", length=4, layers=4),
    Case("gru", "8x1@0.1", length=4, layers=4),
    Case("resnet20_cifar", "dense", torch=True),
    Case("resnet56_cifar", "8x1@0.2"),
)


def inputs_for(case: Case) -> list[NDArray[np.float32]]:
    """Two different inputs: the second shows what a run leaves behind for the next."""
    first: NDArray[np.float32] = zoo.example_input(
        case.name, image=case.image, length=case.length
    ).numpy()
    return [first, np.ascontiguousarray(np.flip(first, -1)) * np.float32(0.5)]


def run_onnxruntime(path: Path, x: NDArray[np.float32]) -> Outputs:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, {session.get_inputs()[0].name: x}))


def run_torch(module: torch.nn.Module, x: NDArray[np.float32]) -> Outputs:
    with torch.no_grad():
        return (module(torch.from_numpy(x)).numpy(),)


def as_tuple(outputs: NDArray[np.float32] | Outputs) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def assert_close(got: NDArray[np.float32] | Outputs, expected: Outputs) -> None:
    outputs = as_tuple(got)
    assert len(outputs) == len(expected)
    for y, reference in zip(outputs, expected, strict=True):
        assert (y.shape, y.dtype) == (reference.shape, reference.dtype)
        scale = float(np.ptp(reference))
        assert scale > 0, "a constant reference would prove nothing"
        error = float(np.max(np.abs(y - reference)))  # NaN fails the comparison below
        assert error <= TOLERANCE * scale, f"error {error:.3g} on a range of {scale:.3g}"


def assert_report(report: Report, case: Case) -> None:
    """Every pruned layer is listed with its density; each decision has its reason."""
    variant = zoo.Variant.parse(case.variant)
    assert all(layer.reason for layer in report.layers if layer.mode == "dense")
    pruned = [layer for layer in report.layers if layer.density < 0.5]
    if variant.kind == "dense":
        assert not pruned
        assert all(layer.mode == "dense" for layer in report.layers)
        return
    net, _ = zoo.build_torch(case.name, case.variant, image=case.image, length=case.length)
    weights = zoo.prunable_weights(zoo.find(case.name), net)
    assert len(pruned) == (case.layers or len(weights))
    for layer in pruned:
        assert layer.density == pytest.approx(variant.density, abs=0.01), layer.name
    assert any(layer.mode == "sparse" for layer in pruned)
    if variant.kind == "block" and variant.block != (1, 1):
        rows, columns = variant.block
        patterns = {layer.pattern for layer in pruned if layer.mode == "sparse"}
        assert patterns == {f"{rows}x{columns} blocks"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_standing_network(case: Case, request: pytest.FixtureRequest) -> None:
    if case.name.endswith("_cifar") or case.variant.startswith("dlmc"):
        request.getfixturevalue("shared_data")
    first, second = inputs_for(case)
    if case.torch:
        module, _ = zoo.build_torch(case.name, case.variant, image=case.image, length=case.length)
        expected = [run_torch(module, x) for x in (first, second)]
        net = build(module, target="x86", example_inputs=(torch.from_numpy(first),))
    else:
        path = zoo.load(case.name, case.variant, image=case.image, length=case.length)
        expected = [run_onnxruntime(path, x) for x in (first, second)]
        net = build(path, target="x86")
    once = net.run(first)
    assert_close(once, expected[0])
    kept = [y.copy() for y in as_tuple(once)]
    assert_close(net.run(second), expected[1])
    for y, before in zip(as_tuple(net.run(first)), kept, strict=True):
        np.testing.assert_array_equal(y, before, err_msg="a run depends on the one before it")
    for y, before in zip(as_tuple(once), kept, strict=True):
        np.testing.assert_array_equal(y, before, err_msg="a later run overwrote this result")
    assert_report(net.report, case)


@pytest.mark.parametrize(
    ("file", "shape", "low"),
    [
        ("lenet5_dns.onnx", (1, 1, 28, 28), 0.0),
        ("lenet300_dns.onnx", (1, 1, 28, 28), 0.0),
        ("ultraface_rfb320.onnx", (1, 3, 240, 320), -1.0),
    ],
)
def test_file_from_elsewhere(
    file: str, shape: tuple[int, ...], low: float, shared_data: Path
) -> None:
    path = shared_data / file
    if not path.is_file():
        pytest.skip(f"needs {path}")
    net = build(path, target="x86")
    for seed in range(2):
        x = np.random.default_rng(seed).uniform(low, 1.0, shape).astype(np.float32)
        assert_close(net.run(x), run_onnxruntime(path, x))
    if "dns" in file:  # the densest layer keeps 14 %
        assert all(layer.density < 0.2 for layer in net.report.layers)
