"""Which record is used for a task, and MetaSchedule databases made from records."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tuning_records import PROBLEM, TARGET, numbers, record, task
from tvm import s_tir, te
from tvm.s_tir import meta_schedule as ms

from tvm_pivot.targets import PRESETS, resolve
from tvm_pivot.tuning.database import rebuild, stored_trace, trace_as_json
from tvm_pivot.tuning.lookup import best, distance, nearest
from tvm_pivot.tuning.records import TargetKey, TaskKey, TuningRecord, decode_line, encode


def test_the_best_record_is_of_the_same_task() -> None:
    records = [
        record(0, seconds=(3e-3,)),
        record(1, seconds=(1e-3, 2e-3, 9e-3)),  # 2 ms in the median
        record(2, task(461), seconds=(1e-4,)),
        record(3, task(target=replace(TARGET, mcpu="znver4")), seconds=(1e-4,)),
    ]
    assert numbers([best(records, task())]) == [1]
    assert numbers([best(records, task(target=replace(TARGET, name="x86")))]) == [1]
    assert best(records, task(rows=65)) is None
    assert best([], task()) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.0),
        ({"rows": 128}, 1.0),
        ({"columns": 144}, 2.0 + 2.0),  # and four times the density
        ({"block_rows": 4}, 4.0),
        ({"taps": 18}, 2.0),
        ({"pitch": 60}, 0.0),
        ({"pitch": 56}, 1.0),  # no gaps
        ({"row_blocks": 16}, 1.0),  # half the density
        ({"new": 1}, 2.0),
        ({"epilogue": {"residual": True, "low": None, "high": None}}, 2.0),
        ({"entries": 920}, 1.0),
        ({"entries": 0}, 1.0),
        ({"target": replace(TARGET, cores=4)}, 2.0),
        ({"target": replace(TARGET, mcpu="znver4")}, 2.0),
        ({"target": replace(TARGET, mcpu="sapphirerapids")}, 0.5),
        ({"target": replace(TARGET, lanes=8)}, None),
        ({"target": replace(TARGET, family="arm")}, None),
    ],
)
def test_distances(changes: dict[str, Any], expected: float | None) -> None:
    found = distance(task(), task(**changes))
    assert found == (None if expected is None else pytest.approx(expected))


def test_kernels_are_not_compared() -> None:
    assert distance(task(), replace(task(), kernel="rows")) is None


sizes = st.integers(0, 4096)
tasks = st.builds(task, sizes, rows=sizes, columns=sizes, pitch=sizes, width=sizes)


@given(tasks, tasks)
def test_distance_is_symmetric_and_zero_for_equal_tasks(a: TaskKey, b: TaskKey) -> None:
    assert distance(a, a) == 0
    assert distance(a, b) == pytest.approx(distance(b, a))


def test_the_nearest_tasks_come_first_with_their_best_records() -> None:
    records = [
        record(0, task(500), seconds=(2e-3,)),
        record(1, task(500), seconds=(1e-3,)),
        record(2, task(460), seconds=(5e-3,)),
        record(3, task(rows=256), seconds=(1e-5,)),
        record(4, task(target=replace(TARGET, lanes=8))),
    ]
    found = nearest(records, task(), count=9)
    assert numbers(near.record for near in found) == [2, 1, 3]
    assert [near.distance for near in found] == pytest.approx([0, np.log2(500 / 460), 2])
    assert numbers(near.record for near in nearest(records, task())) == [2]
    assert numbers(near.record for near in nearest(records, task(), 9, within=1)) == [2, 1]
    assert nearest([], task()) == []


def doubling(key: TaskKey) -> tvm.IRModule:
    """``y[i] = 2 x[i]``, as many as the task has rows."""
    x = te.placeholder((key.problem["rows"],), name="x")
    y = te.compute(x.shape, lambda i: x[i] * 2.0, name="y")
    return tvm.IRModule({"main": te.create_prim_func([x, y])})


def tiled(rows: int, inner: int) -> list[Any]:
    """A trace that splits and vectorizes `doubling`, as JSON."""
    schedule = s_tir.Schedule(doubling(task(rows=rows)))
    (loop,) = schedule.get_loops(schedule.get_sblock("y"))
    factors = schedule.sample_perfect_tile(loop, 2, decision=[rows // inner, inner])
    schedule.vectorize(schedule.split(loop, factors)[1])
    return trace_as_json(schedule.trace)


def traced(rows: int, inner: int, seconds: float) -> TuningRecord:
    """A record of `tiled`, from its line."""
    made = record(
        key=task(rows=rows), decisions={"trace": tiled(rows, inner)}, seconds=(seconds, seconds)
    )
    return decode_line(encode(made))[1]


def test_a_database_from_records() -> None:
    records = [traced(64, 16, 2e-6), traced(64, 8, 1e-6), traced(128, 32, 3e-6)]
    target = resolve("x86").to_tvm()
    made = rebuild(records, lambda key: doubling(key), stored_trace, target)
    assert (made.used, made.refused) == (3, ())
    assert len(made.database) == 3
    found = made.database.query_tuning_record(doubling(task(rows=64)), target, "main")
    assert [float(s) for s in found.run_secs] == [1e-6, 1e-6]
    schedule = made.database.query_schedule(doubling(task(rows=64)), target, "main")
    assert [int(f) for f in schedule.trace.decisions[schedule.trace.insts[2]]] == [8, 8]
    x, y = np.arange(64, dtype=np.float32), tvm.runtime.tensor(np.zeros(64, np.float32))
    tvm.compile(schedule.mod, target=target)(tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), 2 * x)
    wide = made.database.commit_workload(doubling(task(rows=128)))
    assert len(made.database.get_top_k(wide, 5)) == 1


HOSTILE: list[Any] = [
    None,
    [],
    [[], []],  # a trace of nothing is one, and the kernel as it is
    [[None], []],
    [[["GetSBlock", [], ["y", "main"]]], []],
    [[["GetSBlock", [], ["elsewhere", "main"], ["b0"]]], []],
    [[["Nonsense", [], [], []]], []],
    [[["GetLoops", ["b7"], [], []]], []],
    [tiled(64, 16)[0], [[2, [0, 0]]]],  # TVM divides by it
    [tiled(64, 16)[0], [[2, []]]],
    [tiled(64, 16)[0], [[2, None]]],
    [tiled(64, 16)[0], [[2, [1, 2, 3]]]],
    [tiled(64, 16)[0], [[99, [4, 16]]]],
    [tiled(64, 16)[0], [[None, [4, 16]]]],
]


def test_traces_that_do_not_fit_are_refused_one_by_one() -> None:
    records = [record(i, decisions={"trace": trace}) for i, trace in enumerate(HOSTILE)]
    records = [replace(r, task=task(rows=64)) for r in records]
    good = traced(64, 16, 1e-6)
    target = resolve("x86").to_tvm()
    made = rebuild([*records, record(), good], doubling, stored_trace, target)
    assert made.used == 2
    reasons = dict(made.refused)
    assert set(reasons) == {*records[:2], *records[3:], record()}
    assert all("\n" not in reason and ": " in reason for reason in reasons.values())


def test_tasks_without_a_workload_are_refused() -> None:
    made = rebuild([record()], lambda key: {}[key], stored_trace, resolve("x86").to_tvm())
    assert (made.used, len(made.refused)) == (0, 1)


def test_a_search_can_start_from_the_database() -> None:
    """MetaSchedule accepts it where it would make its own."""
    made = rebuild([traced(64, 16, 1e-6)], doubling, stored_trace, resolve("x86").to_tvm())
    assert isinstance(made.database, ms.database.Database)
    assert made.database.has_workload(doubling(task(rows=64)))


def test_the_keys_of_presets_differ_where_machines_do() -> None:
    keys = {TargetKey.of(target) for target in PRESETS.values()}
    # Systems load the same code: the triple makes no other kernel. GPUs of one size are alike.
    facts = [
        ({k: v for k, v in t.tvm.items() if k != "mtriple"}, t.lanes, t.cores,
         t.gpu and t.gpu.multiprocessors)
        for t in PRESETS.values()
    ]  # fmt: skip
    machines = {json.dumps(fact, sort_keys=True) for fact in facts}
    assert len(keys) == len(machines)
    assert task().problem == PROBLEM
