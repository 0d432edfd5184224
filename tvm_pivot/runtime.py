"""TVM's runtime without its compiler: all that a compiled network needs to run.

Importing `tvm` loads its compiler, with LLVM in it: half a second, or two where torch is installed,
and 150 MB or more that a loaded network never uses. The runtime alone takes 5 MB and no time.
Importing `tvm` later is fine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The second has operators that some networks call, such as sorting.
_LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
_CPU, _CUDA, _POOLED_ALLOCATOR = 1, 2, 2
_SCOPE_LINE = re.compile(rb"executable\.cc:\d+: Warning: Scope (Saving|Loaded):")
_stderr_lock = threading.Lock()


def tvm_version() -> str:
    """The version of TVM that is installed."""
    return version("apache-tvm")


@cache
def ffi() -> Any:
    """The module `tvm_ffi`, with TVM's runtime behind it."""
    with _torch_left_out():
        import tvm_ffi
    found = importlib.util.find_spec("tvm") if "tvm" not in sys.modules else None
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "lib"
        if all((folder / name).is_file() for name in _LIBRARIES):
            for name in _LIBRARIES:  # global, so that compiled networks find its symbols
                ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
            return tvm_ffi
    import tvm  # noqa: F401 (it is loaded already, or is not laid out as expected)

    return tvm_ffi


def load_module(path: Path) -> Any:
    """The `tvm_ffi.Module` of a shared library."""
    return ffi().load_module(str(path))


def link(library: Any) -> Any:
    """The module of a library: of a `relax.VMExecutable`, linked now, or of itself."""
    return library.jit() if is_executable(library) else library


def is_executable(library: Any) -> bool:
    """Whether this is a `relax.VMExecutable`: compiled, not yet linked."""
    if "tvm" not in sys.modules:
        return False
    from tvm import relax

    return isinstance(library, relax.VMExecutable)


def start(module: Any, cuda: bool = False) -> Any:
    """A new Relax virtual machine for the module of a compiled network, on the CPU or a GPU.

    It is a `tvm_ffi.Module`: ``machine["main"]`` runs the network.
    """
    machine = module["vm_load_executable"]()
    gpu = (_CUDA, 0, _POOLED_ALLOCATOR) if cuda else ()
    machine["vm_initialization"](*gpu, _CPU, 0, _POOLED_ALLOCATOR)
    return machine


def empty(shape: Sequence[int], dtype: str, device: str = "cpu") -> Any:
    """A new tensor, on the CPU aligned as compiled networks expect it."""
    made, place = ffi(), ffi().device(device, 0)
    allocate = function("runtime.TVMTensorAllocWithScope")
    return allocate(made.Shape(list(shape)), made.dtype(dtype), place, None)


def has_function(name: str) -> bool:
    """Whether the runtime has a global function of that name."""
    return ffi().get_global_func(name, allow_missing=True) is not None


def function(name: str) -> Any:
    """A global function of the runtime."""
    return ffi().get_global_func(name)


class _NoTorch:
    """A finder that finds no torch, for one thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> None:
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is left out", name=name)


@contextmanager
def _torch_left_out() -> Iterator[None]:
    """Do not let `tvm_ffi` import torch, as it would wherever it can: 1 s and 200 MB."""
    finder: Any = _NoTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def no_scope_lines() -> Iterator[None]:
    """Hold back what goes to stderr, and pass it on without a line that means nothing to a user.

    TVM 0.27 writes "Scope Saving" or "Scope Loaded" for each constant, from C++ and always. Other
    threads' lines are held back too, for as long as it takes to save or load a library.
    """
    with _stderr_lock, tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:  # closed: nothing to keep clean
            yield
            return
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not _SCOPE_LINE.search(line):
                    os.write(2, line)
