"""MetaSchedule's builder and runner for this project's candidates, on this machine or on a farm."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.arg_info import TensorInfo
from tvm.s_tir.meta_schedule.builder import BuilderInput, BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.runner import PyRunner, RunnerInput, RunnerResult
from tvm.s_tir.meta_schedule.runner.runner import PyRunnerFuture
from tvm.support.popen_pool import PopenPoolExecutor

from ..schedules.choices import Choice
from ..targets import PivotTarget
from . import trials
from .artifacts import arguments_of
from .space import TASK, choice_of
from .tasks import LayerTask

BUILD_S, _MEASURE_S = 60.0, 60.0
RULE_NAME = "rule"


class Workshop:
    """Where candidates are built: a folder, and processes that compile.

    Use it as a context: at its end the folder is removed and the processes are ended.
    """

    def __init__(self, tasks: Mapping[str, LayerTask], workers: int) -> None:
        """`tasks` are named as their modules name them."""
        self._tasks = dict(tasks)
        self._folder = tempfile.TemporaryDirectory(prefix="tvm_pivot_tune_")
        self._pool = PopenPoolExecutor(
            max_workers=workers, timeout=BUILD_S, initializer=trials.ignore_interrupts
        )
        self._count = 0

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False)
        self._folder.cleanup()

    def build(self, task: str, choices: Sequence[Choice]) -> list[BuilderResult]:
        """Compile candidates of one task; the rule's stays there to compare with."""
        described = self._tasks[task]
        folder = Path(self._folder.name) / str(list(self._tasks).index(task))
        folder.mkdir(exist_ok=True)
        ready = folder / f"{RULE_NAME}.so"
        waiting: list[Future[str] | Path] = []
        for choice in choices:
            self._count += 1
            is_rule = choice == described.rule
            if is_rule and ready.exists():
                waiting.append(ready)
                continue
            name = RULE_NAME if is_rule else str(self._count)
            args = (described.reduced(choice), choice.decisions(), str(folder), name)
            waiting.append(self._pool.submit(trials.build_candidate, *args))
        return [
            BuilderResult(str(one), None) if isinstance(one, Path) else built(one)
            for one in waiting
        ]


def built(future: Future[str]) -> BuilderResult:
    """What came of a candidate: its library, or why there is none."""
    try:
        return BuilderResult(future.result(), None)
    except Exception as e:
        return BuilderResult(None, _one_line(e))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


@derived_object
class CandidateBuilder(PyBuilder):  # type: ignore[misc]
    """Builds what a candidate's decisions say, with the layer of its task."""

    def __init__(self, workshop: Workshop) -> None:
        super().__init__()
        self.workshop = workshop

    def build(self, build_inputs: Sequence[BuilderInput]) -> list[BuilderResult]:
        """Build the candidates of one task."""
        if not build_inputs:
            return []
        task = str(build_inputs[0].mod["main"].attrs[TASK])
        return self.workshop.build(task, [choice_of(item.mod) for item in build_inputs])


@derived_object
class Times(PyRunnerFuture):  # type: ignore[misc]
    """Times that are there already, or why there are none."""

    def __init__(self, seconds: list[float] | None, error: str | None) -> None:
        super().__init__()
        self.seconds, self.error = seconds, error

    def done(self) -> bool:
        return True

    def result(self) -> RunnerResult:
        return RunnerResult(self.seconds, self.error)


class LocalMachine:
    """Measures candidates in a process of its own, all of a batch in turns, one thread."""

    def __init__(self, target: PivotTarget, rounds: int = 12, least: float = 0.0015) -> None:
        """Args:
        target: for its caches.
        rounds: times of each candidate.
        least: seconds of one of them, about.
        """
        self._l2_bytes, self._rounds, self._least = target.l2_bytes, rounds, least
        self._pool = PopenPoolExecutor(
            max_workers=1, timeout=_MEASURE_S, initializer=trials.ignore_interrupts
        )
        self._rule: dict[Path, float] = {}

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(wait=False)

    def measure(self, artifacts: Sequence[str]) -> list[list[float] | str]:
        """Times of candidates of one task, of the third of the rounds that others disturbed least.

        The rule's candidate takes its turns too, and times are relative to the first of its:
        what else runs on this machine makes all of a batch slower. In place of times that there
        are not, why.
        """
        rule = Path(artifacts[0]).with_name(f"{RULE_NAME}.so")
        batch = [*artifacts, str(rule)] if rule.exists() else list(artifacts)
        try:
            times = [sorted(one)[: -(-len(one) // 3)] for one in self._run(batch)]
        except Exception as e:
            if len(artifacts) == 1:
                return [_one_line(e)]
            return [self.measure([one])[0] for one in artifacts]
        if not rule.exists():
            return [*times]
        own = median(times[-1])
        scale = self._rule.setdefault(rule, own) / own
        return [[scale * seconds for seconds in one] for one in times[: len(artifacts)]]

    def _run(self, artifacts: Sequence[str]) -> list[list[float]]:
        args = (list(artifacts), self._l2_bytes, self._rounds, self._least)
        found: list[list[float]] = self._pool.submit(trials.measure_candidates, *args).result()
        return found


@derived_object
class LocalRunner(PyRunner):  # type: ignore[misc]
    """MetaSchedule's side of a `LocalMachine`."""

    def __init__(self, machine: LocalMachine) -> None:
        super().__init__()
        self.machine = machine

    def run(self, runner_inputs: Sequence[RunnerInput]) -> list[Any]:
        """Measure candidates of one task."""
        artifacts = [str(item.artifact_path) for item in runner_inputs]
        found = self.machine.measure(artifacts) if artifacts else []
        return [Times(None, x) if isinstance(x, str) else Times(x, None) for x in found]


@derived_object
class WithArguments(PyRunner):  # type: ignore[misc]
    """Another runner, such as `rpc(...)`, told the arguments that candidates really take."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def run(self, runner_inputs: Sequence[RunnerInput]) -> list[Any]:
        """Start measuring."""
        told = []
        for item in runner_inputs:
            path = str(item.artifact_path)
            infos = [TensorInfo(dtype, shape) for dtype, shape in arguments_of(path)]
            told.append(RunnerInput(path, item.device_type, infos))
        return list(self.inner.run(told))


RECALLED = "recalled:"


def recalled(artifact: str) -> float | None:
    """The time that stands in place of an artifact's path, if it does."""
    return float(str(artifact)[len(RECALLED) :]) if str(artifact).startswith(RECALLED) else None


def clear(artifacts: Sequence[str]) -> None:
    """Remove candidates that are measured, but for the rule's."""
    for artifact in map(Path, artifacts):
        if artifact.stem != RULE_NAME and recalled(str(artifact)) is None:
            for suffix in (".so", ".npz", ".json"):
                artifact.with_suffix(suffix).unlink(missing_ok=True)


def workers() -> int:
    """Processes that compile: one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
