"""Runtimes taking turns: each in its own process, one at a time, in an order that rotates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from .conversion import Converted
from .models import ModelInput
from .reference import TOLERANCES, Reference, Sample, complaint, largest_error
from .results import Result, Setting, Status
from .specs import RuntimeSpec
from .workers import Worker, WorkerError

# Less wall time than this says nothing about how many cores were in use.
_LEAST_WALL_SECONDS = 0.02
# Copying outputs takes less CPU time than this, or than computing them.
_MOST_COPY_SECONDS = 0.02


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: turns of each runtime that count; one more comes before them.
        turn_ms: about how long a turn's timed calls take.
        most_calls: in a turn.
        lead_ms: untimed calls at the start of a turn take so long; there is at least one.
        warm_ms: the same before the first turn.
        noise: measure one runtime twice.
        most_seconds: a runtime so slow that its turns would take longer has fewer of them.
        timeout_s: for one conversion, or for one answer of a worker.
    """

    rounds: int = 15
    turn_ms: float = 25.0
    most_calls: int = 200
    lead_ms: float = 10.0
    warm_ms: float = 200.0
    noise: bool = True
    most_seconds: float = 20.0
    timeout_s: float = 600.0


@dataclass
class _Times:
    """Timed calls, in seconds."""

    turns: list[list[float]] = field(default_factory=list)
    cpu: float = 0.0
    wall: float = 0.0


class Contender:
    """One runtime with one model, threads and precision. Its errors become its status."""

    def __init__(
        self,
        model: ModelInput,
        spec: RuntimeSpec,
        converted: Converted,
        *,
        threads: int,
        precision: str,
        reference: Reference,
        plan: Plan,
        folder: Path,
    ) -> None:
        """Args: `folder` is for outputs on their way from the worker."""
        self.spec = spec
        self.status: Status = converted.status
        self._detail = converted.detail
        self._model, self._converted = model, converted
        self._threads, self._precision = threads, precision
        self._reference, self._plan, self._folder = reference, plan, folder
        self._worker: Worker | None = None
        self._version = converted.version
        self._settings: tuple[Setting, ...] = ()
        self._measured: dict[str, float] = {}
        self._max_error: float | None = None
        self._times = _Times()
        self._calls = 1
        self._rounds = plan.rounds

    @property
    def median_ms(self) -> float:
        """Of all timed calls."""
        return median(s for turn in self._times.turns for s in turn) * 1e3

    def launch(self) -> None:
        """Start its process and have it import the runtime; `settle` waits for that."""
        if self.status != "ok":
            return
        try:
            self._worker = Worker(self.spec, threads=self._threads, precision=self._precision)
            self._worker.post("version")
        except (WorkerError, OSError) as e:
            self._end("failed", str(e))

    def settle(self) -> None:
        """Wait until its process has imported the runtime."""
        if self.status != "ok":
            return
        with self._watching():
            assert self._worker is not None
            self._worker.answer("version", timeout=self._plan.timeout_s)

    def start(self) -> None:
        """Load the model, check its answer for the first sample, and warm up."""
        if self.status != "ok":
            return
        with self._watching():
            reply = self._ask("prepare", files=list(map(str, self._converted.files)))
            self._version = reply["version"]
            self._settings = tuple(Setting(k, v) for k, v in reply["settings"].items())
            self._measured["load_s"] = reply["seconds"]
            self._measured["resident_mb"] = reply["resident_mb"]
            first = self._check(0)
            self._measured["first_run_ms"] = first["seconds"] * 1e3
            if self.status == "ok":
                self._size_turns(self._time(calls=1, warm_ms=self._plan.warm_ms)["seconds"][0])

    def turn(self, number: int) -> None:
        """Take part in a round; number 0 does not count."""
        if self.status != "ok" or not self._takes_part(number):
            return
        with self._watching():
            reply = self._time(calls=self._calls, warm_ms=self._plan.lead_ms)
            if number == 0:
                self._size_turns(median(reply["seconds"]))
                return
            self._times.turns.append(reply["seconds"])
            self._times.cpu += reply["cpu_seconds"]
            self._times.wall += reply["wall_seconds"]

    def finish(self) -> None:
        """Check the answers again, for other inputs first, and how it came by them."""
        if self.status != "ok":
            return
        with self._watching():
            for sample in (1, 0):
                reply = self._check(sample)
                spent, late = reply["run_cpu_seconds"], reply["outputs_cpu_seconds"]
                if late > max(spent, _MOST_COPY_SECONDS):
                    self._end("wrong", f"run() took {spent:.3f} s and reading outputs {late:.3f} s")
            if too_many_cores(self._times.cpu, self._times.wall, self._threads):
                used = self._times.cpu / self._times.wall
                self._end("wrong", f"used {used:.1f} cores, {self._threads} asked for")
            self._measured["peak_mb"] = self._ask("memory")["peak_mb"]

    def close(self) -> None:
        """End its process."""
        if self._worker is not None:
            self._worker.close()

    def kill(self) -> None:
        """End its process at once."""
        if self._worker is not None:
            self._worker.kill()

    def result(self) -> Result:
        """What there is to say, after `finish`."""
        return Result(
            model=self._model.name,
            runtime=self.spec.name,
            title=self.spec.adapter.title,
            status=self.status,
            version=self._version,
            threads=self._threads,
            precision=self._precision,
            detail=self._detail,
            max_error=self._max_error,
            cores_used=self._times.cpu / self._times.wall if self._times.wall else None,
            convert_s=self._converted.seconds,
            file_mb=_size_mb(self._converted.files) if self._converted.files else None,
            settings=self._settings,
            **(self._numbers() if self.status == "ok" else {}),
        )

    def _numbers(self) -> dict[str, Any]:
        medians = [median(turn) for turn in self._times.turns]
        quarters = quantiles(medians, n=4, method="inclusive") if len(medians) > 1 else [0.0, 0, 0]
        seconds = [s for turn in self._times.turns for s in turn]
        peak = self._measured["peak_mb"]
        return {
            "median_ms": self.median_ms,
            "min_ms": min(seconds) * 1e3,
            "spread": (quarters[2] - quarters[0]) * 1e3 / self.median_ms,
            "calls": len(seconds),
            "load_s": self._measured["load_s"],
            "first_run_ms": self._measured["first_run_ms"],
            "peak_memory_mb": peak,
            "model_memory_mb": max(0.0, peak - self._measured["resident_mb"]),
        }

    def _takes_part(self, number: int) -> bool:
        """Whether a slow runtime's few turns, spread over all rounds, fall on this one."""
        rounds = self._plan.rounds
        if self._rounds == rounds:
            return True
        return number * self._rounds // rounds > (number - 1) * self._rounds // rounds >= 0

    def _size_turns(self, seconds: float) -> None:
        """Choose the calls of a turn and the number of turns, for calls that take `seconds`."""
        plan, seconds = self._plan, max(seconds, 1e-9)
        self._calls = min(max(round(plan.turn_ms * 1e-3 / seconds), 1), plan.most_calls)
        turn = max(seconds, plan.lead_ms * 1e-3) + self._calls * seconds
        self._rounds = min(max(int(plan.most_seconds / turn), 2), plan.rounds)

    def _time(self, *, calls: int, warm_ms: float) -> dict[str, Any]:
        return self._ask("time", warm=1, warm_seconds=warm_ms * 1e-3, calls=calls)

    def _check(self, index: int) -> dict[str, Any]:
        """Compare the outputs for one sample; wrong ones end it."""
        sample, other = self._reference.samples[index], self._reference.samples[1 - index]
        file = self._folder / f"outputs_{self.spec.name}.npz"
        reply = self._ask(
            "check",
            inputs=str(sample.file),
            other=str(other.file),
            names=list(sample.inputs),
            outputs=str(file),
        )
        with np.load(file, allow_pickle=False) as arrays:
            outputs = {name: arrays[f"arr_{i}"] for i, name in enumerate(reply["names"])}
        file.unlink()
        self._judge(outputs, sample)
        return reply

    def _judge(self, outputs: dict[str, Any], sample: Sample) -> None:
        if reason := complaint(outputs, sample.expected):
            self._max_error = None  # there is no number for it
            self._end("wrong", reason)
            return
        error, allowed = largest_error(outputs, sample.expected), TOLERANCES[self._precision]
        self._max_error = max(error, self._max_error or 0.0)
        if error > allowed:
            self._end("wrong", f"outputs are off by {error:.2g}, {allowed:g} is allowed")

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._worker is not None
        return self._worker.request(do, timeout=self._plan.timeout_s, **arguments)

    def _end(self, status: Status, detail: str) -> None:
        if self.status == "ok":  # the first reason is the one to tell
            self.status, self._detail = status, detail

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Turn a worker's errors into a status; leave its process paused, or ended."""
        try:
            yield
        except (WorkerError, OSError) as e:
            unsupported = isinstance(e, WorkerError) and e.unsupported
            self._end("unsupported" if unsupported else "failed", str(e))
        if self._worker is not None:
            if self.status == "ok":
                self._worker.pause()
            else:
                self._worker.kill()


def too_many_cores(cpu_seconds: float, wall_seconds: float, threads: int) -> bool:
    """Whether calls took more CPU time than `threads` threads can, with some room for noise."""
    used = cpu_seconds / wall_seconds if wall_seconds >= _LEAST_WALL_SECONDS else 0.0
    return used > threads * 1.05 + 0.15


def take_turns(
    contenders: Sequence[Contender], plan: Plan, progress: Callable[[int], None]
) -> None:
    """Run all rounds; each begins with the runtime after the one the last began with.

    Args:
        progress: called with the number of each round, from 0, as it begins.
    """
    for number in range(plan.rounds + 1):
        progress(number)
        start = number % max(1, len(contenders))
        for contender in (*contenders[start:], *contenders[:start]):
            contender.turn(number)


def _size_mb(files: Sequence[Path]) -> float:
    """The size of some files, and of all files in folders among them, in 10^6 bytes."""
    found = [
        path
        for file in files
        for path in (file.rglob("*") if file.is_dir() else [file])
        if path.is_file()
    ]
    return sum(path.stat().st_size for path in found) / 1e6
