"""Running a compiled network on a GPU: the driver, and copies to and from the device."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import runtime
from .errors import PivotError
from .tensors import TensorSpec

Array = npt.NDArray[Any]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_ALLOCATOR = "device_api.cuda"


@cache
def capability() -> tuple[int, int]:
    """The compute capability of the first GPU.

    Raises:
        PivotError: there is no NVIDIA driver, or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
    except OSError as e:
        raise PivotError(f"this machine has no NVIDIA driver ({e}), so no GPU can be used") from e
    found, count = [], ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise PivotError("this machine has no NVIDIA GPU, or its driver does not let us use it")
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        found.append(value.value)
    return found[0], found[1]


def check(arch: str) -> None:
    """Make sure that code for `arch`, as ``"sm_80"``, can run here, and load what it needs.

    Raises:
        PivotError: there is no GPU, it is older than `arch`, or TVM's CUDA runtime is missing.
    """
    number = int(arch.removeprefix("sm_"))
    major, minor = capability()
    if 10 * major + minor < number:
        raise PivotError(
            f"the network was compiled for {arch} and later; this GPU is sm_{major}{minor}: "
            f"build it for target 'cuda-sm{major}{minor}'"
        )
    _load()


@cache
def _load() -> None:
    """Load TVM's CUDA runtime, which nothing does where its compiler is left out."""
    runtime.ffi()
    if runtime.has_function(_ALLOCATOR):
        return
    found = importlib.util.find_spec("tvm") if "tvm" not in sys.modules else sys.modules["tvm"]
    file = getattr(found, "origin", None) or getattr(found, "__file__", None)
    try:
        ctypes.CDLL("libcudart.so.13", ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(Path(str(file)).parent / "lib/libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
    except OSError as e:
        raise PivotError(
            f"TVM's CUDA runtime cannot be loaded: {e}; it needs CUDA 13's libcudart.so.13 "
            f"on LD_LIBRARY_PATH"
        ) from e


class DeviceSlot:
    """One input's place on the GPU."""

    def __init__(self, spec: TensorSpec) -> None:
        self._tensor = runtime.empty(spec.shape, spec.dtype, "cuda")

    def fill(self, x: Array) -> Any:
        """The tensor on the GPU with the values of `x`, which has its shape and dtype."""
        x = np.ascontiguousarray(x)
        copy = runtime.function("runtime.TVMTensorCopyFromBytes")
        copy(self._tensor, ctypes.c_void_p(x.ctypes.data), x.nbytes)
        return self._tensor


def to_numpy(tensors: Sequence[Any], specs: Sequence[TensorSpec]) -> list[Array]:
    """Tensors on the GPU as new arrays, once they are computed."""
    copy, arrays = runtime.function("runtime.TVMTensorCopyToBytes"), []
    for tensor, spec in zip(tensors, specs, strict=True):
        array = np.empty(spec.shape, spec.numpy_dtype())
        copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        arrays.append(array)
    return arrays
