"""Worker processes: what goes over the pipe, pausing, and that none outlives its controller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench_runtimes
import numpy as np
import psutil
import pytest

from tvm_pivot.bench import environments
from tvm_pivot.bench.runtimes import Environment
from tvm_pivot.bench.specs import RuntimeSpec, resolve
from tvm_pivot.bench.workers import Worker, WorkerError

LONG = 120.0


def spec(name: str) -> RuntimeSpec:
    (found,) = resolve([f"{bench_runtimes.__file__}:{name}"])
    return found


def start(name: str, threads: int = 1) -> Worker:
    """A worker that has prepared one of the runtimes."""
    worker = Worker(spec(name), threads=threads, precision="fp32")
    try:
        worker.request("prepare", timeout=LONG, files=[__file__])
    except BaseException:
        worker.kill()
        raise
    return worker


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def wait_for(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within a long time."""
    deadline = time.monotonic() + LONG
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_a_check_gives_the_outputs_of_its_own_inputs(tmp_path: Path) -> None:
    a, b = np.ones((1, 8), np.float32), np.full((1, 8), -2, np.float32)
    np.savez(tmp_path / "a.npz", a)
    np.savez(tmp_path / "b.npz", b)
    files = {"inputs": str(tmp_path / "a.npz"), "other": str(tmp_path / "b.npz")}
    with start("Right", threads=2) as worker:
        out = tmp_path / "out.npz"
        reply = worker.request("check", timeout=LONG, names=["x"], outputs=str(out), **files)
        assert reply["names"] == ["y"]
        with np.load(out) as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], bench_runtimes.compute(a))
        timed = worker.request("time", timeout=LONG, warm=2, calls=7)
        assert len(timed["seconds"]) == 7
        assert 0 < sum(timed["seconds"]) <= timed["wall_seconds"]
        assert worker.request("memory", timeout=LONG)["peak_mb"] > 10


def test_errors_are_replies_and_the_worker_goes_on() -> None:
    with start("Right") as worker:
        with pytest.raises(WorkerError, match=r"KeyError: 'dance'"):
            worker.request("dance", timeout=LONG)
        assert worker.request("version", timeout=LONG) == {"version": "1.0"}
    with (
        Worker(spec("Refuses"), threads=1, precision="fp32") as worker,
        pytest.raises(WorkerError, match=r"^no Relu here$") as caught,
    ):
        worker.request("convert", timeout=LONG, model=__file__, folder=".")
    assert caught.value.unsupported


def test_a_worker_that_does_not_answer_is_killed_with_all_it_started(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", np.ones((1, 8), np.float32))
    file, before = str(tmp_path / "x.npz"), children()
    worker = start("Hangs")
    with pytest.raises(WorkerError, match=r"check: no answer within 0\.5 s"):
        worker.request("check", timeout=0.5, names=["x"], inputs=file, other=file, outputs=file)
    assert children() <= before
    with pytest.raises(WorkerError, match="version: the process has ended"):
        worker.request("version", timeout=LONG)
    worker.close()


def test_a_paused_worker_takes_no_time() -> None:
    before_it = children()
    with start("Spins") as worker:
        (process,) = children() - before_it
        worker.pause()
        assert wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
        before = process.cpu_times()
        time.sleep(0.2)
        after = process.cpu_times()
        assert (after.user, after.system) == (before.user, before.system)
        worker.resume()
        assert wait_for(lambda: process.cpu_times().user > before.user)
        worker.pause()
        assert worker.request("version", timeout=LONG) == {"version": "1.0"}, "a request resumes"
        worker.pause()
    assert not process.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_dies_with_its_controller(number: signal.Signals) -> None:
    code = (
        "import time, test_bench_workers as t\n"
        "worker = t.start('Spins')\n"
        "worker.pause()\n"
        "print(*(child.pid for child in t.children()), flush=True)\n"
        "time.sleep(3600)"
    )
    path = os.pathsep.join(sys.path)
    controller = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert controller.stdout is not None
    try:
        (pid,) = map(int, controller.stdout.readline().split())
    finally:
        controller.send_signal(number)
        controller.wait()
        controller.stdout.close()
    assert wait_for(lambda: not psutil.pid_exists(pid))


def test_a_worker_needs_no_tvm_pivot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = environments.folder_of("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(np.__file__).parents[1].glob("numpy*"):
        (packages / entry.name).symlink_to(entry)
    (known,) = resolve(["onnxruntime"])
    bare = Environment("bare", (), ("numpy",))
    assert environments.is_installed(bare)
    with (
        Worker(known, threads=1, precision="fp32", environment=bare) as worker,
        pytest.raises(WorkerError, match=r"^ModuleNotFoundError: No module named 'onnxruntime'$"),
    ):
        worker.request("version", timeout=LONG)
