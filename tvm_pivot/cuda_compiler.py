"""Compile CUDA text with nvcc, on machines with and without a GPU.

TVM's CUDA module links against the driver, which only machines with a GPU have. Elsewhere a
library of that name is made and loaded whose every function says that there is no device: enough
to compile and export, and `Session` says clearly that nothing can run.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CompileError, UnsupportedTargetError

_FACTORY, _CALLBACK = "ffi.Module.create.cuda", "tvm_callback_cuda_compile"
_DRIVER = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_DRIVER_FUNCTIONS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuInit",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
# IEEE arithmetic but for flushed denormals: numbers as the CPU backend computes them.
_FLAGS = ("-O3", "-std=c++17", "--ftz=true", "--fmad=true", "--expt-relaxed-constexpr")

Compiler = Callable[[str, str], bytes]


@dataclass(frozen=True)
class KernelResources:
    """What ptxas reports of one kernel.

    Attributes:
        name: the kernel.
        arch: what it was compiled for, e.g. ``"sm_80"``.
        registers: of a thread.
        shared_bytes: static shared memory of a block.
        stack_bytes: local memory of a thread: arrays that did not fit registers.
        spill_bytes: stores and loads of registers that ran out.
    """

    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


_watched: ContextVar[list[KernelResources] | None] = ContextVar("_watched", default=None)


@contextmanager
def watch_kernels() -> Iterator[list[KernelResources]]:
    """A list to which every kernel compiled inside is added."""
    found: list[KernelResources] = []
    token = _watched.set(found)
    try:
        yield found
    finally:
        _watched.reset(token)


def find_nvcc() -> Path:
    """NVIDIA's compiler, from ``PATH``, ``CUDA_HOME`` or where it is usually installed.

    Raises:
        UnsupportedTargetError: there is none.
    """
    places: list[str | None] = [shutil.which("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places += [f"{home}/bin/nvcc" for home in homes if home]
    for place in places:
        if place and os.access(place, os.X_OK):
            return Path(place)
    raise UnsupportedTargetError(
        "CUDA targets need NVIDIA's compiler nvcc, which is not on PATH and not in CUDA_HOME: "
        "install the CUDA toolkit 13 (a GPU is not needed to compile)"
    )


def compile_fatbin(text: str, *archs: str) -> tuple[bytes, tuple[KernelResources, ...]]:
    """CUDA text as a fatbin: for each of `archs` machine code, and PTX for every later GPU.

    Raises:
        UnsupportedTargetError: there is no nvcc.
        CompileError: nvcc refuses the text.
    """
    numbers = [arch.removeprefix("sm_") for arch in archs]
    codes = [f"-gencode=arch=compute_{n},code=[sm_{n},compute_{n}]" for n in numbers]
    # Where it may choose how many blocks run side by side, ptxas spills for one more of them.
    text = re.sub(r"__launch_bounds__\((\d+)\)", r"__launch_bounds__(\1, 1)", text)
    with tempfile.TemporaryDirectory(prefix="tvm-pivot-") as folder:
        source, out = Path(folder, "kernels.cu"), Path(folder, "kernels.fatbin")
        source.write_text(text)
        command = [str(find_nvcc()), "-fatbin", *_FLAGS, *codes, "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-o", out, source], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CompileError(
                f"nvcc failed for {', '.join(archs)}:\n{done.stderr.strip()[-2000:]}"
            )
        return out.read_bytes(), tuple(parse_resources(done.stderr))


def parse_resources(log: str) -> Iterator[KernelResources]:
    """The kernels in what ``ptxas -v`` wrote."""
    entries = re.split(r"Compiling entry function ", log)[1:]
    for entry in entries:
        head = re.match(r"'([^']+)' for '([^']+)'", entry)
        if head is None:
            continue

        def number(pattern: str, text: str = entry) -> int:
            return sum(int(n) for n in re.findall(pattern, text))

        yield KernelResources(
            head.group(1),
            head.group(2),
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes smem"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill (?:stores|loads)"),
        )


def prepare(compile_text: Compiler | None = None) -> None:
    """Make TVM able to compile for CUDA in this process, with `compile_text` in place of nvcc.

    Raises:
        UnsupportedTargetError: nvcc, the CUDA runtime or (without a GPU) a C compiler is missing.
    """
    import tvm

    if compile_text is None:
        find_nvcc()
        _load_runtime()

    def callback(text: str) -> bytearray:
        target = tvm.target.Target.current(allow_none=True)
        arch = str(target.arch) if target is not None else "sm_80"
        return bytearray((compile_text or _compile)(str(text), arch))

    tvm.register_global_func(_CALLBACK, callback, override=True)


def _compile(text: str, arch: str) -> bytes:
    image, resources = compile_fatbin(text, arch)
    watched = _watched.get()
    if watched is not None:
        watched.extend(resources)
    return image


def _load_runtime() -> None:
    """Load TVM's CUDA library, and what it needs, unless that has happened already."""
    import tvm

    if tvm.get_global_func(_FACTORY, allow_missing=True) is not None:
        return
    try:
        ctypes.CDLL(_DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        _load_stub()
    try:
        ctypes.CDLL(str(_runtime_library()), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(Path(tvm.__file__).parent / "lib/libtvm_runtime_cuda.so"))
    except OSError as e:
        raise UnsupportedTargetError(f"TVM's CUDA library cannot be loaded: {e}") from e


def _runtime_library() -> Path | str:
    """The CUDA runtime beside nvcc, else whatever the system finds."""
    home = find_nvcc().resolve().parent.parent
    found = sorted(home.glob("lib64/libcudart.so.13")) + sorted(
        home.glob("targets/*/lib/libcudart.so.13")
    )
    return found[0] if found else "libcudart.so.13"


def _load_stub() -> None:
    """Load a driver without devices: a library that gives TVM's the symbols it needs."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise UnsupportedTargetError("compiling for CUDA without a GPU needs a C compiler")
    # cuGetErrorName and cuGetErrorString leave a null text, which TVM's messages can do with.
    lines = [f"int {name}(void) {{ return {_NO_DEVICE}; }}" for name in _DRIVER_FUNCTIONS]
    lines.append("int cuDriverGetVersion(int *v) { *v = 13000; return 0; }")
    lines.append(
        "int cuGetProcAddress_v2(const char *s, void **p, int v, unsigned long f, int *q) "
        f"{{ *p = 0; return {_NO_DEVICE}; }}"
    )
    with tempfile.TemporaryDirectory(prefix="tvm-pivot-") as folder:
        source, library = Path(folder, "stub.c"), Path(folder, _DRIVER)
        source.write_text("\n".join(lines))
        options: list[Any] = ["-shared", "-fPIC", f"-Wl,-soname,{_DRIVER}", "-o", library, source]
        subprocess.run([compiler, *options], check=True, capture_output=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
