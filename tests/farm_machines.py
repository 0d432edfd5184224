"""Trackers and devices to test with, and candidates that behave well or badly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import tvm
from tvm import te, tirx

LONG = 120.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is true, and fail if it never is."""
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


class Machine:
    """A tracker or a device: a process, with its children, that says where it listens."""

    def __init__(self, *words: str, env: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tvm_pivot", "farm", *words],
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at 127.0.0.1:" in line, line
        self.address = line.split(" at ")[1].strip()

    def signal(self, number: signal.Signals) -> None:
        """To it and its children: what stops is the machine."""
        os.killpg(self.process.pid, number)

    def end(self) -> None:
        """As if somebody had pulled the plug."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(*words: str, env: Mapping[str, str] | None = None) -> Iterator[Machine]:
    """A machine that ends with the test, if not before."""
    machine = Machine(*words, env=env)
    try:
        yield machine
    finally:
        if machine.process.returncode is None:
            machine.end()


def kernel(call: tirx.Expr | None = None) -> tvm.IRModule:
    """``y[i] = x[i] + 0``, the 0 being what an external function returns."""
    x = te.placeholder((16,), name="x")
    zero = tirx.const(0, "int32") if call is None else call
    once = partial(tirx.if_then_else, t=zero.astype("float32"), f=tirx.const(0, "float32"))
    y = te.compute((16,), lambda i: x[i] + once(i < 1))
    return tvm.IRModule({"main": te.create_prim_func([x, y])})


def shell(command: str) -> tirx.Expr:
    """Run a command on the device, in the middle of a kernel."""
    return tirx.call_extern("int32", "system", tvm.ir.StringImm(command))


def gather(ends_at: int) -> tvm.IRModule:
    """``y[i] = x[table[i]]``; crashes where the table does not start with `ends_at`."""
    x = te.placeholder((16,), name="x")
    table = te.placeholder((16,), "int32", name="table")
    check = partial(tirx.call_extern, "int32", "abort")
    y = te.compute(
        (16,),
        lambda i: (
            x[table[i]] + tirx.if_then_else(table[0] == ends_at, 0, check()).astype("float32")
        ),
    )
    return tvm.IRModule({"main": te.create_prim_func([x, table, y])})


CANDIDATES: dict[str, Callable[[], tvm.IRModule]] = {
    "good": kernel,
    "slow here and there": lambda: kernel(shell('eval "$BEFORE"')),
    "crash": lambda: kernel(tirx.call_extern("int32", "abort")),
    "hang": lambda: kernel(tirx.call_extern("int32", "pause")),
    # mkdir succeeds once: it crashes the first device that runs it.
    "crash once": lambda: kernel(shell("mkdir $ONCE || exit 0; kill -9 $PPID")),
    "gather": lambda: gather(15),
    "gather wrongly": lambda: gather(3),
}
