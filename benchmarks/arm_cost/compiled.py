"""What libraries that TVM compiled for aarch64 execute, under emulation."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_pivot import runner

from .cores import Core
from .cost import Cost, grouped
from .emulator import Emulator, compiled
from .guest_python import require, tvm_folder

Array = npt.NDArray[Any]

_COMPILER = ("aarch64-linux-gnu-g++", "-O2", "-std=c++17")
_C = ("aarch64-linux-gnu-gcc", "-O2", "-rdynamic")
_LIBRARIES = ("tvm_runtime", "tvm_runtime_extra", "tvm_ffi")
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # of DLPack
_KINDS = {code: kind for kind, code in _CODES.items()}


def execute(
    library: Path,
    function: str,
    arguments: Sequence[Array],
    core: Core,
    *,
    caches: bool = False,
) -> tuple[dict[str, Cost], list[Array]]:
    """Run one function of a library under emulation.

    Args:
        library: exported for aarch64.
        function: it writes to some of its arguments.
        arguments: all of them.
        core: what runs it.
        caches: count misses too.

    Returns:
        What one run costs, by functions; and all arguments after it.

    Raises:
        ArmCostError: a tool is missing, or the function fails.
    """
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        given, found = Path(scratch, "in"), Path(scratch, "out")
        given.write_bytes(b"".join(map(_packed, arguments)))
        profile, _ = _emulator(core).per_run(
            lambda runs: [_harness(), library.resolve(), function, str(runs), given, found],
            caches=caches,
        )
        return grouped(profile, core), _unpacked(found.read_bytes())


def execute_network(
    library: Path, inputs: Sequence[Array], core: Core, *, caches: bool = False
) -> tuple[dict[str, Cost], list[Array]]:
    """Run a network under emulation, by the runner that `tvm_pivot` ships.

    Args:
        library: of an artifact for aarch64.
        inputs: in the artifact's order.
        core: what runs it.
        caches: count misses too.

    Returns:
        What one inference costs, by functions; and the outputs.

    Raises:
        ArmCostError: a tool is missing, or the network fails.
    """
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        files = [Path(scratch, f"input{i}.npy") for i in range(len(inputs))]
        for file, array in zip(files, inputs, strict=True):
            np.save(file, array)
        prefix = Path(scratch, "output")
        command: list[str | Path] = [_runner(), library.resolve(), "--out", prefix]
        command += ["--threads", "1"]
        profile, _ = _emulator(core).per_run(
            # It runs once before, for the outputs.
            lambda runs: [*command, "--repeat", str(runs), *files],
            caches=caches,
        )
        count = len(list(prefix.parent.glob(f"{prefix.name}*.npy")))
        return grouped(profile, core), [np.load(f"{prefix}{i}.npy") for i in range(count)]


def _emulator(core: Core) -> Emulator:
    return Emulator(core, environment={"TVM_NUM_THREADS": "1"})


@cache
def _runner() -> Path:
    """The program that runs a network."""
    first, *more = (runner.FOLDER / name for name in (*runner.SOURCES, *runner.HEADERS))
    return compiled(_C, first, "", "-Wl,--no-as-needed", "-lm", "-ldl", "-lpthread", beside=more)


@cache
def _harness() -> Path:
    """The program that runs one function, with TVM's runtime."""
    folder = require(tvm_folder())
    headers = folder / "tvm_ffi" / "include"
    libraries = (folder / "tvm" / "lib", folder / "tvm_ffi" / "lib")
    # The libraries that run need symbols of these, the program itself not of all of them.
    link = ["-Wl,--no-as-needed", *(f"-l{name}" for name in _LIBRARIES)]
    link += [f"-Wl,-rpath,{one},-rpath-link,{one}" for one in libraries]
    places = [f"-L{one}" for one in libraries]
    source = Path(__file__).with_name("harness.cc")
    return compiled((*_COMPILER, f"-isystem{headers}"), source, "", *places, *link)


def _packed(array: Array) -> bytes:
    array = np.ascontiguousarray(array)
    head = (_CODES[array.dtype.kind], 8 * array.itemsize, array.ndim)
    return struct.pack(f"<3i{array.ndim}q", *head, *array.shape) + array.tobytes()


def _unpacked(data: bytes) -> list[Array]:
    found, at = [], 0
    while at < len(data):
        code, bits, rank = struct.unpack_from("<3i", data, at)
        shape = struct.unpack_from(f"<{rank}q", data, at + 12)
        at += 12 + 8 * rank
        dtype = np.dtype(f"{_KINDS[code]}{bits // 8}")
        count = int(np.prod(shape, dtype=np.int64))
        found.append(np.frombuffer(data, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize
    return found
