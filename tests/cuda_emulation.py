"""A CUDA device made of this CPU, to run compiled networks where no GPU is.

The text that TVM makes for nvcc is compiled by g++ instead, behind `cuda_emulator/device.h`: each
block's threads run as coroutines. Stand-ins for the driver and the CUDA runtime load what
comes out. TVM's own CUDA runtime, virtual machine and code generator run as on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import pytest
import tvm

from tvm_pivot import cuda_compiler
from tvm_pivot.cuda_compiler import KernelResources
from tvm_pivot.errors import UnsupportedTargetError

FOLDER = Path(__file__).parent / "cuda_emulator"
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(')
_DYNAMIC = re.compile(r"extern __shared__ (?:\w+\(\d+\) )*(\w+) (\w+)\[\];")
_INCLUDE = re.compile(r"^\s*#include <cuda[\w/.]*>", re.MULTILINE)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tvm-pivot-emulator-")


def scratch() -> Path:
    """Where the stand-ins for the driver and the CUDA runtime are, for other processes."""
    return Path(_scratch().name)


def _compile(out: Path, source: Path, *options: str) -> None:
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-w", *options, "-o", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@cache
def install() -> None:
    """Load the stand-ins for the driver and the CUDA runtime, before anything else loads them."""
    factory = tvm.get_global_func("ffi.Module.create.cuda", allow_missing=True)
    assert factory is None, "a driver is loaded already"
    folder = Path(_scratch().name)
    driver, runtime = folder / "libcuda.so.1", folder / "libcudart.so.13"
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: *; };")
    _compile(driver, FOLDER / "driver.cpp", "-O1", "-Wl,-soname,libcuda.so.1")
    ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL)
    options = (f"-Wl,--version-script={versions}", "-Wl,-soname,libcudart.so.13")
    _compile(runtime, FOLDER / "runtime.cpp", "-O1", *options)
    ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"))


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks built for CUDA run on the emulated device."""
    install()
    monkeypatch.setattr(cuda_compiler, "prepare", partial(cuda_compiler.prepare, compile_for_cpu))


@dataclass
class Compiled:
    """What nvcc made: fatbins, and what ptxas reports of their kernels."""

    images: list[bytes] = field(default_factory=list)
    kernels: list[KernelResources] = field(default_factory=list)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Networks built for CUDA are compiled by nvcc: those for sm_80 for sm_90 too, at once."""
    try:
        cuda_compiler.find_nvcc()
    except UnsupportedTargetError as e:
        pytest.skip(str(e))
    install()
    made = Compiled()

    def compile_text(text: str, arch: str) -> bytes:
        archs = ("sm_80", "sm_90") if arch == "sm_80" else (arch,)
        image, resources = cuda_compiler.compile_fatbin(text, *archs)
        numbers = [int(arch.removeprefix("sm_")) for arch in archs]
        expected = [(kind, number) for kind in ("cubin", "ptx") for number in numbers]
        assert sorted(fatbin_entries(image)) == expected
        made.images.append(image)
        made.kernels.extend(resources)
        return image

    monkeypatch.setattr(cuda_compiler, "prepare", partial(cuda_compiler.prepare, compile_text))
    return made


@pytest.fixture
def nvcc(compiled: Compiled) -> list[KernelResources]:
    """The same; what ptxas reports."""
    return compiled.kernels


def fatbin_entries(image: bytes) -> list[tuple[str, int]]:
    """Kind and architecture of each code object in a fatbin."""
    magic, _, header, size = struct.unpack_from("<IHHQ", image)
    assert magic == 0xBA55ED50, "no fatbin"
    entries, at = [], header
    while at < header + size:
        kind, _, head, body = struct.unpack_from("<HHIQ", image, at)
        (arch,) = struct.unpack_from("<I", image, at + 28)
        entries.append(({1: "ptx", 2: "cubin"}.get(kind, str(kind)), arch))
        at += head + body
    return entries


def compile_for_cpu(text: str, arch: str) -> bytes:
    """A module's image: the path of a library with its kernels."""
    names = sorted(set(_KERNEL.findall(text)))
    body = _DYNAMIC.sub(r"\1* \2 = reinterpret_cast<\1*>(buf_dyn_shmem);", text)
    body = _INCLUDE.sub("", body)
    body = re.sub(r"\balignas\((\d+)\)", r"__attribute__((aligned(\1)))", body)
    lines = ['#include "device.h"', '#include "tensor_cores.h"', body, "namespace emulated {"]
    lines += [
        "template <class F> struct Sizes;",
        "template <class... A> struct Sizes<void(A...)> "
        "{ static constexpr int of[] = {int(sizeof(A))..., 0}; };",
        "struct Kernel { void (*run)(void**, const unsigned*); const int* sizes; };",
        "}",
    ]
    for name in names:
        start = text.rindex(f" {name}(")
        end = text.find("\n}\n", start)
        waits = re.search(r"__sync|__shfl|tensor_core_", text[start:end]) is not None
        lines.append(
            f"static void run_{name}(void** a, const unsigned* s) "
            f"{{ emulated::Launch<{name}>::grid(a, s, {str(waits).lower()}); }}\n"
            f'extern "C" emulated::Kernel emulated_{name}'
            f"{{run_{name}, emulated::Sizes<decltype({name})>::of}};"
        )
    source = "\n".join(lines)
    stem = hashlib.sha256(source.encode()).hexdigest()[:16]
    folder = Path(_scratch().name)
    path, library = folder / f"{stem}.cpp", folder / f"{stem}.so"
    if not library.exists():
        path.write_text(source)
        checks = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
        options = ("-O1", "-march=native", "-fno-strict-aliasing", *checks)
        _compile(library, path, *options, f"-I{FOLDER}")
    return str(library).encode() + b"\0"
