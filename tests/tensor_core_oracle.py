"""Tensor-core kernels without a GPU: their CUDA text compiled for the CPU (see gpu_emulator)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tvm_pivot.fragments import from_bits, to_bits
from tvm_pivot.schedules.tensor_cores import TABLES, kernel_name, kernel_source

EMULATOR = Path(__file__).parent / "gpu_emulator"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def emulated(problem, tile, folder, edit=lambda text: text):
    """The kernel as a function of (X, tables, bias, residual, Y, seed), compiled in `folder`.

    `edit` changes its text first.
    """
    name = kernel_name(problem, tile)
    count = 1 + len(TABLES) + 1
    arguments = ", ".join(f"a[{i}]" for i in range(count + 1))
    shared, threads = tile.shared_bytes(problem.block_rows), tile.threads
    text = f"""#include "emulator.h"
{edit(kernel_source(problem, tile))}
extern "C" int run(void** a, int seed) {{
  static_assert(pivot::Arena<pivot::{name}>::kBytes == {shared});
  return launch({tile.grid}, {tile.cluster}, {threads}, {shared}, seed,
                [=] {{ {name}({arguments}, nullptr); }});
}}
"""
    source, library = folder / f"{name}.cc", folder / f"{name}.so"
    source.write_text(text)
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{EMULATOR}", str(source)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = ctypes.CDLL(str(library)).run

    def call(x, packed, bias, residual, y, seed=0):
        arrays = [x, *packed.tables, packed.slot_bias(bias), x if residual is None else residual, y]
        arrays = [np.ascontiguousarray(a) for a in arrays[:-1]] + [y]
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        stuck = run(pointers, seed)
        assert not stuck, "threads wait for each other for ever"

    return call


def rounded(values, dtype):
    """float32 values that `dtype` holds."""
    return from_bits(to_bits(np.asarray(values, np.float32), dtype), dtype)


def stored_bits(values, dtype):
    """`values` as they lie in memory: in tf32, as float32 that nothing has rounded."""
    return values.astype(np.float32).view(np.uint32) if dtype == "tf32" else to_bits(values, dtype)


def aligned_bits(values, dtype):
    """The same, at an address that copies of 16 bytes can start from."""
    bits = stored_bits(values, dtype)
    room = np.empty(bits.size + 16 // bits.itemsize, bits.dtype)
    skip = (-room.ctypes.data % 16) // bits.itemsize
    out = room[skip : skip + bits.size].reshape(bits.shape)
    out[...] = bits
    return out
