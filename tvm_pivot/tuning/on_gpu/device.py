"""CUDA and TVM's runtime by their C interfaces, for machines that have neither's Python package."""

from __future__ import annotations

import ctypes
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so")
CUDA_LIBRARY = "libcudart.so.13"
_CUDA = 2  # DLPack's number of the device
_BOOL, _TENSOR, _TEXT = 2, 7, 8  # type numbers of TVM's calling convention
_HEADER = 24  # bytes of an object before its content
_KINDS = {"int": 0, "uint": 1, "float": 2, "bfloat": 4}


class _Any(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("zero", ctypes.c_uint32), ("value", ctypes.c_uint64)]


class _Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    ]


def size_of(dtype: str) -> int:
    """Bytes of one element."""
    return int("".join(filter(str.isdigit, dtype))) // 8


class Tensor:
    """A tensor in device memory, as TVM takes it."""

    def __init__(self, place: ctypes.c_void_p, dtype: str, shape: Sequence[int]) -> None:
        kind, rank = dtype.rstrip("0123456789"), len(shape)
        strides = [math.prod(shape[i + 1 :]) for i in range(rank)]
        self._sizes = (ctypes.c_int64 * (2 * rank))(*shape, *strides)
        at = ctypes.addressof(self._sizes)
        which = (_CUDA, 0, rank, _KINDS[kind], 8 * size_of(dtype), 1)
        self._tensor = _Tensor(place, *which, at, at + 8 * rank, 0)
        self.address = ctypes.addressof(self._tensor)


class Gpu:
    """CUDA and TVM's runtime, called without the Python packages of either."""

    def __init__(self, folder: Path) -> None:
        """Load the libraries in `folder`, and make a stream on which everything runs."""
        flags = ctypes.RTLD_GLOBAL
        self.driver = ctypes.CDLL("libcuda.so.1", flags)
        try:
            self.cuda = ctypes.CDLL(CUDA_LIBRARY, flags)
        except OSError:
            self.cuda = ctypes.CDLL(str(folder / CUDA_LIBRARY), flags)
        self.tvm, *_ = (ctypes.CDLL(str(folder / name), flags) for name in LIBRARIES)
        self.cuda.cudaGetErrorString.restype = ctypes.c_char_p
        self.stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(self.stream))
        self._check_tvm(self.tvm.TVMFFIEnvSetStream(_CUDA, 0, self.stream, None))

    def call(self, name: str, *args: Any) -> None:
        """Call a function of the CUDA runtime; RuntimeError if it fails."""
        status = getattr(self.cuda, name)(*args)
        if status:
            text = self.cuda.cudaGetErrorString(status).decode()
            raise RuntimeError(f"{name}: {text} ({status})")

    def wait(self) -> None:
        """Until all that was started is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def put(self, array: Array) -> ctypes.c_void_p:
        """Device memory with the bytes of an array."""
        place = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(place), ctypes.c_size_t(max(1, array.nbytes)))
        self.fill(place, array)
        return place

    def fill(self, place: ctypes.c_void_p, array: Array) -> None:
        """Copy an array to the device."""
        self._copy(place, ctypes.c_void_p(array.ctypes.data), array.nbytes, 1)

    def get(self, place: ctypes.c_void_p, size: int) -> Array:
        """Bytes of device memory: uint8 [size]."""
        array = np.empty(size, np.uint8)
        self._copy(ctypes.c_void_p(array.ctypes.data), place, size, 2)
        return array

    def _copy(self, to: Any, source: Any, size: int, kind: int) -> None:
        self.call("cudaMemcpyAsync", to, source, ctypes.c_size_t(size), kind, self.stream)
        self.wait()

    def capture(self, launches: Iterable[Callable[[], None]]) -> ctypes.c_void_p:
        """A CUDA graph of calls without arguments."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cudaStreamBeginCapture", self.stream, 2)
        try:
            for launch in launches:
                launch()
        finally:
            self.call("cudaStreamEndCapture", self.stream, ctypes.byref(graph))
        self.call("cudaGraphInstantiate", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        self.call("cudaGraphDestroy", graph)
        return ready

    def seconds(self, graph: ctypes.c_void_p) -> float:
        """Time of one run of a graph, between events."""
        events = [ctypes.c_void_p() for _ in range(2)]
        for event in events:
            self.call("cudaEventCreate", ctypes.byref(event))
        self.call("cudaEventRecord", events[0], self.stream)
        self.call("cudaGraphLaunch", graph, self.stream)
        self.call("cudaEventRecord", events[1], self.stream)
        self.call("cudaEventSynchronize", events[1])
        took = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(took), *events)
        for event in events:
            self.call("cudaEventDestroy", event)
        return took.value / 1e3

    def machine(self) -> dict[str, Any]:
        """What the times are measured on."""
        name, found = ctypes.create_string_buffer(200), []
        for attribute in (75, 76, 16):  # compute capability, multiprocessors
            value = ctypes.c_int()
            self.call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            found.append(value.value)
        device = ctypes.c_int()
        if not self.driver.cuInit(0) and not self.driver.cuDeviceGet(ctypes.byref(device), 0):
            self.driver.cuDeviceGetName(name, 200, device)
        return {
            "device": name.value.decode(),
            "arch": f"sm_{found[0]}{found[1]}",
            "multiprocessors": found[2],
            "driver": _driver_version(),
            "python": platform.python_version(),
        }

    def function(self, library: str, name: str) -> ctypes.c_void_p:
        """A function of a compiled library."""
        module = self._call_tvm(self._global("ffi.ModuleLoadFromFile"), [(_TEXT, library)])
        args = [(module.kind, module.value), (_TEXT, name), (_BOOL, 0)]
        found = self._call_tvm(self._global("ffi.ModuleGetFunction"), args)
        if not found.value:
            raise RuntimeError(f"{library} has no function {name}")
        return ctypes.c_void_p(found.value)

    def run(self, function: ctypes.c_void_p, tensors: Sequence[Tensor]) -> None:
        """Start a kernel."""
        self._call_tvm(function, [(_TENSOR, one.address) for one in tensors])

    def _global(self, name: str) -> ctypes.c_void_p:
        found, text = ctypes.c_void_p(), name.encode()
        asked = _Text(text, len(text))
        self._check_tvm(self.tvm.TVMFFIFunctionGetGlobal(ctypes.byref(asked), ctypes.byref(found)))
        if not found:
            raise RuntimeError(f"TVM's runtime has no function {name}")
        return found

    def _call_tvm(self, function: ctypes.c_void_p, args: Sequence[tuple[int, Any]]) -> _Any:
        texts = [ctypes.c_char_p(v.encode()) if kind == _TEXT else None for kind, v in args]
        values = (_Any * len(args))()
        for i, (kind, value) in enumerate(args):
            text = texts[i]
            values[i].kind = kind
            values[i].value = value if text is None else ctypes.cast(text, ctypes.c_void_p).value
        result = _Any(0, 0, 0)
        self._check_tvm(
            self.tvm.TVMFFIFunctionCall(function, values, len(args), ctypes.byref(result))
        )
        return result

    def _check_tvm(self, status: int) -> None:
        if status:
            error = ctypes.c_void_p()
            self.tvm.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
            # kind and message, each a pointer and a size
            cell = (ctypes.c_size_t * 4).from_address((error.value or 0) + _HEADER)
            raise RuntimeError(ctypes.string_at(cell[2], cell[3]).decode(errors="replace"))


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()
