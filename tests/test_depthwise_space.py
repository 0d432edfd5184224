"""The tiles of depthwise convolutions: each computes the layer, and tuning finds and keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tuned_layers import AVX2, weights
from tvm import relax

import tvm_pivot
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.schedules.depthwise import depthwise_kernel
from tvm_pivot.schedules.depthwise_tiles import (
    DepthwiseProblem,
    DepthwiseTile,
    choose_depthwise,
    depthwise_problem,
    depthwise_space,
    tile_cycles,
)
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.targets import PRESETS, PivotTarget, missing_features, needed_features, resolve
from tvm_pivot.tuning import features
from tvm_pivot.tuning.log_files import append, read
from tvm_pivot.tuning.lookup import distance
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.search import Job
from tvm_pivot.tuning.selection import Selection, exported, stored_choice
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.trials import build_candidate
from tvm_pivot.tuning.tuner import model_tasks

EPS = float(np.finfo(np.float32).eps)
WIDE = PRESETS["x86-avx512"]
TARGETS = [t for t in (AVX2, WIDE) if not missing_features(needed_features(t))]


def layer_of(size: int = 14, kernel: int = 3, stride: int = 1, channels: int = 8) -> Layer:
    """A depthwise layer of one square image that keeps its size, but for the stride."""
    axis = AxisGeometry(size, kernel, stride, 1, kernel // 2, kernel // 2)
    geometry = ConvGeometry(1, channels, channels, axis, axis, channels)
    shape = (channels, 1, kernel, kernel)
    matrix = weights(channels, kernel**2, 1, 1.0)
    return Layer(relax.Var("conv"), "conv2d", shape, matrix, geometry)


def task_of(layer: Layer, target: PivotTarget = AVX2) -> LayerTask:
    plan = plan_layer(layer, target, sparse=True).plan
    assert plan.form == "depthwise"
    return LayerTask.of(layer, plan, Epilogue(low=0.0, high=6.0), target)


@st.composite
def problems(draw: Callable[[Any], Any]) -> tuple[DepthwiseProblem, PivotTarget, int]:
    """A problem, the machine, and which of its tiles."""
    axes = []
    for most, strides in ((3, 3), (3, 2)):
        kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
        before, after = draw(st.integers(0, most)), draw(st.integers(0, most))
        least = max(1, (kernel - 1) * dilation + 1 - before - after)
        size = least + draw(st.integers(0, 40))
        axes.append(
            AxisGeometry(size, kernel, draw(st.integers(1, strides)), dilation, before, after)
        )
    channels, multiplier = draw(st.integers(2, 3)), draw(st.integers(1, 2))
    geometry = ConvGeometry(
        draw(st.integers(1, 2)), channels, channels * multiplier, *axes, channels
    )
    epilogue = draw(st.sampled_from([Epilogue(), Epilogue(True, 0.0), Epilogue(low=0.0, high=6.0)]))
    target = draw(st.sampled_from(TARGETS))
    problem = depthwise_problem(geometry, epilogue, target)
    if problem is None:
        problem, geometry = depthwise_problem(layer_of(9).geometry, epilogue, target), None
        assert problem is not None
    return problem, target, draw(st.integers(0, 1 << 16))


def computed(
    problem: DepthwiseProblem, tile: DepthwiseTile, target: PivotTarget
) -> tuple[Any, ...]:
    """What a tile's kernel returns, what it should, and the magnitudes of its sums."""
    rng = np.random.default_rng(0)
    p = problem
    shapes = [(p.batch, p.channels, p.y.size, p.x.size), (p.rows, p.taps), (p.rows,)]
    shapes += [p.output] if p.epilogue.residual else []
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    out = tvm.runtime.tensor(np.full(p.output, np.nan, np.float32))
    func = depthwise_kernel(p, tile).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), target=target.to_tvm())
    library["main"](*map(tvm.runtime.tensor, arrays), out)

    def reference(x: Any, weight: Any, bias: Any, *residual: Any) -> Any:
        pads = ((0, 0), (0, 0), (p.y.before, p.y.after), (p.x.before, p.x.after))
        kernel = torch.tensor(weight.reshape(p.rows, 1, p.y.kernel, p.x.kernel).astype(float))
        image = torch.tensor(np.pad(x, pads).astype(float))
        how = {"stride": (p.y.stride, p.x.stride), "dilation": (p.y.dilation, p.x.dilation)}
        y = torch.conv2d(image, kernel, groups=p.channels, **how).numpy()
        return y + bias[:, None, None] + sum(residual)

    low, high = p.epilogue.low, p.epilogue.high
    want = np.clip(
        reference(*arrays), -np.inf if low is None else low, np.inf if high is None else high
    )
    return out.numpy(), want, reference(*map(np.abs, arrays))


SMALL = depthwise_problem(layer_of(7).geometry, Epilogue(True, 0.0), AVX2)
STRIDED = depthwise_problem(layer_of(31, 5, 2).geometry, Epilogue(), AVX2)


@settings(max_examples=30)
@given(problems())
@example((SMALL, AVX2, 3))
@example((STRIDED, AVX2, 11))
def test_any_tile_matches_float64(case: tuple[DepthwiseProblem, PivotTarget, int]) -> None:
    problem, target, which = case
    tiles = list(depthwise_space(problem, target))
    got, want, magnitude = computed(problem, tiles[which % len(tiles)], target)
    assert np.all(abs(got - want) <= 4 * (problem.taps + 2) * EPS * magnitude)


@pytest.mark.parametrize("lanes, size, stride", [(8, 9, 1), (16, 17, 2)])
def test_every_tile_computes_the_layer(lanes: int, size: int, stride: int) -> None:
    target = next((target for target in TARGETS if target.lanes == lanes), None)
    if target is None:
        pytest.skip(f"this machine has no vectors of {lanes} floats")
    geometry = layer_of(size, 3, stride, channels=2).geometry
    problem = depthwise_problem(geometry, Epilogue(True), target)
    assert problem is not None
    tiles = list(depthwise_space(problem, target))
    assert len(set(tiles)) == len(tiles) > 5
    for tile in tiles:
        got, want, magnitude = computed(problem, tile, target)
        assert np.all(abs(got - want) <= 4 * 11 * EPS * magnitude), tile


@pytest.mark.parametrize("target", [AVX2, WIDE, PRESETS["cortex-a76"]], ids=lambda t: t.name)
@pytest.mark.parametrize("size, kernel, stride", [(7, 3, 1), (14, 5, 2), (112, 3, 2)])
def test_the_rule_is_the_first_point(
    size: int, kernel: int, stride: int, target: PivotTarget
) -> None:
    task = task_of(layer_of(size, kernel, stride), target)
    problem = DepthwiseProblem.of(task.geometry, task.epilogue)
    assert next(iter(task.choices)) == task.rule
    assert task.rule.tile == choose_depthwise(problem, task.target)
    assert len(task.choices) > 3
    assert {choice.form for choice in task.choices} == {"depthwise"}
    assert Choice.of(task.rule.decisions()) == task.rule
    assert all(choice.tile.lanes <= target.lanes for choice in task.choices)  # type: ignore[union-attr]


def test_what_is_computed_or_read_twice_counts() -> None:
    problem = depthwise_problem(layer_of(16).geometry, Epilogue(), AVX2)
    assert problem is not None

    def cycles(lanes: int, vectors: int, rows: int) -> float:
        return tile_cycles(problem, DepthwiseTile(lanes, vectors, rows, False), AVX2)

    assert cycles(8, 1, 8) < cycles(8, 1, 4) < cycles(8, 1, 1)
    assert cycles(8, 1, 8) < cycles(8, 1, 7)  # three blocks of 7 rows
    assert cycles(8, 1, 8) < cycles(4, 1, 8)
    assert cycles(8, 1, 8) == cycles(8, 2, 8)


def test_features_tell_tiles_apart() -> None:
    task = task_of(layer_of(28))
    key = task.key
    rows = {
        features.features(key.problem, key.entries, choice, None, AVX2).tobytes()
        for choice in task.choices
    }
    assert {len(row) for row in rows} == {4 * features.COUNT}
    assert len(rows) == len(task.choices)
    assert features.predict(key.problem, key.entries, task.rule, AVX2) == 1.0
    other = max(task.choices, key=lambda choice: task.choices[choice])
    known = task.choices[other] / task.choices[task.rule]
    assert features.predict(key.problem, key.entries, other, AVX2) == pytest.approx(known)
    assert features.predict({"odd": 1}, 9, task.rule, AVX2) is None
    row = features.features({"odd": 1}, 9, task.rule, None, AVX2)
    assert row.size == features.COUNT


def test_seeds_are_of_several_sorts() -> None:
    seeds = Job(task_of(layer_of(28))).seeds([])
    assert len({(c.tile.lanes, c.tile.vectors) for c in seeds}) > 2  # type: ignore[union-attr]


def final(task: LayerTask, choice: Choice, seconds: float = 1.0) -> TuningRecord:
    decisions = {"choice": choice.decisions(), "stage": "final"}
    return TuningRecord.now(task.key, decisions, [seconds])


def test_a_record_is_found_for_its_task_and_for_similar_ones(tmp_path: Path) -> None:
    task, log = task_of(layer_of(28)), tmp_path / "log.jsonl"
    chosen = list(task.choices)[4]
    append(log, [final(task, chosen)])
    records = exported(read(log).fresh)
    assert [stored_choice(record) for record in records] == [chosen]

    def choose(layer: Layer) -> Any:
        own = task_of(layer)
        return Selection(records).choose(own.layer, own.plan, own.epilogue, own.target)

    _, choice, told = choose(layer_of(28))
    assert (choice, told) == (chosen, "by records of the same tasks")
    _, choice, told = choose(layer_of(28, channels=16))
    assert (choice, told) == (chosen, "by records of similar tasks")
    assert choose(layer_of(28, kernel=5)) is None
    assert choose(layer_of(28, stride=2)) is None
    assert distance(task.key, task_of(layer_of(28, channels=16)).key) == pytest.approx(1.0)


def test_a_tile_that_is_not_possible_is_ignored_with_one_line() -> None:
    task = task_of(layer_of(28))
    odd = replace(task.rule, tile=DepthwiseTile(8, 9, 3, False))
    one = Selection([final(task, odd)])
    assert one.choose(task.layer, task.plan, task.epilogue, task.target) is None
    assert one.notes == ["tuning record of conv ignored: its tile is not possible here"]


def test_a_candidate_is_built_with_its_weights(tmp_path: Path) -> None:
    task = task_of(layer_of(9))
    path = Path(build_candidate(task, task.rule.decisions(), str(tmp_path), "one"))
    stored = json.loads(path.with_suffix(".json").read_text())
    assert [table for *_, table in stored] == [None, "weight", "bias", None]
    with np.load(path.with_suffix(".npz")) as tables:
        assert np.array_equal(tables["weight"], task.matrix)


def mobile(path: Path, size: int = 20) -> Path:
    """An ONNX file: two inverted residuals, as in MobileNetV2, and the head."""
    rng = np.random.default_rng(3)
    nodes: list[Any] = []
    constants: list[Any] = []

    def conv(x: str, outputs: int, columns: int, kernel: int, name: str, groups: int = 1) -> str:
        dense = groups > 1
        matrix = weights(outputs, columns * kernel**2, 1 if dense else 8, 1.0 if dense else 0.3)
        w = (matrix / np.float32(columns)).reshape(outputs, columns, kernel, kernel)
        bias = rng.standard_normal(outputs).astype(np.float32)
        constants.extend(
            [numpy_helper.from_array(w, f"{name}.w"), numpy_helper.from_array(bias, f"{name}.b")]
        )
        inputs = [x, f"{name}.w", f"{name}.b"]
        how = {"pads": [kernel // 2] * 4, "kernel_shape": [kernel, kernel], "group": groups}
        nodes.append(helper.make_node("Conv", inputs, [name], name=name, **how))
        return name

    def relu6(x: str) -> str:
        nodes.append(helper.make_node("Clip", [x, "zero", "six"], [f"{x}.r"]))
        return f"{x}.r"

    constants += [numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0), ("six", 6))]
    x = "x"
    for block in range(2):
        wide = relu6(conv(x, 24, 8, 1, f"expand{block}"))
        deep = relu6(conv(wide, 24, 1, 3, f"depthwise{block}", groups=24))
        narrow = conv(deep, 8, 24, 1, f"project{block}")
        nodes.append(helper.make_node("Add", [x, narrow], [f"sum{block}"]))
        x = f"sum{block}"
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["y"]))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 8, size, size))
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 8, 1, 1))
    graph = helper.make_graph(nodes, "mobile", [given], [made], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def test_a_mobile_network_is_tuned_and_says_so(tmp_path: Path) -> None:
    model, log = mobile(tmp_path / "mobile.onnx"), tmp_path / "log.jsonl"
    report = tvm_pivot.tune(model, log=log, trials=1)
    kernels = {task.kernel: task for task in report.tasks}
    assert len(kernels["depthwise"].layers) == 2
    assert kernels["depthwise"].decisions["form"] == "depthwise"
    best = tmp_path / "best.jsonl"
    append(best, exported(read(log).fresh))
    x = np.random.default_rng(0).standard_normal((1, 8, 20, 20)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(str(model)).run(None, {"x": x})
    for path in (log, best):
        net = tvm_pivot.build(model, log=path)
        assert {layer.tuned for layer in net.report.layers} == {"by records of the same tasks"}
        assert np.allclose(net.run(x), want, rtol=0, atol=1e-4 * abs(want).max())


def test_a_build_makes_the_kernel_of_a_record(tmp_path: Path) -> None:
    """Whatever tile a record names, the network computes the same."""
    model, host = mobile(tmp_path / "mobile.onnx"), resolve("x86")
    (task,) = (t for t in model_tasks(model, host) if t.key.kernel == "depthwise")
    x = np.random.default_rng(0).standard_normal((1, 8, 20, 20)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(str(model)).run(None, {"x": x})
    for i, choice in enumerate(list(task.choices)[1:9:3]):
        log = tmp_path / f"{i}.jsonl"
        append(log, [final(task, choice)])
        net = tvm_pivot.build(model, log=log)
        deep = [layer for layer in net.report.layers if "depthwise" in layer.kernel]
        assert [layer.tuned for layer in deep] == ["by records of the same tasks"] * 2
        assert np.allclose(net.run(x), want, rtol=0, atol=1e-4 * abs(want).max())
