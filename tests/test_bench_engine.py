"""Comparing runtimes: what is wrong is caught, what crashes is reported, nothing is left over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import bench_runtimes
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_pivot.bench.conversion import convert_all
from tvm_pivot.bench.measure import compare, measure_model
from tvm_pivot.bench.models import ModelInput, name_models
from tvm_pivot.bench.reference import Reference
from tvm_pivot.bench.results import Comparison, Noise, Result
from tvm_pivot.bench.rounds import Contender, Plan, take_turns, too_many_cores
from tvm_pivot.bench.specs import resolve
from tvm_pivot.errors import InputError

PLAN = Plan(rounds=2, turn_ms=1.0, most_calls=5, lead_ms=0.0, warm_ms=0.0, timeout_s=120.0)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def text(name: str) -> str:
    """What a user writes for a class of `bench_runtimes`."""
    return f"{bench_runtimes.__file__}:{name}"


def save(path: Path, nodes: Sequence[Any], y: Sequence[int], **weights: Any) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> ModelInput:
    """What the classes of `bench_runtimes` compute."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    path = save(tmp_path / "tiny.onnx", nodes, [1, 4], w=bench_runtimes.WEIGHTS)
    return name_models([path])[0]


def measure(
    model: ModelInput, *names: str, plan: Plan = PLAN, **options: Any
) -> tuple[dict[str, Result], list[Noise]]:
    """Results by runtime."""
    specs = resolve([text(name) for name in names])
    folder = model.path.parent
    converted = convert_all([(model, spec) for spec in specs], ["fp32"], folder / "converted")
    reference = Reference.of(model.path, folder)
    results, noise = measure_model(model, specs, converted, reference, plan=plan, **options)
    assert [result.runtime for result in results] == [s.name for s in specs]
    return {result.runtime: result for result in results}, noise


TIMES = ("median_ms", "min_ms", "spread", "load_s", "first_run_ms", "peak_memory_mb")


def test_a_right_runtime_is_measured(model: ModelInput) -> None:
    results, noise = measure(model, "Right", "Talks")
    for result in results.values():
        assert result.status == "ok", result.detail
        assert all(getattr(result, field) is not None for field in TIMES)
        assert result.calls >= PLAN.rounds
        assert 0 < cast(float, result.min_ms) <= cast(float, result.median_ms)
        assert cast(float, result.max_error) < 1e-5
        assert cast(float, result.peak_memory_mb) > cast(float, result.model_memory_mb) >= 0
        assert {s.name: s.value for s in result.settings} == {"threads": "1", "OMP": "1"}
        assert result.version == "1.0"
        assert result.file_mb == pytest.approx(model.path.stat().st_size / 1e6)
    (of_first,) = noise
    assert (of_first.runtime, of_first.model) == ("right", "tiny")
    assert of_first.ratio > 0


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("Zeros", "off by 1, 0.005 is allowed"),
        ("Slightly", "off by 0.01, 0.005 is allowed"),
        ("Stale", "off by "),
        ("NotFinite", "'y' holds values that are not finite"),
        ("Shape", r"'y' has shape \[4\], not \[1, 4\]"),
        ("OtherName", "'y' is missing"),
        ("Lazy", "off by "),
        ("Deferred", r"run\(\) took 0.000 s and reading outputs 0.0"),
    ],
)
def test_a_wrong_runtime_is_caught(model: ModelInput, name: str, detail: str) -> None:
    results, noise = measure(model, name)
    (result,) = results.values()
    assert result.status == "wrong"
    assert re.search(detail, result.detail), result.detail
    assert all(getattr(result, field) is None for field in TIMES)
    if "off by" in detail:
        assert cast(float, result.max_error) > 1e-3
    assert noise == []


def test_a_runtime_that_uses_more_threads_than_asked_for_is_wrong(model: ModelInput) -> None:
    results, _ = measure(model, "Counted", "Greedy")
    counted, greedy = results.values()
    assert (counted.status, counted.detail) == ("wrong", "used 2.0 cores, 1 asked for")
    assert counted.cores_used == pytest.approx(2.0, abs=0.05)
    assert counted.median_ms is None
    # On one processor, or a busy machine, it gets no more than it asked for.
    assert (greedy.status == "wrong") == (cast(float, greedy.cores_used) > 1.2), greedy.detail


def test_how_many_cores_are_too_many() -> None:
    assert too_many_cores(1.9, 1.0, 1)
    assert not too_many_cores(1.15, 1.0, 1)
    assert not too_many_cores(2.2, 1.0, 2)
    assert too_many_cores(3.0, 1.0, 2)
    assert not too_many_cores(0.03, 0.01, 1), "too short to tell"


def test_crashes_and_errors_stop_nobody_else(model: ModelInput) -> None:
    names = ("CrashPrepare", "CrashRun", "Raises", "Refuses", "Missing", "Right")
    results, noise = measure(model, *names)
    assert results["crash-prepare"].detail == (
        "prepare: the process ended with exit code 3; it printed: something / the last words"
    )
    assert results["crash-run"].detail == "time: the process ended with exit code -11 (SIGSEGV)"
    assert results["raises"].detail == "SystemExit: a converter's way to say no"
    assert {results[name].status for name in ("crash-prepare", "crash-run", "raises")} == {"failed"}
    assert (results["refuses"].status, results["refuses"].detail) == ("unsupported", "no Relu here")
    assert results["refuses"].version == "1.0"
    assert results["missing"].status == "missing"
    assert results["missing"].detail == "pip install 'no-such-package>=1'"
    assert results["missing"].version == ""
    assert results["right"].status == "ok"
    assert [n.runtime for n in noise] == ["right"], "the first that works"


def test_a_runtime_that_hangs_fails(model: ModelInput) -> None:
    plan = Plan(rounds=1, warm_ms=0.0, timeout_s=3.0)
    (result,) = measure(model, "Hangs", plan=plan)[0].values()
    assert result.status == "failed"
    assert result.detail.endswith(": no answer within 3 s")


def test_turns_rotate() -> None:
    order: list[tuple[int, str]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def turn(self, number: int) -> None:
            order.append((number, self.name))

    rounds: list[int] = []
    players = cast(Sequence[Contender], [Recorder(name) for name in "abc"])
    take_turns(players, Plan(rounds=3), rounds.append)
    assert rounds == [0, 1, 2, 3]
    assert ["".join(n for r, n in order if r == number) for number in rounds] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


def test_slow_runtimes_take_fewer_turns(model: ModelInput) -> None:
    plan = Plan(rounds=5, turn_ms=1, most_calls=3, warm_ms=0, most_seconds=1e-9)
    (result,) = measure(model, "Right", plan=plan)[0].values()
    assert 2 <= result.calls <= 2 * plan.most_calls


def test_ctrl_c_leaves_no_process(model: ModelInput) -> None:
    def press(line: str) -> None:
        if "round 1" in line or "converting" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, "Right", "Spins", progress=press)
    specs = resolve([text("Converts")])
    with pytest.raises(KeyboardInterrupt):
        convert_all([(model, spec) for spec in specs], ["fp32"], model.path.parent, progress=press)


def test_conversions_are_kept(
    model: ModelInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    monkeypatch.setenv("TEST_CONVERSIONS", str(made))
    specs, folder = resolve([text("Converts")]), tmp_path / "kept"

    def convert(*precisions: str) -> list[str]:
        done = convert_all([(model, spec) for spec in specs], precisions, folder, jobs=2, cores=2)
        for (_, _, precision), converted in done.items():
            assert converted.status == "ok", converted.detail
            assert precision in str(converted.files[0])
            assert cast(float, converted.seconds) > 0
        return made.read_text().splitlines()

    assert convert("fp32") == ["tiny.onnx fp32"]
    assert convert("fp32") == ["tiny.onnx fp32"]
    assert sorted(convert("fp32", "bf16")) == ["tiny.onnx bf16", "tiny.onnx fp32"]
    for record in folder.glob("*/*fp32*/converted.json"):
        record.unlink()  # as if it had been interrupted
    assert len(convert("fp32", "bf16")) == 3
    changed = onnx.load(str(model.path))
    changed.graph.initializer[0].raw_data = (bench_runtimes.WEIGHTS * 2).tobytes()
    onnx.save(changed, str(model.path))
    model = replace(model)  # a description knows its file as it was when it was first asked
    assert len(convert("fp32")) == 4


def test_precisions_are_groups(model: ModelInput, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_CONVERSIONS", str(model.path.with_name("made")))
    runtimes = [text("Right"), text("Converts")]
    both = compare([model], runtimes, precisions=["fp32", "bf16"], plan=PLAN)
    found = [(r.runtime, r.precision, r.status) for r in both.results]
    assert found == [
        ("right", "fp32", "ok"),
        ("converts", "fp32", "ok"),
        ("converts", "bf16", "ok"),
    ]
    assert 5e-2 > cast(float, both.results[2].max_error) > 1e-3
    assert both.results[2].file_mb == 2.0
    assert {s.name: s.value for s in both.tolerances} == {"fp32": "0.005", "bf16": "0.05"}
    only = compare([model], runtimes, precisions=["bf16"], threads=[1, 2], plan=PLAN)
    right, converts, right_2, _ = only.results
    assert (right.status, right.detail) == ("unsupported", "computes in fp32 only")
    assert (converts.status, converts.threads, right_2.threads) == ("ok", 1, 2)


def test_a_comparison_of_real_runtimes(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    weights[:, 1:] = 0
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "net.onnx", nodes, [1, 4], w=weights)
    lines: list[str] = []
    found = compare([path], ["onnxruntime"], plan=PLAN, progress=lines.append, command="again")
    (result,) = found.results
    assert result.status == "ok", result.detail
    (facts,) = found.models
    assert (facts.name, facts.network, facts.variant) == ("net", "net", "")
    assert (facts.density, facts.flops_dense, facts.flops_kept) == (0.25, 64, 16)
    assert len(facts.sha256) == 64
    assert found.reference.startswith("ONNX Runtime ")
    assert found.command == "again"
    assert found.machine.cores >= 1 and found.machine.cpu
    assert Comparison.from_json(found.to_json()) == found
    assert lines[-1] == "net, 1 thread, fp32: round 2 of 2"


def test_a_model_that_cannot_be_imported_is_compared_all_the_same(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Det", ["s"], ["d"]),
        helper.make_node("Mul", ["h", "d"], ["y"]),
    ]
    square = np.eye(2, dtype=np.float32)
    path = save(tmp_path / "odd.onnx", nodes, [1, 4], w=bench_runtimes.WEIGHTS, s=square)
    found = compare([path], ["onnxruntime"], plan=PLAN)
    assert found.results[0].status == "ok", found.results[0].detail
    (facts,) = found.models
    assert (facts.pattern, facts.flops_dense) == ("unknown", 0)
    assert facts.density == pytest.approx(34 / 36)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("tensorrt", "there is no runtime 'tensorrt'; there are pivot, pivot-dense, onnxruntime"),
        ("nowhere.py:Mine", "cannot load Mine from .*nowhere.py: FileNotFoundError"),
        (text("Nobody"), "cannot load Nobody from .*AttributeError"),
        (text("compute"), "not a class made from tvm_pivot.bench.runtimes.protocol.Runtime"),
        (text("Runtime"), "must define name, title, environment, bind, outputs, prepare, run"),
    ],
)
def test_unknown_runtimes(model: ModelInput, runtime: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare([model], [runtime])


def test_wrong_options(model: ModelInput, tmp_path: Path) -> None:
    runtimes = [text("Right")]
    with pytest.raises(InputError, match="there is no precision 'int8'; say fp32 or bf16"):
        compare([model], runtimes, precisions=["int8"])
    with pytest.raises(InputError, match="numbers of threads from 1 on"):
        compare([model], runtimes, threads=[0])
    with pytest.raises(InputError, match="at least one round"):
        compare([model], runtimes, plan=Plan(rounds=0))
    with pytest.raises(InputError, match="there is no file"):
        compare([tmp_path / "none.onnx"], runtimes)
    with pytest.raises(InputError, match="two models are called 'tiny'"):
        compare([model, model], runtimes)
    assert [m.name for m in name_models([model.path, model.path])] == ["tiny", "tiny-2"]
