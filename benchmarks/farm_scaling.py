"""How many trials a minute a farm measures, against its number of devices, and where that ends.

The scheduler is the runner's own (`tvm_pivot.tuning.dispatch`); devices are made up and sleep.
That leaves out the search machine's other work. `--build-ms` adds the compiling: `--cores` cores
compile a batch, then the devices measure it, as MetaSchedule does with a single task.

    python -m benchmarks.farm_scaling --json benchmarks/results/farm_scaling.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty, Queue

from rich.console import Console
from rich.table import Table

from tvm_pivot.tuning.dispatch import Dispatcher, NoDeviceError

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SCALES_ABOVE = 0.8
_MOST_PER_DEVICE = 64  # more only takes time: few devices are always busy


@dataclass
class SleepyFarm:
    """Devices that take as long as a job says."""

    size: int
    free: Queue[str] = field(default_factory=Queue)

    def __post_init__(self) -> None:
        for number in range(self.size):
            self.free.put(f"device {number}")

    def count(self) -> int:
        """How many there are."""
        return self.size

    def acquire(self, slot: int) -> SleepyDevice:
        """The next free one."""
        try:
            return SleepyDevice(self, self.free.get(timeout=1))
        except Empty:
            raise NoDeviceError("all are busy") from None

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True)
class SleepyDevice:
    """One of them."""

    farm: SleepyFarm
    name: str

    def measure(self, job: float) -> list[float]:
        """Take `job` seconds."""
        time.sleep(job)
        self.farm.free.put(self.name)
        return [job]

    def give_back(self) -> None:
        """Be free again."""
        self.farm.free.put(self.name)


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        devices: how many.
        batch: trials that are submitted together.
        build_seconds: what compiling adds per trial, with all cores at it.
        trials_per_minute: measured.
        efficiency: of devices x 60 / mean trial time, the part that was reached.
    """

    devices: int
    batch: int
    build_seconds: float
    trials_per_minute: float
    efficiency: float


def measure(
    devices: int, batch: int, seconds: float, build_seconds: float, at_least: float
) -> Point:
    """Whole batches of trials, one or more, for `at_least` seconds."""
    rng = random.Random(0)
    dispatcher = Dispatcher(SleepyFarm(devices))
    done, asked, started = 0, 0.0, time.perf_counter()
    while not done or time.perf_counter() - started < at_least:
        time.sleep(batch * build_seconds)
        jobs = [seconds * rng.uniform(0.5, 1.5) for _ in range(batch)]
        for future in dispatcher.submit(jobs):
            future.result()
        done, asked = done + batch, asked + sum(jobs)
    took = time.perf_counter() - started
    dispatcher.close()
    return Point(devices, batch, build_seconds, done / took * 60, asked / (devices * took))


def limit(points: Sequence[Point]) -> int:
    """The most devices up to which every point is above `SCALES_ABOVE` of linear; 0 if none is."""
    reached = 0
    for point in sorted(points, key=lambda p: p.devices):
        if point.efficiency < SCALES_ABOVE:
            break
        reached = point.devices
    return reached


def main() -> None:
    """Measure all combinations, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--batch", type=int, nargs="+", default=(64, 256, 1024))
    parser.add_argument("--trial-ms", type=float, default=200, help="mean; 0.5 to 1.5 of it")
    parser.add_argument("--build-ms", type=float, nargs="+", default=(0.0, 1000.0))
    parser.add_argument("--cores", type=int, default=64, help="cores that compile")
    parser.add_argument("--at-least", type=float, default=2, help="seconds per point")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    series: dict[tuple[float, int], list[Point]] = {}
    for build_ms in options.build_ms:
        for batch in options.batch:
            build = build_ms / 1e3 / options.cores
            series[build_ms, batch] = [
                measure(n, batch, options.trial_ms / 1e3, build, options.at_least)
                for n in options.devices
                if batch <= _MOST_PER_DEVICE * n
            ]
    show(series, options.devices)
    if options.json is not None:
        settings = {"trial_ms": options.trial_ms, "cores": options.cores}
        found = [
            {"build_ms": build_ms, "batch": batch, "scales_to": limit(points)}
            | {"points": [asdict(point) for point in points]}
            for (build_ms, batch), points in series.items()
        ]
        options.json.write_text(json.dumps({**settings, "series": found}, indent=1) + "\n")


def show(series: dict[tuple[float, int], list[Point]], devices: Sequence[int]) -> None:
    """Trials per minute, a column per series."""
    heads = [f"batch {batch}, {host:g} ms a build" for host, batch in series]
    table = Table("devices", *heads)
    for count in devices:
        found = [{p.devices: p for p in points}.get(count) for points in series.values()]
        cells = [f"{p.trials_per_minute:.0f} ({p.efficiency:.0%})" if p else "" for p in found]
        table.add_row(str(count), *cells)
    table.add_row(f"above {SCALES_ABOVE:.0%} to", *(str(limit(p) or "-") for p in series.values()))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
