"""MetaSchedule on counted cycles: a runner that needs no board and always gives the same cost."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvm_pivot.errors import TuningError
from tvm_pivot.tuning.dispatch import Dispatcher
from tvm_pivot.tuning.rpc_devices import Trial
from tvm_pivot.tuning.rpc_runner import FarmRunner
from tvm_pivot.tuning.rpc_worker import Allocate, any_floats

from . import compiled
from .cores import ArmCostError, Core
from .cost import Cost
from .emulator import run_tool

SECONDS_PER_CYCLE = 1e-9
"""MetaSchedule's unit is the second: costs are told as those of a core of 1 GHz."""

_FUNCTION = "main"


def runner(core: Core, *, allocate: Allocate = any_floats, jobs: int = 1) -> Any:
    """A runner whose results are model cycles, as `SECONDS_PER_CYCLE` each.

    Args:
        core: what the candidates are compiled for.
        allocate: makes the arguments of a candidate, as for `tvm_pivot.tuning.rpc_runner.rpc`.
        jobs: candidates that run side by side, which changes no result.

    Returns:
        A `tvm.s_tir.meta_schedule.runner.Runner`.
    """
    # A candidate that fails here fails each time: no second attempt.
    return FarmRunner(Dispatcher(EmulatedCores(core, allocate, jobs), attempts=1))


@dataclass(frozen=True)
class EmulatedCores:
    """As many emulated cores as asked for: the devices of a `Dispatcher`.

    `known` has the cycles of what was measured already: they are the same each time.
    """

    core: Core
    allocate: Allocate
    jobs: int
    known: dict[str, float] = field(default_factory=dict)

    def count(self) -> int:
        """How many there are."""
        return self.jobs

    def acquire(self, slot: int) -> EmulatedCore:
        """The core of a slot: there is one for each."""
        return EmulatedCore(f"{self.core.name} {slot}", self.core, self.allocate, self.known)

    def close(self) -> None:
        """Nothing to end: each program ends by itself."""


@dataclass(frozen=True)
class EmulatedCore:
    """A core under emulation, for one trial."""

    name: str
    core: Core
    allocate: Allocate
    known: dict[str, float]

    def measure(self, job: Trial) -> list[float]:
        """The cost of a trial, as one time in seconds.

        Raises:
            TuningError: the candidate cannot be linked, or fails.
        """
        try:
            arguments = arguments_for(self.allocate, job)
            digest = hashlib.sha256(job.artifact.read_bytes())
            for array in arguments:
                digest.update(array.tobytes())
            key = digest.hexdigest()
            if key not in self.known:
                self.known[key] = self._cycles(job.artifact, arguments)
        except (ArmCostError, ValueError) as e:
            raise TuningError(str(e)) from e
        return [self.known[key] * SECONDS_PER_CYCLE]

    def _cycles(self, artifact: Path, arguments: list[Any]) -> float:
        with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
            library = artifact if artifact.suffix == ".so" else linked(artifact, Path(scratch))
            functions, _ = compiled.execute(library, _FUNCTION, arguments, self.core)
        return sum(functions.values(), Cost()).cycles

    def give_back(self) -> None:
        """Nothing is held."""


def linked(artifact: Path, folder: Path) -> Path:
    """The shared library of what MetaSchedule's own builder exports: objects in a tar archive.

    Raises:
        ArmCostError: it cannot be linked for aarch64.
    """
    with tarfile.open(artifact) as archive:
        archive.extractall(folder, filter="data")
    library = folder / "candidate.so"
    objects = map(str, sorted(folder.glob("*.o")))
    run_tool("aarch64-linux-gnu-g++", "-shared", "-o", str(library), *objects)
    return library


def arguments_for(allocate: Allocate, job: Trial) -> list[Any]:
    """The arrays of a trial; where the caller has none, numbers that are the same each time."""
    rng = np.random.default_rng(0)
    given = allocate(job.artifact, job.arguments)
    return [
        rng.standard_normal(shape).astype(dtype) if array is None else array
        for array, (dtype, shape) in zip(given, job.arguments, strict=True)
    ]
