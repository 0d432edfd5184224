"""The devices of a farm: leases from the tracker, and a process per slot that talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import TuningError
from . import tracker
from .dispatch import DeviceLostError, NoDeviceError
from .tracker import Address, Lease

_START_S = 120.0
_GRACE_S = 5.0  # the device's own clock ends a trial first, and says so


@dataclass(frozen=True)
class Trial:
    """A candidate: its library, TVM's name of the device, dtype and shape of each argument."""

    artifact: Path
    device: str
    arguments: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Measuring:
    """How a candidate is measured.

    Attributes:
        allocate: who makes the arguments, ``"package.module:function"``; see `rpc_worker.Allocate`.
        number, repeat, min_repeat_ms: as in `time_evaluator`.
        timeout_s: seconds until a trial counts as hanging.
    """

    allocate: str
    number: int
    repeat: int
    min_repeat_ms: int
    timeout_s: float


class RemoteDevices:
    """The devices with one key of one tracker."""

    def __init__(self, address: Address, key: str, measuring: Measuring, wait_s: float) -> None:
        self._address, self._key = address, key
        self._measuring, self._wait_s = measuring, wait_s
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.Lock()
        self._closed = False

    def count(self) -> int:
        """Devices that the tracker knows now; 0 while it cannot be reached."""
        try:
            return tracker.status(self._address).count(self._key)
        except TuningError:
            return 0

    def acquire(self, slot: int) -> RemoteDevice:
        """A lease, and the slot's process to use it.

        Raises:
            NoDeviceError: none is free, or the tracker or the process does not answer.
        """
        # The process first: a lease that is not used within seconds ends.
        worker = self._worker(slot)
        try:
            worker.start()
            lease = tracker.request(self._address, self._key, self._wait_s)
        except TuningError as e:
            raise NoDeviceError(str(e)) from e
        if lease is None:
            raise NoDeviceError(f"the tracker has no free device with the key {self._key!r}")
        return RemoteDevice(lease, worker, self._measuring)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed = True
            workers = list(self._workers.values())
        for worker in workers:
            worker.kill()

    def _worker(self, slot: int) -> _Worker:
        with self._lock:
            if self._closed:
                raise NoDeviceError("these devices have been closed")
            return self._workers.setdefault(slot, _Worker())


@dataclass(frozen=True)
class RemoteDevice:
    """One lease of one device."""

    lease: Lease
    worker: _Worker
    measuring: Measuring

    @property
    def name(self) -> str:
        """Host and port of its server."""
        return self.lease.device

    def give_back(self) -> None:
        """End the lease unused."""
        self.lease.give_back()

    def measure(self, trial: Trial) -> list[float]:
        """See `dispatch.Device.measure`."""
        how = asdict(self.measuring)
        what = {**asdict(trial), "artifact": str(trial.artifact)}
        result = self.worker.call(
            {**asdict(self.lease), **how, **what}, self.measuring.timeout_s + _GRACE_S
        )
        if "lost" in result:
            raise DeviceLostError(f"{self.name} was lost: {result['lost']}")
        if "failed" in result:
            raise TuningError(result["failed"])
        return [float(seconds) for seconds in result["seconds"]]


class _Worker:
    """A process that runs `rpc_worker`, started when it is needed and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def start(self) -> None:
        """Be ready for calls.

        Raises:
            DeviceLostError: it does not start.
        """
        if self._killed:
            raise DeviceLostError("measuring was stopped")
        if self._process is not None and self._process.poll() is None:
            return
        # It has to find what this process finds, the function that allocates among it.
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tvm_pivot.tuning.rpc_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for us to handle
        )
        self._receive(self._process, _START_S)

    def call(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            DeviceLostError: there was none in time, or the process died; the next call restarts it.
        """
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError as e:
            self._end(process)
            raise DeviceLostError(f"the process that talks to devices died: {e}") from e
        return self._receive(process, timeout)

    def kill(self) -> None:
        """End it for good."""
        self._killed = True
        if self._process is not None:
            self._end(self._process)

    def _receive(self, process: subprocess.Popen[bytes], timeout: float) -> dict[str, Any]:
        assert process.stdout is not None
        stdout, data, until = process.stdout.fileno(), bytearray(), time.monotonic() + timeout
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        while not data.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                self._end(process)
                raise DeviceLostError(f"no answer for {timeout:g} s")
            if not (got := os.read(stdout, 1 << 16)):
                self._end(process)
                raise DeviceLostError("the process that talks to devices died")
            data += got
        answer = json.loads(data)
        assert isinstance(answer, dict)
        return answer

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
