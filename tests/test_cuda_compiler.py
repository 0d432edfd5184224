"""Compiling for CUDA without a GPU: targets, nvcc, the driver's stand-in, and what it all says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation import compiled, fatbin_entries, nvcc
from relax_nets import chained, conv, make, normal
from tvm import relax
from tvm.ir import IRModule

from tvm_pivot import build, cuda_compiler
from tvm_pivot.cuda_compiler import KernelResources, parse_resources
from tvm_pivot.errors import UnsupportedTargetError
from tvm_pivot.targets import PRECISIONS, PRESETS, resolve

CUDA = sorted(name for name, target in PRESETS.items() if target.family == "cuda")
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_kernel' for 'sm_80'
ptxas info    : Function properties for a_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8192 bytes smem, 432 bytes cmem[0]
ptxas info    : Compile time = 10.0 ms
ptxas info    : Compiling entry function 'b_kernel' for 'sm_80'
ptxas info    : Function properties for b_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 360 bytes cmem[0]
"""
TEXT = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'

__all__ = ["compiled", "nvcc"]


def small_net() -> IRModule:
    """A convolution and a ReLU."""
    return make(chained(conv(normal(8, 4, 3, 3), padding=1), relax.op.nn.relu), (1, 4, 8, 8))


@pytest.mark.parametrize("name", CUDA)
def test_presets_are_targets_tvm_knows(name: str) -> None:
    target = PRESETS[name]
    assert target.gpu is not None
    assert str(target.to_tvm().arch) == target.gpu.arch
    assert target.gpu.multiprocessors > 0
    assert target.gpu.fp32_lanes in (64, 128)
    assert target.gpu.memory_gbs < target.gpu.l2_gbs


def test_presets_cover_the_architectures() -> None:
    archs = {gpu.arch for name in CUDA if (gpu := PRESETS[name].gpu) is not None}
    assert archs == {f"sm_{number}" for number in (75, 80, 86, 89, 90)}


def test_cuda_means_all_gpus_from_sm_80_on() -> None:
    target = resolve("cuda")
    assert target.name == "cuda"
    assert target.gpu == PRESETS["cuda-sm80"].gpu


def test_only_gpus_have_more_than_one_precision() -> None:
    assert [resolve("h100").with_precision(p).precision for p in PRECISIONS] == list(PRECISIONS)
    assert resolve("x86").with_precision("float32") == resolve("x86")
    with pytest.raises(UnsupportedTargetError, match=r"'zen4' does not compute in"):
        PRESETS["zen4"].with_precision("float16")
    for late in ("bfloat16", "tf32"):
        with pytest.raises(UnsupportedTargetError, match=rf"'t4' is sm_75, which has no {late}"):
            PRESETS["t4"].with_precision(late)
    with pytest.raises(UnsupportedTargetError, match=r"unknown precision 'int8'; known: float32"):
        PRESETS["h100"].with_precision("int8")


def test_what_ptxas_reports_is_read() -> None:
    first, second = parse_resources(LOG)
    assert first == KernelResources("a_kernel", "sm_80", 40, 8192, 16, 20)
    assert second == KernelResources("b_kernel", "sm_80", 255, 0, 0, 0)


def test_without_nvcc_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    monkeypatch.setattr(cuda_compiler.os, "access", lambda *_: False)
    with pytest.raises(UnsupportedTargetError, match="nvcc, which is not on PATH"):
        build(small_net(), target="cuda")


def test_a_library_holds_machine_code_and_ptx(nvcc: list[KernelResources]) -> None:
    image, resources = cuda_compiler.compile_fatbin(TEXT, "sm_90")
    assert sorted(fatbin_entries(image)) == [("cubin", 90), ("ptx", 90)]
    assert [r.name for r in resources] == ["twice"]


def test_what_nvcc_refuses_is_told(nvcc: list[KernelResources]) -> None:
    with pytest.raises(cuda_compiler.CompileError, match=r"(?s)sm_80.*identifier"):
        cuda_compiler.compile_fatbin("void f() { unknown(); }", "sm_80")


def test_a_machine_without_a_gpu_compiles_and_exports_but_does_not_run(
    nvcc: list[KernelResources], tmp_path: Path
) -> None:
    path = tmp_path / "net.pivot"
    code = f"""
import sys; sys.path.append({str(Path(__file__).parent)!r})
import numpy as np, tvm_pivot
from test_cuda_compiler import small_net
from tvm_pivot import cuda_compiler
with cuda_compiler.watch_kernels() as kernels:
    net = tvm_pivot.build(small_net(), target="h100")
assert {{k.arch for k in kernels}} == {{"sm_90"}}, kernels
net.export({str(path)!r})
for start in (lambda: net.run(np.zeros(net.inputs[0].shape, "float32")),
              lambda: tvm_pivot.load({str(path)!r})):
    try:
        start()
    except tvm_pivot.PivotError as e:
        print(type(e).__name__, e)
"""
    try:
        subprocess.run(["nvidia-smi"], capture_output=True, check=True)
        pytest.skip("this machine has a GPU")
    except (OSError, subprocess.CalledProcessError):
        pass
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this machine has no NVIDIA") == 2
    assert "ArtifactError" in done.stdout
