"""Several callers at once, and how many threads each run uses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import tiny
import tvm

from tvm_pivot.errors import PivotError
from tvm_pivot.session import Session

CPUS = len(os.sched_getaffinity(0))
X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
RELU_X = np.maximum(X, 0)
T = TypeVar("T")


def on_a_fresh_thread(task: Callable[[], T]) -> T:
    """The result of `task` on a thread that has no TVM pool yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(task).result()


def pool_size() -> int:
    """Threads TVM's pool of this thread uses; makes the pool if there is none."""
    return int(tvm.get_global_func("runtime.NumThreads")())


def test_many_threads_at_once() -> None:
    net = tiny.heavy(100, threads=1)

    def task(seed: int) -> bool:
        x = np.full((8, 4096), seed, np.float32)
        results = [net.run(x) for _ in range(20)]
        return all(np.allclose(y, 100.01 * seed, rtol=1e-4) for y in results)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(task, range(24)))


def test_other_python_threads_go_on_during_a_run() -> None:
    net = tiny.heavy(100_000, threads=1)
    x = np.ones((8, 4096), np.float32)
    worker = threading.Thread(target=net.run, args=(x,))
    steps = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.002)
        steps += 1
    # A run that held the interpreter's lock would let this loop step once or twice.
    assert steps > 10


BUSY = """
import time, threading, psutil, tiny, numpy as np

def busy(net):
    x = np.ones((8, 4096), np.float32)
    net.run(x)
    before = {t.id: t.user_time for t in psutil.Process().threads()}
    for _ in range(3):
        net.run(x)
    spent = [t.user_time - before.get(t.id, 0.0) for t in psutil.Process().threads()]
    print(sum(seconds > 0.15 * sum(spent) for seconds in spent), end=" ")

net, other = tiny.heavy(20_000, threads=1), tiny.heavy(20_000, threads=2)
busy(net), busy(other), busy(net)
net.set_threads(2)
busy(net)
caller = threading.Thread(target=busy, args=(net,))
caller.start(), caller.join()
"""


def test_set_threads_decides_how_many_work() -> None:
    """By the CPU time of each thread: per session, whatever ran before, on any caller."""
    if CPUS < 2:
        pytest.skip("needs two CPUs")
    process = subprocess.run(
        [sys.executable, "-c", BUSY],
        # Workers do not spin while they wait: that would count as work.
        env={**os.environ, "TVM_THREAD_POOL_SPIN_COUNT": "0"},
        cwd=Path(__file__).parent,  # for tiny.py
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.split() == ["1", "2", "1", "2", "2"]


@pytest.mark.parametrize("count", [0, -1, 1.0, "2", True, 100_000])
def test_wrong_thread_counts(count: Any) -> None:
    with pytest.raises(PivotError, match="threads must be a whole number from 1 to"):
        tiny.relu().set_threads(count)


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, min(psutil.cpu_count(logical=False) or CPUS, CPUS)),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "2"}, 2),
        ({"TVM_NUM_THREADS": str(2 * CPUS + 1)}, 2 * CPUS + 1),
    ],
)
def test_threads_nobody_set(
    environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, **environment)
    net = tiny.relu()
    assert net.threads == expected

    def task() -> tuple[int, bool]:
        allowed = os.sched_getaffinity(0)
        net.run(X)
        return pool_size(), os.sched_getaffinity(0) == allowed

    assert on_a_fresh_thread(task) == (expected, True)


@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5"])
def test_a_wrong_environment_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, TVM_NUM_THREADS=value)
    with pytest.raises(PivotError, match=f"TVM_NUM_THREADS='{value}' is not a positive whole"):
        tiny.relu()


def test_a_pool_tvm_made_too_small_is_an_error_only_if_the_user_asked_for_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if CPUS < 2:
        pytest.skip("needs two CPUs: with one, two threads are refused anyway")

    def task(net: Session) -> Any:
        allowed = os.sched_getaffinity(0)
        set_environment(monkeypatch, TVM_NUM_THREADS="1")
        assert pool_size() == 1  # TVM makes its pool, and binds this thread to one CPU
        os.sched_setaffinity(0, allowed)
        return net.run(X)

    set_environment(monkeypatch, TVM_NUM_THREADS="2")
    net = tiny.relu()
    np.testing.assert_array_equal(on_a_fresh_thread(lambda: task(net)), RELU_X)
    net.set_threads(2)
    with pytest.raises(PivotError, match="2 threads asked for, but TVM already made a pool of 1"):
        on_a_fresh_thread(lambda: task(net))
