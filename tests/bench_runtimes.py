"""Runtimes for the tests of the benchmark: a right one, and others wrong in one way each.

All but `Silent` compute what `model` is: ``relu(x @ WEIGHTS)``. Workers load this file by path.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tvm_pivot.bench.runtimes.protocol import (
    BF16,
    FP32,
    Array,
    Environment,
    Runtime,
    UnsupportedModelError,
)

WEIGHTS = np.cos(np.arange(32, dtype=np.float32)).reshape(8, 4)


def compute(x: Array) -> Array:
    """What the model is."""
    return np.maximum(x @ WEIGHTS, 0)


def burn(seconds: float) -> None:
    """Take so much CPU time, without the interpreter's lock."""
    data, begin = bytes(1 << 20), time.thread_time()
    while time.thread_time() - begin < seconds:
        hashlib.sha256(data).digest()


class Right(Runtime):
    name = "right"
    title = "Right"
    environment = Environment(None, (), ("numpy",))

    @property
    def version(self) -> str:
        return "1.0"

    def prepare(self, files: Sequence[Path]) -> None:
        assert files[0].exists()

    def bind(self, inputs: Mapping[str, Array]) -> None:
        self.x = inputs["x"]

    def run(self) -> None:
        self.y = compute(self.x)

    def outputs(self) -> dict[str, Array]:
        return {"y": self.y}

    def settings(self) -> dict[str, str]:
        return {"threads": str(self.threads), "OMP": os.environ["OMP_NUM_THREADS"]}


class Zeros(Right):
    name = "zeros"

    def outputs(self) -> dict[str, Array]:
        return {"y": np.zeros_like(self.y)}


class Slightly(Right):
    name = "slightly"

    def run(self) -> None:
        self.y = compute(self.x) * np.float32(1.01)


class Stale(Right):
    """Returns its first answer for ever."""

    name = "stale"

    def run(self) -> None:
        if not hasattr(self, "y"):
            super().run()


class NotFinite(Right):
    name = "not-finite"

    def outputs(self) -> dict[str, Array]:
        return {"y": np.where(self.y == self.y.max(), np.nan, self.y)}


class Shape(Right):
    name = "shape"

    def outputs(self) -> dict[str, Array]:
        return {"y": self.y[0]}


class OtherName(Right):
    name = "other-name"

    def outputs(self) -> dict[str, Array]:
        return {"z": self.y}


class Lazy(Right):
    """Computes where no time is taken."""

    name = "lazy"

    def run(self) -> None:
        pass

    def outputs(self) -> dict[str, Array]:
        return {"y": compute(self.x)}


class Deferred(Right):
    """The same, and remembers which inputs it was to compute."""

    name = "deferred"

    def run(self) -> None:
        self.waiting = self.x

    def outputs(self) -> dict[str, Array]:
        burn(0.05)
        return {"y": compute(self.waiting)}


class Greedy(Right):
    """Uses more threads than it was asked to."""

    name = "greedy"

    def run(self) -> None:
        threads = [threading.Thread(target=burn, args=(0.02,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        super().run()


class Counted(Right):
    """Its CPU time is said to be twice its wall time, however busy the machine is."""

    name = "counted"

    def prepare(self, files: Sequence[Path]) -> None:
        time.process_time_ns = lambda: 2 * time.perf_counter_ns()

    def run(self) -> None:
        time.sleep(0.01)
        super().run()


class CrashPrepare(Right):
    name = "crash-prepare"

    def prepare(self, files: Sequence[Path]) -> None:
        os.write(2, b"something\nthe last words\n")
        os._exit(3)


class CrashRun(Right):
    """Crashes when it is warm."""

    name = "crash-run"
    runs = 0

    def run(self) -> None:
        super().run()
        self.runs += 1
        if self.runs == 3:
            os.kill(os.getpid(), signal.SIGSEGV)


class Raises(Right):
    name = "raises"

    def prepare(self, files: Sequence[Path]) -> None:
        raise SystemExit("a converter's way to say no")


class Refuses(Right):
    name = "refuses"

    def convert(self, model: Path, folder: Path) -> list[Path]:
        raise UnsupportedModelError("no Relu here")


class Hangs(Right):
    name = "hangs"

    def run(self) -> None:
        subprocess.run(["sleep", "3600"])


class Spins(Right):
    """Leaves a thread behind that never rests, as some pools do."""

    name = "spins"

    def prepare(self, files: Sequence[Path]) -> None:
        threading.Thread(target=burn, args=(3600,), daemon=True).start()


class Talks(Right):
    """Prints wherever it can, and reads what is not for it."""

    name = "talks"

    def run(self) -> None:
        print("from Python", flush=True)
        os.write(1, b'{"from": "C"}\n')
        subprocess.run(["sh", "-c", "echo from a child; cat"], check=True)
        super().run()


class Missing(Right):
    name = "missing"
    environment = Environment(None, ("no-such-package>=1",), ("no_such_package",))


class Converts(Right):
    """Deploys a file of its own, and says on a list that it did."""

    name = "converts"
    precisions = (FP32, BF16)

    def convert(self, model: Path, folder: Path) -> list[Path]:
        assert list(folder.iterdir()) == []
        with Path(os.environ["TEST_CONVERSIONS"]).open("a") as file:
            file.write(f"{model.name} {self.precision}\n")
        target = folder / "deployed"
        target.write_bytes(bytes(2_000_000))
        return [target]

    def prepare(self, files: Sequence[Path]) -> None:
        assert [file.name for file in files] == ["deployed"]

    def run(self) -> None:
        super().run()
        if self.precision == BF16:
            self.y = self.y * np.float32(1.01)


class Meets(Converts):
    """Its conversions end only when there are two at a time."""

    name = "meets"
    converter = Environment(None, (), ("numpy",))

    def convert(self, model: Path, folder: Path) -> list[Path]:
        place = Path(os.environ["TEST_CONVERSIONS"])
        (place / f"{os.getpid()}").touch()
        for _ in range(6000):
            if len(list(place.iterdir())) == 2:
                return super(Converts, self).convert(model, folder)
            time.sleep(0.01)
        raise RuntimeError("nobody came")


class Alone(Converts):
    """Its conversions fail when there are two at a time."""

    name = "alone"
    converter = Environment(None, (), ("numpy",))

    def convert(self, model: Path, folder: Path) -> list[Path]:
        mark = Path(os.environ["TEST_CONVERSIONS"]) / "mark"
        mark.touch(exist_ok=False)
        time.sleep(0.1)
        mark.unlink()
        return super(Converts, self).convert(model, folder)
