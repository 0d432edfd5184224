"""The search over a network's tasks, with made-up times: it finds what is fast and stops when told.

Times depend on a candidate's decisions alone, so nothing here is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tuned_layers import conv_layer, task_of
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.runner import PyRunner, RunnerResult
from tvm.s_tir.meta_schedule.runner.runner import PyRunnerFuture

from tvm_pivot.schedules.choices import Choice
from tvm_pivot.schedules.problems import PlanesTile
from tvm_pivot.tuning.explore import explore
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.search import Job, Search, StopSearch
from tvm_pivot.tuning.space import choice_of

Cost = Callable[[Choice], float]


@derived_object
class Pretend(PyBuilder):  # type: ignore[misc]
    """Builds nothing: an artifact's path is the number of its choice."""

    def __init__(self, built: list[Choice]) -> None:
        super().__init__()
        self.built = built

    def build(self, build_inputs: Sequence[Any]) -> list[BuilderResult]:
        results = []
        for item in build_inputs:
            self.built.append(choice_of(item.mod))
            results.append(BuilderResult(f"{len(self.built) - 1}", None))
        return results


@derived_object
class Done(PyRunnerFuture):  # type: ignore[misc]
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def done(self) -> bool:
        return True

    def result(self) -> RunnerResult:
        if math.isnan(self.seconds):
            return RunnerResult(None, "crashed")
        return RunnerResult([self.seconds] * 3, None)


@derived_object
class MadeUp(PyRunner):  # type: ignore[misc]
    def __init__(self, built: list[Choice], cost: Cost) -> None:
        super().__init__()
        self.built, self.cost = built, cost

    def run(self, runner_inputs: Sequence[Any]) -> list[Any]:
        return [Done(self.cost(self.built[int(str(i.artifact_path))])) for i in runner_inputs]


def search(
    jobs: Sequence[Job], cost: Cost, told: list[Any] | None = None, **more: Any
) -> tuple[Search, list[Choice]]:
    built: list[Choice] = []
    heard = [] if told is None else told
    tell = lambda job, choice, seconds: heard.append((job, choice, list(seconds)))  # noqa: E731
    return Search(jobs, Pretend(built), MadeUp(built, cost), tell, **more), built


def wide_is_fast(choice: Choice) -> float:
    """Times that no prediction foresees."""
    tile = choice.tile
    assert isinstance(tile, PlanesTile)
    slow = 1 + abs(math.log2(tile.group_rows / 3)) + (choice.block_rows != 4) + tile.panel
    return 1e-4 * slow


TASKS = [task_of(conv_layer(size=14)), task_of(conv_layer(channels=16, size=9))]


def test_the_first_ones_are_the_rules_and_promising_ones() -> None:
    job = Job(TASKS[0])
    seeds = job.seeds([])
    assert seeds[0] == job.task.rule
    assert 3 < len(seeds) == len(set(seeds)) < 12
    assert set(seeds) <= set(job.task.choices)


def test_records_of_similar_tasks_come_among_the_first() -> None:
    far = task_of(conv_layer(size=13))
    odd = list(far.choices)[-1]
    records = [TuningRecord.now(far.key, {"choice": odd.decisions()}, [1e-4])]
    job = Job(TASKS[0])
    assert job.points.nearest(odd.decisions()) in job.seeds(records)
    useless = [TuningRecord.now(far.key, {"choice": {"form": "?"}}, [1e-4])]
    assert job.seeds(useless) == job.seeds([])


def test_a_search_finds_what_is_fast_in_every_task() -> None:
    told: list[Any] = []
    jobs = [Job(task) for task in TASKS]
    one, built = search(jobs, wide_is_fast, told)
    for job in jobs:
        one.measure(job, job.seeds([]))
    explore(one, [], 64, seed=0)
    for job in jobs:
        assert job.trials >= 8 + 8
        ranked = sorted(wide_is_fast(choice) for choice in job.points.choices)
        best = job.times[job.best()[0]]
        assert best <= ranked[len(ranked) // 50]  # among the best 2 %
        assert best < job.times[job.task.rule]
    assert [choice for _, choice, _ in told] == built
    assert all(seconds == [wide_is_fast(choice)] * 3 for _, choice, seconds in told)


def test_nothing_is_measured_twice() -> None:
    job = Job(TASKS[0])
    one, built = search([job], wide_is_fast)
    one.measure(job, job.seeds([]))
    one.measure(job, job.seeds([]))
    explore(one, [], 24, seed=0)
    new = built[len(job.seeds([])) :]
    assert len(new) == len(set(new))


def test_candidates_that_fail_are_noted_and_others_found() -> None:
    def cost(choice: Choice) -> float:
        assert isinstance(choice.tile, PlanesTile)
        return math.nan if choice.tile.panel else wide_is_fast(choice)

    job = Job(TASKS[0])
    panel = next(c for c in job.points.choices if getattr(c.tile, "panel", False))
    one, _ = search([job], cost)
    one.measure(job, [job.task.rule, panel])
    assert job.failed == {panel: "crashed"}
    assert list(job.times) == [job.task.rule]
    assert panel not in one.compare(job, [job.task.rule, panel], 2)


@pytest.mark.parametrize("how", ["time", "request"])
def test_a_search_ends_behind_the_batch_at_hand(how: str) -> None:
    job = Job(TASKS[0])
    one, built = search([job], wide_is_fast)
    one.measure(job, job.seeds([]))
    before = len(built)
    if how == "time":
        one.until = time.monotonic()
    else:
        one.stop = "Ctrl-C"
    with pytest.raises(StopSearch, match="the time is over" if how == "time" else "Ctrl-C"):
        explore(one, [], 64, seed=0)
    assert before < len(built) <= before + 8
    assert job.trials == len(built)


def test_other_errors_of_a_search_are_not_hidden() -> None:
    def broken(_: Choice) -> float:
        raise RuntimeError("the runner is broken")

    job = Job(TASKS[0])
    one, _ = search([job], broken)
    job.times[job.task.rule] = 1e-4
    with pytest.raises(Exception, match="the runner is broken"):
        explore(one, [], 16, seed=0)


def test_records_of_the_same_task_are_where_a_search_goes_on() -> None:
    job = Job(TASKS[1])
    ranked = sorted(job.points.choices, key=wide_is_fast)
    records = [
        TuningRecord.now(job.task.key, {"choice": choice.decisions()}, [wide_is_fast(choice)])
        for choice in ranked[::8]
    ]
    records.append(TuningRecord.now(job.task.key, {"odd": 1}, [1e-4]))
    one, built = search([job], wide_is_fast)
    job.times[job.task.rule] = wide_is_fast(job.task.rule)
    explore(one, records, 16, seed=0)
    mean = sum(map(wide_is_fast, built)) / len(built)
    assert mean < sum(map(wide_is_fast, job.points.choices)) / len(job.points.choices)
    assert not set(built) & set(ranked[::8])
