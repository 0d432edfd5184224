"""Every network of the standing set through nvcc, in full size: machine code, PTX, no spills."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from cuda_emulation import Compiled, compiled
from test_cuda_networks import load

from benchmarks.zoo.catalogue import CATALOGUE
from tvm_pivot import build
from tvm_pivot.schedules.cuda_planes import SHARED_BYTES

__all__ = ["compiled"]

VARIANTS = {
    "resnet18": "8x1@0.1",
    "resnet50": "16x1@0.1",
    "vgg16": "8x1@0.1",
    "mobilenet_v1": "8x1@0.1",
    "mobilenet_v2": "16x1@0.2",
    "bert2": "16x1@0.1",
    "mlp": "32x1@0.1",
    "mlp_b1": "1x1@0.1",
    "lstm": "8x1@0.1",
    "gru": "4x1@0.1",
    "resnet20_cifar": "8x1@0.2",
    "resnet56_cifar": "16x1@0.2",
    "ultraface": "8x1@0.1",
}
# VGG-16, half a gigabyte to make and to read, is compiled once, for tensor cores. The other types,
# and tiles for sm_90 alone (its bulk copies and clusters), with networks whose layers differ most.
CASES = [
    *((name, "float32", "cuda") for name in VARIANTS if name != "vgg16"),
    *((name, "float16", "cuda") for name in VARIANTS),
    *((name, "bfloat16", "cuda") for name in ("resnet18", "mobilenet_v2", "bert2", "lstm")),
    *((name, "tf32", "cuda") for name in ("resnet50", "bert2", "ultraface")),
    *((name, "float16", "h100") for name in ("resnet50", "mobilenet_v1", "mlp")),
    *((name, "tf32", "h100") for name in ("resnet18", "mlp")),
]


def test_every_network_is_compiled() -> None:
    assert VARIANTS.keys() == set(CATALOGUE)
    assert {name for name, *_ in CASES} == VARIANTS.keys()


@pytest.mark.parametrize(("name", "precision", "target"), CASES)
def test_network_compiles_without_spills(
    name: str,
    precision: str,
    target: str,
    compiled: Compiled,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    path = load(name, VARIANTS[name], {}, request)
    net = build(path, target=target, precision=precision, pivot_seconds=0)
    archs = {"sm_80", "sm_90"} if target == "cuda" else {"sm_90"}
    kernels = {layer.kernel for layer in net.report.layers} - {""}
    assert any("sparse" in kernel for kernel in kernels)
    for arch in archs:
        found = {r.name.removesuffix("_kernel") for r in compiled.kernels if r.arch == arch}
        assert kernels <= found
    assert {r.arch for r in compiled.kernels} == archs
    assert [r for r in compiled.kernels if r.spill_bytes] == []
    assert max(r.shared_bytes for r in compiled.kernels) <= SHARED_BYTES
    with zipfile.ZipFile(net.export(tmp_path / "net.pivot")) as archive:
        library = archive.read("lib.so")
    assert all(image in library for image in compiled.images)
