"""Tuning of operators that are no layer: schedules as traces, their records, and builds with them.

Nothing here depends on what was measured: whatever wins, the network computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tuned_layers import AVX2, conv_layer, task_of
from tvm import IRModule, tirx
from tvm.s_tir import meta_schedule as ms

import tvm_pivot
from tvm_pivot.relay_passes.schedule_functions import BY_RECORD, RULE, schedule_functions
from tvm_pivot.schedules.analysis import walk
from tvm_pivot.schedules.moves import PARALLEL_WORK
from tvm_pivot.targets import PivotTarget, resolve
from tvm_pivot.tuning import function_search, selection, tuner
from tvm_pivot.tuning.confirm import operator
from tvm_pivot.tuning.database import trace_as_json
from tvm_pivot.tuning.explore import without_intrinsics
from tvm_pivot.tuning.function_search import FunctionJob, FunctionSearch
from tvm_pivot.tuning.functions import FunctionTask, model_functions
from tvm_pivot.tuning.log_files import append, read
from tvm_pivot.tuning.machine import LocalMachine
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.search import Search, StopSearch
from tvm_pivot.tuning.selection import Selection, exported
from tvm_pivot.tuning.traces import KERNEL, function_key, replay

HOST = replace(resolve("x86"), cores=1)
MANY = replace(HOST, cores=8)

Shape = tuple[int, ...]


def attention(path: Path, heads: int = 2, rows: int = 24, columns: int = 16) -> Path:
    """An ONNX file without layers: softmax(q k) v."""
    shapes = {"q": (heads, rows, columns), "k": (heads, columns, rows), "v": (heads, rows, columns)}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["v"])
    graph = helper.make_graph(nodes, "attention", inputs, [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def function(build: Callable[..., Any], *shapes: Shape) -> tirx.PrimFunc:
    """The one function that an operator of Relax becomes."""
    builder = tvm.relax.BlockBuilder()
    params = [
        tvm.relax.Var(f"x{i}", tvm.relax.TensorType(shape, "float32"))
        for i, shape in enumerate(shapes)
    ]
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(build(*params)))
        builder.emit_func_output(out)
    (func,) = model_functions(builder.get(), HOST).values()
    return func


def softmax(shape: Shape) -> tirx.PrimFunc:
    return function(lambda x: tvm.relax.op.nn.softmax(x), shape)


def job_of(func: tirx.PrimFunc, target: PivotTarget = HOST) -> FunctionJob:
    key = function_key(func, target)
    return FunctionJob(FunctionTask(key, "softmax", func, 1, 0.5, target))


def traces(func: tirx.PrimFunc, count: int = 3, seed: int = 0) -> list[Any]:
    """Schedules that MetaSchedule's rules may make of a function, as JSON."""
    with without_intrinsics():
        context = function_search._context(job_of(func), seed)
    space = context.generate_design_space()
    database, model = ms.database.MemoryDatabase(), ms.cost_model.RandomModel()
    context.search_strategy.pre_tuning(count, count, space, database, model)
    found = context.search_strategy.generate_measure_candidates()
    return [trace_as_json(one.sch.trace) for one in found]


def scheduled(func: tirx.PrimFunc, seed: int, may_refuse: bool) -> Iterator[tirx.PrimFunc]:
    """The function by some traces; TVM may refuse to replay its own where a loop has one step."""
    for trace in traces(func, 2, seed):
        try:
            yield job_of(func).task.by_trace(trace)
        except RuntimeError:  # a build goes on without such a record
            assert may_refuse


def computed(func: tirx.PrimFunc, arrays: Sequence[Any], shape: Shape) -> Any:
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    named = func.with_attr("global_symbol", "main")
    library = tvm.compile(IRModule({"main": named}), target=HOST.to_tvm())
    library["main"](*map(tvm.runtime.tensor, arrays), out)
    return out.numpy()


@settings(max_examples=4)
@given(
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([1, 7, 16, 31, 64]), st.integers(0, 9)
)
def test_any_schedule_of_a_softmax_computes_it(
    batch: int, rows: int, columns: int, seed: int
) -> None:
    shape = (batch, rows, columns)
    func = softmax(shape)
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    want = torch.softmax(torch.from_numpy(x.astype(float)), -1).numpy()
    for made in scheduled(func, seed, 1 in shape):
        got = computed(made, [x], shape)
        assert np.allclose(got, want, rtol=1e-5, atol=1e-6)


@settings(max_examples=4)
@given(*[st.sampled_from([1, 5, 16, 24, 33])] * 3, st.integers(0, 9))
def test_any_schedule_of_a_product_computes_it(
    rows: int, inner: int, columns: int, seed: int
) -> None:
    func = function(tvm.relax.op.matmul, (2, rows, inner), (2, inner, columns))
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((2, rows, inner)).astype(np.float32)
    b = rng.standard_normal((2, inner, columns)).astype(np.float32)
    want = a.astype(float) @ b.astype(float)
    for made in scheduled(func, seed, 1 in (rows, inner, columns)):
        got = computed(made, [a, b], want.shape)
        assert np.allclose(got, want, rtol=0, atol=1e-5 * math.sqrt(inner) * 4)


def test_keys_say_what_a_function_computes_and_nothing_else() -> None:
    one, other = softmax((2, 8, 16)), softmax((2, 8, 17))
    assert function_key(one, HOST) == function_key(softmax((2, 8, 16)), MANY)
    assert function_key(one, HOST) != function_key(other, HOST)
    assert function_key(one, HOST) != function_key(one, AVX2)
    renamed = one.with_attr("op_pattern", 3).with_attr("op_pattern", 4)
    assert function_key(renamed, HOST) == function_key(one, HOST)
    problem = function_key(one, HOST).problem
    assert problem["arguments"] == "float32[2,8,16] float32[2,8,16]"
    assert "power total share softmax" in problem["blocks"]
    assert len(problem["hash"]) == 16


FUNC = softmax((2, 8, 16))
GOOD = traces(FUNC, 1)[0]


def changed(name: str, inputs: Any, attributes: Any) -> list[Any]:
    return [[*GOOD[0], [name, inputs, attributes, []]], GOOD[1]]


@pytest.mark.parametrize(
    "trace",
    [
        None,
        [],
        [[None], []],
        [[["GetSBlock", [], ["elsewhere", "main"], ["b0"]]], []],
        changed("UnsafeSetDType", ["b0"], [0, "int8"]),
        changed("Tensorize", ["b0"], ["mine", True]),
        changed("Annotate", ["b0", 1], ["pragma_import_llvm"]),
        changed("Annotate", ["b0", 1 << 20], ["pragma_auto_unroll_max_step"]),
        changed("Annotate", ["b0"], []),
        changed("Vectorize", ["l99"], []),
    ],
)
def test_a_trace_that_does_not_fit_is_ignored_with_one_line(trace: Any) -> None:
    one = Selection([record(FUNC, trace)])
    for _ in range(2):
        assert one.schedule(FUNC, "softmax", HOST) is None
    (note,) = one.notes
    assert note.startswith("tuning record of softmax ignored: ") and "\n" not in note


def record(func: tirx.PrimFunc, trace: Any, seconds: float = 1e-6) -> TuningRecord:
    decisions = {"stage": "final", "trace": trace}
    return TuningRecord.now(function_key(func, HOST), decisions, [seconds])


def test_a_record_is_replayed_for_its_function_only() -> None:
    one = Selection([record(FUNC, GOOD)])
    found = one.schedule(FUNC, "softmax", HOST)
    assert found is not None
    assert tvm_ffi.structural_equal(found.mod["main"], replay(GOOD, FUNC).mod["main"])
    assert one.schedule(softmax((2, 8, 17)), "softmax", HOST) is None
    assert one.schedule(FUNC, "softmax", AVX2) is None
    assert one.notes == []
    rule = TuningRecord.now(function_key(FUNC, HOST), {"stage": "final"}, [1e-6])
    assert Selection([rule]).schedule(FUNC, "softmax", HOST) is None
    layer = task_of(conv_layer())
    assert one.choose(layer.layer, layer.plan, layer.epilogue, layer.target) is None


@pytest.fixture
def network(tmp_path: Path) -> tuple[Path, dict[str, tirx.PrimFunc]]:
    """The attention network and its functions."""
    path = attention(tmp_path / "attention.onnx")
    imported = tvm_pivot.importer.import_model(path)
    return path, model_functions(imported.mod, HOST)


def inputs_of(net: tvm_pivot.Session) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(spec.shape).astype(np.float32) for spec in net.inputs]


def check(model: Path, net: tvm_pivot.Session) -> None:
    """The network computes what onnxruntime does."""
    arrays = inputs_of(net)
    feeds = {spec.name: array for spec, array in zip(net.inputs, arrays, strict=True)}
    (want,) = onnxruntime.InferenceSession(str(model)).run(None, feeds)
    assert np.allclose(net.run(*arrays), want, rtol=1e-5, atol=1e-5)


def test_builds_use_records_from_a_log_and_from_its_export(
    network: tuple[Path, dict[str, tirx.PrimFunc]], tmp_path: Path
) -> None:
    model, functions = network
    log, best = tmp_path / "log.jsonl", tmp_path / "best.jsonl"
    chosen = {name: traces(func, 1)[0] for name, func in functions.items()}
    append(log, [record(functions[name], trace) for name, trace in chosen.items()])
    append(best, exported(read(log).fresh))
    for path in (log, best):
        net = tvm_pivot.build(model, HOST, log=path)
        names = ", ".join(sorted(functions))
        assert f"operators scheduled by tuning records: {names}" in net.report.notes
        check(model, net)
    plain = tvm_pivot.build(model, HOST, log=log, tuned=False)
    assert not any("operators" in note for note in plain.report.notes)


def test_stale_and_odd_records_cost_one_line_each(
    network: tuple[Path, dict[str, tirx.PrimFunc]], tmp_path: Path
) -> None:
    model, functions = network
    log = tmp_path / "log.jsonl"
    (old, odd, *_) = functions.values()
    stale = replace(record(old, traces(old, 1)[0]), tvm="0.26.0")
    append(log, [stale, record(odd, GOOD if odd is not FUNC else [])])
    net = tvm_pivot.build(model, HOST, log=log)
    notes = [note for note in net.report.notes if "record" in note]
    assert len(notes) == 2
    assert "1 tuning records of another TVM release ignored" in notes
    check(model, net)


def test_more_cores_share_what_the_rule_shares() -> None:
    columns = PARALLEL_WORK // 128
    large, small = softmax((16, 32, columns)), softmax((2, 8, 16))
    rng = np.random.default_rng(0)
    for func, shape in ((large, (16, 32, columns)), (small, (2, 8, 16))):
        tuned = Selection([record(func, trace) for trace in traces(func, 1)])
        mod = IRModule({"softmax": func.with_attr("global_symbol", "softmax")})
        one, many = (
            schedule_functions(mod, target, tuned=tuned)["softmax"] for target in (HOST, MANY)
        )
        assert one.attrs[RULE] == BY_RECORD and not parallel(one)
        assert parallel(many) == parallel(schedule_functions(mod, MANY)["softmax"])
        x = rng.standard_normal(shape).astype(np.float32)
        want = torch.softmax(torch.from_numpy(x.astype(float)), -1).numpy()
        assert np.allclose(computed(many, [x], shape), want, rtol=1e-5, atol=1e-6)


def parallel(func: tirx.PrimFunc) -> bool:
    return any(loop.kind == tirx.ForKind.PARALLEL for loop in walk(func.body, tirx.For))


def test_a_network_without_layers_is_tuned(tmp_path: Path) -> None:
    model, log = attention(tmp_path / "attention.onnx"), tmp_path / "log.jsonl"
    report = tvm_pivot.tune(model, log=log, trials=6)
    assert report.tasks and {task.kernel for task in report.tasks} == {KERNEL}
    records = read(log).records
    assert {record.task.kernel for record in records} == {KERNEL}
    stages = [record.decisions["stage"] for record in records]
    tasks = len(report.tasks)
    assert stages.count("rule") == tasks <= stages.count("final") <= 2 * tasks
    assert stages.count("search") > 0
    check(model, tvm_pivot.build(model, log=log))


class MadeUp:
    """Measures nothing: the rule's schedules take 2 ms, all others 1 ms."""

    def measure(self, artifacts: Sequence[str]) -> list[list[float] | str]:
        assert all(Path(artifact).exists() for artifact in artifacts)
        return [[2e-3 if Path(one).stem == "rule" else 1e-3] * 3 for one in artifacts]


def test_a_search_begins_with_what_earlier_ones_found(tmp_path: Path) -> None:
    log, machine = tmp_path / "log.jsonl", cast(LocalMachine, MadeUp())
    found = [record(FUNC, trace, 1e-4) for trace in [*traces(FUNC, 2), [[["Odd"]], []]]]
    told: list[tuple[int, float, float]] = []
    with FunctionSearch([job_of(FUNC).task], machine, 1, log, lambda *one: told.append(one)) as one:
        (job,) = one.jobs
        one.measure_rule(job)
        one.measure_known(job, [*found, found[0]])
        assert [seconds for _, seconds, _ in told] == [2e-3, 1e-3, 1e-3]
        assert job.times[""] == 2e-3 and job.trials == 3
        best, _, seconds = one.finish(job, 3, 1, 1.1)
    assert seconds == 1e-3
    stages = [record.decisions["stage"] for record in read(log).records]
    assert sorted(stages) == ["final", "rule", "search", "search"]
    assert (Selection(read(log).records).schedule(FUNC, "f", HOST) is not None) == bool(best)


def test_a_search_ends_when_it_is_told(tmp_path: Path) -> None:
    def stop() -> None:
        raise StopSearch("Ctrl-C")

    log = tmp_path / "log.jsonl"
    with FunctionSearch([job_of(FUNC).task], None, 1, log, lambda *_: None) as search:
        with pytest.raises(StopSearch, match="Ctrl-C"):
            search.run([], 8, 0, stop)
        search.run([], 0, 0, stop)  # nothing to do
    assert not log.exists()
    one = Search([], None, None, lambda *_: None)
    check = tuner._check(one, 0.5)
    check()
    one.stop = "Ctrl-C"
    with pytest.raises(StopSearch):
        check()


@pytest.mark.parametrize(("there", "kept"), [(0.8, True), (0.995, False), (0.0, False)])
def test_a_schedule_that_is_not_faster_in_its_network_goes(
    there: float, kept: bool, tmp_path: Path
) -> None:
    log, job = tmp_path / "log.jsonl", job_of(FUNC)
    job.traces["t"] = GOOD
    append(log, [job.record("t", [0.5], selection.FINAL)])
    found = tuner.TunedTask(("softmax3",), KERNEL, 9, 1.0, 0.5, job.decisions("t"))
    name = operator("softmax7")
    times = ({name: 2.0}, {name: 2.0 * there}) if there else ({}, {})
    task = tuner._confirmed_function(found, job, times, log)
    assert task.seconds == (there if kept else 1.0)
    used = Selection(read(log).records).schedule(FUNC, "softmax", HOST)
    assert (used is not None) == kept == bool(task.decisions)
