"""What this machine can do: multiply-adds per second, and bytes per second from each cache.

Two kernels, compiled by TVM for the host like those of a network:

*   `_multiply_adds`: independent vector accumulators, ``a = a * scale + shift`` again and again,
    nothing but registers. Values move towards ``shift / (1 - scale)``, so none overflows or
    becomes denormal, and without the right to reorder sums LLVM must do every step.
*   `_sum`: adds up an array with several accumulators, again and again: one load per addition.

A limit that is measured includes what a specification leaves out: the clock under wide vectors,
the share of caches and memory a virtual machine gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

from .. import threads as thread_pool
from ..targets import PivotTarget, resolve
from .results import Roofline

# Accumulators of the multiply-adds: more than are in flight (2 per cycle, 4 or 5 cycles each) on
# any x86 core, and few enough to leave registers for the operands, of which AVX2 has 16.
_FMA_VECTORS = 12
# Accumulators of the sum. Prefetchers follow the stride of each load instruction, and with 4, 8
# or 12 of them Zen 5 often reads its level-2 cache at half the speed.
_SUM_VECTORS = 7
# A call this long hides the microseconds that calling and waking threads take, and is short
# enough for some calls to go undisturbed where others share the machine.
_CALL_SECONDS = 2e-3
_MEASURE_SECONDS = 0.4
_LARGEST = 256 << 20
_INDEX3 = "/sys/devices/system/cpu/cpu0/cache/index3/size"
_UNITS = {"K": 10, "M": 20, "G": 30}


def measure_roofline(threads: int, target: str | PivotTarget | None = None) -> Roofline:
    """Measure this machine's limits; takes one to three seconds.

    Bandwidths are of reading, all threads together, each its own part of the array: half of the
    level-2 caches; all of those and half of the level-3 cache; four times that cache, but no more
    than 256 MB. Of many calls the fastest counts. Where there is no level-3 cache larger than the
    level-2 caches, memory takes its place, from their size on.

    Args:
        threads: to use, the caller included.
        target: what to compile for; default: this host.

    Raises:
        PivotError: `threads` is not possible here; see `threads.check_count`.
        UnsupportedTargetError: the host is no x86-64 with AVX2.
    """
    described = resolve(target or "x86")
    thread_pool.configure(thread_pool.check_count(threads), required=True)
    l2, l3 = described.l2_bytes * threads, level3_bytes()
    kernels = _Kernels.compile(threads, described)
    gflops = kernels.gflops()
    l2_gbs = kernels.bandwidth(l2 // 2)
    memory_gbs = kernels.bandwidth(min(max(4 * l3, 8 * l2, 64 << 20), _LARGEST))
    if l3 <= l2:
        l3, l3_gbs = l2, memory_gbs
    else:
        l3_gbs = kernels.bandwidth(l2 + l3 // 2)
    return Roofline(threads, gflops, l2_gbs, l3_gbs, memory_gbs, l2, l3)


def level3_bytes() -> int:
    """Size of the level-3 cache of the first core as Linux reports it; 0 where it does not."""
    try:
        with open(_INDEX3, encoding="ascii") as f:
            size = f.read().strip()
        return int(size[:-1]) << _UNITS[size[-1]]
    except (OSError, ValueError, LookupError):
        return 0


@dataclass(frozen=True)
class _Kernels:
    """The compiled kernels, for a number of threads and of floats per vector."""

    threads: int
    lanes: int
    multiply_adds: Callable[..., None]
    sum: Callable[..., None]

    @classmethod
    def compile(cls, threads: int, target: PivotTarget) -> _Kernels:
        functions = {
            "multiply_adds": _multiply_adds(threads, target.lanes),
            "sum": _sum(threads, target.lanes),
        }
        mod = tvm.IRModule(
            {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
        )
        library = tvm.compile(mod, target=target.to_tvm())
        return cls(threads, target.lanes, library["multiply_adds"], library["sum"])

    def gflops(self) -> float:
        """10^9 operations per second; a multiply-add is two."""
        width = _FMA_VECTORS * self.lanes
        operands = tvm.runtime.tensor(np.array([0.75, 0.25], np.float32))
        out = tvm.runtime.empty((self.threads, width), "float32")
        seconds, steps = _fastest(lambda n: self.multiply_adds(operands, out, n), 1000)
        return 2e-9 * self.threads * width * steps / seconds

    def bandwidth(self, size: int) -> float:
        """10^9 bytes per second from an array of about `size` bytes."""
        width = _SUM_VECTORS * self.lanes
        rows = max(1, size // (4 * self.threads * width))
        x = tvm.runtime.empty((self.threads, rows, width), "float32")
        np.from_dlpack(x)[...] = 1.0
        out = tvm.runtime.empty((self.threads, width), "float32")
        seconds, passes = _fastest(lambda n: self.sum(x, out, n), 1)
        return 4e-9 * self.threads * rows * width * passes / seconds


def _fastest(call: Callable[[int], None], repeats: int) -> tuple[float, int]:
    """Seconds of the fastest of many calls, and the repeats that each was told to do: enough
    for `_CALL_SECONDS`, but `repeats` at least."""

    def timed() -> float:
        begin = time.perf_counter()
        call(repeats)
        return time.perf_counter() - begin

    timed()  # the first touches the array and wakes the threads
    while (seconds := timed()) < _CALL_SECONDS:
        repeats = max(repeats + 1, min(8 * repeats, int(1.2 * repeats * _CALL_SECONDS / seconds)))
    end = time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < end:
        seconds = min(seconds, timed())
    return seconds, repeats


def _multiply_adds(threads: int, lanes: int) -> tirx.PrimFunc:
    """(operands [2]: scale and shift, out [threads, width], steps)."""
    operands = tirx.decl_buffer((2,), "float32", name="operands")
    accumulators = _Accumulators(_FMA_VECTORS, lanes)

    def body(_: Any, steps: Any) -> tirx.Stmt:
        scale, shift = (tirx.Broadcast(operands[i], lanes) for i in range(2))
        step = accumulators.each(lambda _, value: value * scale + shift)
        return _loop(steps, lambda _: step)

    return _kernel(operands, threads, accumulators, body)


def _sum(threads: int, lanes: int) -> tirx.PrimFunc:
    """(x [threads, rows, width], out [threads, width], passes over x)."""
    accumulators = _Accumulators(_SUM_VECTORS, lanes)
    rows = tirx.Var("rows", "int32")
    x = tirx.decl_buffer((threads, rows, accumulators.width), "float32", name="x")

    def body(thread: Any, passes: Any) -> tirx.Stmt:
        def row(i: Any) -> tirx.Stmt:
            return accumulators.each(lambda at, value: value + tirx.BufferLoad(x, [thread, i, at]))

        return _loop(passes, lambda _: _loop(rows, row))

    return _kernel(x, threads, accumulators, body)


class _Accumulators:
    """Vectors of floats that LLVM keeps in registers."""

    def __init__(self, vectors: int, lanes: int) -> None:
        self.width = vectors * lanes
        self.lanes = lanes
        self.buffer = tirx.decl_buffer((self.width,), "float32", name="sums", scope="local")

    def vectors(self) -> list[tuple[Any, Any]]:
        """Where each one lies in a row, and what it is."""
        places = [tirx.Ramp(first, 1, self.lanes) for first in range(0, self.width, self.lanes)]
        return [(at, tirx.BufferLoad(self.buffer, [at])) for at in places]

    def each(self, value: Callable[[Any, Any], Any]) -> tirx.Stmt:
        """Set every one to ``value(where it lies, what it is)``."""
        return tirx.SeqStmt(
            [tirx.BufferStore(self.buffer, value(at, now), [at]) for at, now in self.vectors()]
        )


def _kernel(
    source: Any,
    threads: int,
    accumulators: _Accumulators,
    body: Callable[[Any, Any], tirx.Stmt],
) -> tirx.PrimFunc:
    """(`source`, out, repeats): each thread clears its accumulators, runs ``body(thread,
    repeats)`` and writes them to its row of `out`, so that none of it can be left out."""
    out = tirx.decl_buffer((threads, accumulators.width), "float32", name="out")
    repeats = tirx.Var("repeats", "int32")
    zero = tirx.Broadcast(tirx.const(0, "float32"), accumulators.lanes)

    def task(thread: Any) -> tirx.Stmt:
        clear = accumulators.each(lambda *_: zero)
        write = [tirx.BufferStore(out, value, [thread, at]) for at, value in accumulators.vectors()]
        steps = tirx.SeqStmt([clear, body(thread, repeats), *write])
        return _block(steps, [accumulators.buffer])

    root = _block(_loop(threads, task, tirx.ForKind.PARALLEL), [])
    attrs = tvm.ir.make_node("ir.DictAttrs", **{"tirx.noalias": True})
    return tirx.PrimFunc([source, out, repeats], root, None, attrs)


def _block(body: tirx.Stmt, buffers: list[Any]) -> SBlockRealize:
    block = SBlock([], [], [], "block", body, alloc_buffers=buffers)
    return SBlockRealize([], tirx.const(True, "bool"), block)


def _loop(
    extent: Any, body: Callable[[Any], tirx.Stmt], kind: tirx.ForKind = tirx.ForKind.SERIAL
) -> tirx.For:
    var = tirx.Var("i", "int32")
    end = tirx.const(extent, "int32") if isinstance(extent, int) else extent
    return tirx.For(var, tirx.const(0, "int32"), end, kind, body(var))
