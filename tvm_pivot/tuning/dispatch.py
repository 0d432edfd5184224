"""Trials to devices: as many at a time as there are devices, and none lost with a device.

This is the scheduler of the farm and knows nothing of TVM: a device is whatever can measure, so
tests and the scaling benchmark run it with made-up ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ..errors import TuningError

Job = TypeVar("Job")
Job_in = TypeVar("Job_in", contravariant=True)
_PAUSE = 0.2


class DeviceLostError(TuningError):
    """The device hung, crashed or disappeared: the trial may succeed on another one."""


class NoDeviceError(TuningError):
    """No device is free, or the tracker cannot be reached."""


class Device(Protocol[Job_in]):
    """One device, for one trial."""

    @property
    def name(self) -> str:
        """The same for the same device."""

    def measure(self, job: Job_in) -> list[float]:
        """The times of one trial, in seconds; afterwards the device is free.

        Raises:
            DeviceLostError: the device is to blame, or may be.
            TuningError: the candidate is to blame; it would fail elsewhere too.
        """

    def give_back(self) -> None:
        """Free the device without a trial."""


class Devices(Protocol[Job_in]):
    """Where devices come from."""

    def count(self) -> int:
        """How many there are now."""

    def acquire(self, slot: int) -> Device[Job_in]:
        """A free device. Waits for one, but not for ever. `slot` numbers the threads that ask.

        Raises:
            NoDeviceError: there is none.
        """

    def close(self) -> None:
        """End what runs; what waits raises."""


@dataclass
class _Trial(Generic[Job]):
    job: Job
    future: Future[list[float]] = field(default_factory=Future)
    tried: list[str] = field(default_factory=list)
    last_error: str = ""
    lost_at: float = 0.0


class Dispatcher(Generic[Job]):
    """Measures trials on devices, each trial on at most `attempts` of them.

    A thread ("slot") per device asks for a device first and then takes the oldest trial that this
    device has not failed, so that a retry happens elsewhere wherever there is an elsewhere.
    """

    def __init__(
        self,
        devices: Devices[Job],
        *,
        attempts: int = 3,
        wait_s: float = 120.0,
        patience_s: float = 30.0,
    ) -> None:
        """Args:
        devices: where devices come from.
        attempts: devices that a trial may lose before it counts as failed.
        wait_s: how long a farm without a single device is waited for.
        patience_s: how long a retry waits for a device that has not failed it.
        """
        self._devices = devices
        self._attempts, self._wait_s, self._patience_s = attempts, wait_s, patience_s
        self._changed = threading.Condition()
        self._pending: deque[_Trial[Job]] = deque()
        self._asking = self._measuring = 0
        self._last_success = time.monotonic()
        self._slots, self._known = 0, 1
        self._closed = False

    def submit(self, jobs: Sequence[Job]) -> list[Future[list[float]]]:
        """Start measuring; each result is the times or a TuningError."""
        count = self._devices.count()
        trials = [_Trial(job) for job in jobs]
        with self._changed:
            if self._closed:
                raise TuningError("these devices have been closed")
            if not self._pending and not self._measuring:
                self._last_success = time.monotonic()
            self._pending.extend(trials)
            self._known = max(count, 1)
            new = range(self._slots, max(self._slots, min(self._known, len(trials))))
            self._slots += len(new)
            self._changed.notify_all()
        for slot in new:
            threading.Thread(target=self._serve, args=(slot,), daemon=True).start()
        return [trial.future for trial in trials]

    def close(self) -> None:
        """Give up what has not been measured yet: such trials fail."""
        with self._changed:
            self._closed = True
            self._fail_all("measuring was stopped")
            self._changed.notify_all()
        self._devices.close()

    def _serve(self, slot: int) -> None:
        while self._wait_for_work():
            try:
                device = self._devices.acquire(slot)
            except NoDeviceError as e:
                self._found_none(str(e))
            except Exception as e:  # a slot that ended here would leave its trials waiting
                self._found_none(f"{type(e).__name__}: {e}")
            else:
                trial = self._choose(device.name)
                if trial is None:
                    device.give_back()
                    time.sleep(_PAUSE)
                    self._known = max(self._devices.count(), 1)  # others may have left
                else:
                    self._measure(device, trial)

    def _wait_for_work(self) -> bool:
        """Wait for a trial that no other slot is getting a device for; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._pending) > self._asking)
            self._asking += 1
            return not self._closed

    def _found_none(self, reason: str) -> None:
        with self._changed:
            self._asking -= 1
            waited = time.monotonic() - self._last_success
            if not self._measuring and waited > self._wait_s:
                self._fail_all(f"no device for {self._wait_s:g} s: {reason}")
            else:
                self._changed.wait(_PAUSE)

    def _fail_all(self, reason: str) -> None:
        while self._pending:
            self._pending.popleft().future.set_exception(TuningError(reason))

    def _choose(self, device: str) -> _Trial[Job] | None:
        """The trial for this device; None if all have failed on it and may yet get another."""
        with self._changed:
            self._asking -= 1
            self._last_success = now = time.monotonic()
            fitting = (
                trial
                for trial in self._pending
                if device not in trial.tried
                or len(set(trial.tried)) >= self._known
                or now - trial.lost_at > self._patience_s
            )
            trial = next(fitting, None)
            if trial is not None:
                self._pending.remove(trial)
                self._measuring += 1
            return trial

    def _measure(self, device: Device[Job], trial: _Trial[Job]) -> None:
        outcome: Any
        try:
            outcome = device.measure(trial.job)
        except DeviceLostError as e:
            outcome = self._lost(device.name, trial, str(e))
        except TuningError as e:
            outcome = e
        except Exception as e:
            outcome = TuningError(f"{type(e).__name__}: {e}")
        with self._changed:
            self._measuring -= 1
            self._last_success = time.monotonic()
            if outcome is None and not self._closed:
                self._pending.appendleft(trial)
                self._changed.notify_all()
                return
        if isinstance(outcome, list):
            trial.future.set_result(outcome)
        else:
            trial.future.set_exception(outcome or TuningError("measuring was stopped"))

    def _lost(self, device: str, trial: _Trial[Job], reason: str) -> TuningError | None:
        """None if the trial is to be tried again."""
        trial.tried.append(device)
        trial.lost_at = time.monotonic()
        if len(trial.tried) < self._attempts:
            return None
        return TuningError(f"lost {' and '.join(trial.tried)}, at last because {reason}")
