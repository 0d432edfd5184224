"""Measuring on a farm: a MetaSchedule runner with TVM's RPC tracker behind it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.runner import PyRunner, RunnerResult
from tvm.s_tir.meta_schedule.runner.runner import PyRunnerFuture

from ..errors import TuningError
from .dispatch import Dispatcher
from .rpc_devices import Measuring, RemoteDevices, Trial
from .tracker import Address, FarmStatus, parse_address, status

_COMES_BACK_S = 3.0


def rpc(
    tracker: str,
    key: str,
    *,
    allocate: str = "tvm_pivot.tuning.rpc_worker:any_floats",
    timeout_s: float = 30.0,
    attempts: int = 3,
    wait_s: float = 120.0,
    number: int = 3,
    repeat: int = 3,
    min_repeat_ms: int = 10,
) -> Any:
    """A runner that measures as many candidates at a time as the farm has devices with this key.

    A device that hangs, crashes or disappears loses its trial only, which is repeated on another
    device. A candidate that is lost with `attempts` devices counts as failed. Devices may come and
    go; their number is asked for before every batch.

    Args:
        tracker: its address, ``"host:port"``.
        key: which of its devices, as given to ``tvm-pivot farm server --key``.
        allocate: ``"package.module:function"``, which makes the arguments of a candidate from the
            path of its library and each argument's dtype and shape: a NumPy array, or None where
            any numbers do. The default is for kernels whose arguments are floats only.
        timeout_s: seconds until a trial counts as hanging.
        attempts: devices that may be lost with one candidate.
        wait_s: how long a farm without a device is waited for.
        number, repeat, min_repeat_ms: as in TVM's `time_evaluator`.

    Returns:
        A `tvm.s_tir.meta_schedule.runner.Runner`. Its results are times in seconds, `repeat` of
        them, or an error message.

    Raises:
        InputError: the tracker's address is not written as one.
        TuningError: nothing answers there, or the tracker knows no device with this key.
        ValueError: a number out of range, or a name that is not ``module:function``.
    """
    address = parse_address(tracker)
    if min(attempts, number, repeat) < 1 or min(timeout_s, wait_s) <= 0 or min_repeat_ms < 0:
        raise ValueError("attempts, number, repeat and times must be positive")
    if not all(allocate.partition(":")):
        raise ValueError(f"allocate {allocate!r}: write module:function")
    farm = _first_look(address, key)
    if not farm.count(key):
        known = ", ".join(sorted({device.key for device in farm.devices})) or "none"
        raise TuningError(
            f"the tracker at {tracker} has no device with the key {key!r} (its keys: {known}); "
            f"start one with tvm-pivot farm server --tracker {tracker} --key {key}"
        )
    measuring = Measuring(allocate, number, repeat, min_repeat_ms, timeout_s)
    devices = RemoteDevices(address, key, measuring, min(wait_s, timeout_s))
    # Until then every other device has ended, or lost, what it was doing.
    patience = 2 * timeout_s
    return FarmRunner(Dispatcher(devices, attempts=attempts, wait_s=wait_s, patience_s=patience))


def _first_look(address: Address, key: str) -> FarmStatus:
    """The farm, after a moment in which a device can come back from a crash."""
    until = time.monotonic() + _COMES_BACK_S
    while not (farm := status(address)).count(key) and time.monotonic() < until:
        time.sleep(0.1)
    return farm


@derived_object
class FarmRunner(PyRunner):  # type: ignore[misc]
    """MetaSchedule's side of a `Dispatcher`; made by `rpc`."""

    def __init__(self, dispatcher: Dispatcher[Trial]) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        weakref.finalize(self, dispatcher.close)  # also at exit

    def run(self, runner_inputs: Sequence[Any]) -> list[Any]:
        """Start measuring `RunnerInput`s; what they return waits for the results."""
        trials = [
            Trial(
                Path(str(item.artifact_path)),
                str(item.device_type),
                tuple(
                    (str(info.dtype), tuple(int(size) for size in info.shape))
                    for info in item.args_info
                ),
            )
            for item in runner_inputs
        ]
        return [_Result(future) for future in self.dispatcher.submit(trials)]


@derived_object
class _Result(PyRunnerFuture):  # type: ignore[misc]
    def __init__(self, future: Future[list[float]]) -> None:
        super().__init__()
        self.future = future

    def done(self) -> bool:
        return self.future.done()

    def result(self) -> Any:
        try:
            return RunnerResult(self.future.result(), None)
        except TuningError as e:
            return RunnerResult(None, str(e))
