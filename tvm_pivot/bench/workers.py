"""Processes that run runtimes, as the controller sees them. `worker` is what runs in them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ..errors import PivotError
from .environments import python_of
from .runtimes import Environment
from .specs import RuntimeSpec

_log = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("worker.py")
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "TVM_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)
_CLOSE_SECONDS = 10.0
_TAIL_LINES, _TAIL_LENGTH = 4, 400


class WorkerError(PivotError):
    """A worker reported an error, crashed, or did not answer in time.

    Attributes:
        unsupported: whether the runtime said that it cannot take the model.
    """

    def __init__(self, message: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


class Worker:
    """One process with one runtime. Leaving its ``with`` block kills it and what it started.

    The process leads a group of its own. While nothing is asked of it, it can be paused, so that
    idle threads that spin take no time from other runtimes. The kernel kills it should this
    process, or the thread that made it, end first.
    """

    def __init__(
        self,
        spec: RuntimeSpec,
        *,
        threads: int,
        precision: str,
        environment: Environment | None = None,
    ) -> None:
        """Start the process.

        Args:
            spec: the runtime.
            threads: that it may use.
            precision: ``"fp32"`` or ``"bf16"``.
            environment: whose Python runs it; None means the runtime's own.
        """
        self._name = spec.name
        environment = environment or spec.adapter.environment
        python = python_of(environment)
        self._folder = tempfile.TemporaryDirectory(prefix="tvm_pivot_worker_")
        self._stderr = Path(self._folder.name, "stderr")
        self._paused = self._ended = False
        options = {"runtime": spec.text, "threads": threads, "precision": precision}
        command = [str(python), str(_PROGRAM), "--controller", str(os.getpid())]
        for key, value in options.items():
            command += [f"--{key}", str(value)]
        try:
            with self._stderr.open("wb") as stderr:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=self._folder.name,  # some runtimes leave files where they run
                    env=_variables(python, threads, beside=environment.name is None),
                    start_new_session=True,
                )
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def request(self, do: str, *, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Ask for something and wait for the reply, which `worker.Server` describes.

        A paused worker is resumed. A worker that crashed or did not answer is killed.

        Args:
            do: ``"convert"``, ``"prepare"``, ``"check"``, ...
            timeout: in seconds.

        Raises:
            WorkerError: an error was the reply, there was none in time, or the process ended.
        """
        self.post(do, **arguments)
        return self.answer(do, timeout=timeout)

    def post(self, do: str, **arguments: Any) -> None:
        """Ask for something without waiting; `answer` must follow.

        Raises:
            WorkerError: the process has ended.
        """
        if self._ended:
            raise WorkerError(f"{do}: the process has ended")
        self.resume()
        assert self._process.stdin is not None
        line = json.dumps({"do": do, **arguments}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # it ended: so does what is read from it
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def answer(self, do: str, *, timeout: float) -> dict[str, Any]:
        """Wait for the reply to what was posted. Errors are those of `request`."""
        try:
            reply: dict[str, Any] = json.loads(self._read_line(do, timeout))
        except BaseException:
            self.kill()
            raise
        if "error" in reply:
            _log.debug("%s: %s\n%s", self._name, do, reply["trace"])
            raise WorkerError(_shorten(reply["error"]), unsupported=reply["unsupported"])
        return reply

    def pause(self) -> None:
        """Stop all threads of the process where they are."""
        if not self._paused:
            self._signal(signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        """Let a paused process go on."""
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def close(self) -> None:
        """Let the runtime free what it holds, then end the process. Never raises."""
        if not self._ended:
            with contextlib.suppress(WorkerError):
                self.request("close", timeout=_CLOSE_SECONDS)
        self.kill()

    def abort(self) -> None:
        """End the process from another thread: whoever waits for a reply gets a `WorkerError`."""
        self._signal(signal.SIGKILL)

    def kill(self) -> None:
        """End the process and all it started, at once. May be called again."""
        if self._ended:
            return
        self._ended = True
        started: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):  # some leave the group
            started = psutil.Process(self._process.pid).children(recursive=True)
        self._signal(signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._folder.cleanup()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _read_line(self, do: str, timeout: float) -> bytes:
        assert self._process.stdout is not None
        pipe, received = self._process.stdout.fileno(), b""
        deadline = time.monotonic() + timeout
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise WorkerError(f"{do}: no answer within {timeout:g} s{self._tail()}")
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                raise WorkerError(f"{do}: {self._ending()}{self._tail()}")
            received += chunk
        return received

    def _ending(self) -> str:
        """How the process ended, which closed its stdout."""
        try:
            code = self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        names = {-number: number.name for number in signal.Signals}
        return f"the process ended with exit code {code}" + (
            f" ({names[code]})" if code in names else ""
        )

    def _tail(self) -> str:
        """The last lines the process printed, to end a message with."""
        text = self._stderr.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        tail = " / ".join(lines[-_TAIL_LINES:])[-_TAIL_LENGTH:]
        return f"; it printed: {tail}" if tail else ""


def _variables(python: Path, threads: int, *, beside: bool) -> dict[str, str]:
    """The environment variables of a worker.

    Beside tvm_pivot, it finds the modules that this process finds. Elsewhere it finds only what
    is installed there. Programs of its environment come first on the PATH.
    """
    variables = dict(os.environ)
    for name in ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH"):
        variables.pop(name, None)
    if beside:
        variables["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    variables["PATH"] = os.pathsep.join([str(python.parent), variables.get("PATH", os.defpath)])
    return variables | dict.fromkeys(_THREAD_VARIABLES, str(threads))


def _shorten(text: str) -> str:
    """One line of bounded length: runtimes put whole graphs into their messages."""
    line = " ".join(text.split())
    return line if len(line) <= _TAIL_LENGTH else f"{line[: _TAIL_LENGTH - 3]}..."
