"""The space of a layer's kernels: every point of it computes the layer, and searches stay in it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_layers import AVX2, conv_layer, convolved, dense_layer, task_of
from tvm import s_tir

from tvm_pivot.schedules.choices import Choice, nearest
from tvm_pivot.schedules.problems import Epilogue, PlanesTile, RowsTile
from tvm_pivot.targets import PRESETS
from tvm_pivot.tuning import features
from tvm_pivot.tuning.artifacts import arguments_of, contents_of
from tvm_pivot.tuning.space import (
    MakePossible,
    MutateDecision,
    Points,
    candidate,
    choice_of,
    task_module,
)
from tvm_pivot.tuning.trials import build_candidate, measure_candidates

EPS = float(np.finfo(np.float32).eps)
PLANES = Choice("planes", 8, PlanesTile(8, 3, 1, 1, False))
ROWS = Choice("rows", 16, RowsTile(2, False), own_columns=True, window=2)


@pytest.mark.parametrize("choice", [PLANES, replace(PLANES, band_rows=4, keep_all=True), ROWS])
def test_a_choice_is_what_its_decisions_say(choice: Choice) -> None:
    assert Choice.of(choice.decisions()) == choice
    assert all(type(v) is int for k, v in choice.decisions().items() if k != "form")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "other"}, "no kernel has the form 'other'"),
        ({"vectors": -1}, "whole numbers"),
        ({"vectors": 1.5}, "whole numbers"),
        ({"vectors": True}, "whole numbers"),
        ({"more": 1}, "not the decisions of a planes kernel: more"),
        ({"form": "rows"}, "not the decisions of a rows kernel"),
    ],
)
def test_other_decisions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice.of({**PLANES.decisions(), **changes})


LAYERS = {
    "3x3": conv_layer(),
    "strided": conv_layer(size=10, stride=2),
    "1x1": conv_layer(channels=24, kernel=1),
    "matrix-vector": dense_layer(),
    "dense": dense_layer(rows=20),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512"])
def test_the_rule_is_the_first_point(name: str, target: str) -> None:
    task = task_of(LAYERS[name], PRESETS[target])
    assert next(iter(task.choices)) == task.rule
    assert len(task.choices) > 5
    forms = {choice.form for choice in task.choices}
    assert forms == {task.plan.form}


def sample(task: Any, count: int) -> list[Choice]:
    """Points of every sort that a space has, and others."""
    by_sort: dict[object, Choice] = {}
    for choice in task.choices:
        tile: Any = choice.tile
        panel = isinstance(tile, PlanesTile) and (tile.panel, tile.k_tiles > 1)
        sort = (choice.block_rows, choice.keep_all, choice.own_columns, choice.window)
        by_sort.setdefault((*sort, choice.band_rows > 0, panel), choice)
    chosen = list(by_sort.values())
    random.Random(0).shuffle(chosen)
    return [task.rule, *chosen[:count]]


def run(task: Any, choice: Choice, folder: Path) -> tuple[dict[str, Any], Any]:
    """A candidate's tables and images, and what it computes from them."""
    name = str(len(list(folder.iterdir())))  # libraries of one name are loaded once
    path = Path(build_candidate(task, choice.decisions(), str(folder), name))
    arguments = arguments_of(path)
    contents = contents_of(path, arguments)
    rng = np.random.default_rng(1)
    arrays = [
        rng.standard_normal(shape).astype(dtype) if content is None else content
        for (dtype, shape), content in zip(arguments, contents, strict=True)
    ]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    tvm.runtime.load_module(str(path))["main"](*tensors)
    with np.load(path.with_suffix(".npz")) as tables:
        stored = {name: tables[name] for name in tables.files}
    return {"x": arrays[0], **stored}, tensors[-1].numpy()


def bias_of(tables: dict[str, Any], rows: int) -> Any:
    bias = np.empty(rows, np.float32)
    bias[tables["rows"]] = tables["bias"]
    return bias


@pytest.mark.parametrize("name", ["3x3", "strided", "1x1"])
def test_every_sort_of_point_computes_the_convolution(name: str, tmp_path: Path) -> None:
    layer = LAYERS[name]
    task, g = task_of(layer), layer.geometry
    for choice in sample(task, 9):
        found, y = run(task, choice, tmp_path)
        x = found["x"].reshape(1, g.channels, g.y.size, g.x.size)
        bias = bias_of(found, g.outputs)
        want = np.maximum(convolved(layer, x, bias), 0.0)
        absolute = replace(layer, matrix=abs(layer.matrix))
        magnitude = convolved(absolute, abs(x), abs(bias))
        error = abs(y.reshape(want.shape) - want)
        assert np.all(error <= 4 * layer.matrix.shape[1] * EPS * magnitude), choice


def test_every_point_of_a_matrix_vector_layer_computes_it(tmp_path: Path) -> None:
    layer = LAYERS["matrix-vector"]
    task = task_of(layer, epilogue=Epilogue())
    for choice in sample(task, 6):
        found, y = run(task, choice, tmp_path)
        x, bias = found["x"], bias_of(found, layer.matrix.shape[0])
        want = x.astype(float) @ layer.matrix.T.astype(float) + bias
        assert np.allclose(y, want, rtol=0, atol=1e-4), choice


def test_stretches_that_no_time_is_charged_for_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on virtual machines: time that the host took before is taken off a later stretch."""
    task = task_of(LAYERS["dense"])
    artifact = build_candidate(task, task.rule.decisions(), str(tmp_path), "rule")
    readings = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(readings) // 3 * 1e-3)
    (seconds,) = measure_candidates([artifact], task.target.l2_bytes, 12, 1e-5)
    assert len(seconds) == 12
    assert min(seconds) > 0


POINTS = Points(task_of(LAYERS["3x3"]).choices)
NUMBERS = st.integers(min_value=0, max_value=1 << 12)


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(POINTS.names, NUMBERS)))
def test_any_decisions_have_a_nearest_point(wanted: dict[str, int]) -> None:
    found = POINTS.nearest(wanted)
    assert found in POINTS.choices
    assert POINTS.nearest(found.decisions()) == found


def test_the_most_important_decision_is_kept() -> None:
    wanted = {**PLANES.decisions(), "block_rows": 4, "vectors": 100}
    some = [choice.decisions() for choice in POINTS.choices]
    found = POINTS.choices[nearest(some, wanted)]
    assert found.block_rows == 4
    most = max(one["vectors"] for one in some if one["block_rows"] == 4)
    assert isinstance(found.tile, PlanesTile) and found.tile.vectors <= most


def test_sampled_candidates_are_points_and_equal_ones_are_equal_modules() -> None:
    task = task_of(LAYERS["3x3"])
    seen: dict[Choice, Any] = {}
    make = MakePossible(POINTS)
    for seed in range(1, 40):
        sch = s_tir.Schedule(task_module(task.key), seed=seed)
        POINTS.sample(sch)
        sch.enter_postproc()
        assert make.apply(sch)
        choice = choice_of(sch.mod)
        assert choice in task.choices
        known = seen.setdefault(choice, sch.mod)
        assert tvm_ffi.structural_equal(known, sch.mod)
        assert tvm_ffi.structural_equal(candidate(task, POINTS, choice).mod, sch.mod)
    assert len(seen) > 5


def sampled(trace: Any) -> list[int]:
    """Its decisions, in order."""
    insts = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]
    return [int(trace.get_decision(inst)) for inst in insts]


def test_combinations_that_are_no_point_stand_for_each_point_equally() -> None:
    draw = random.Random(0)
    draws = [[draw.choice(values) for values in POINTS.values.values()] for _ in range(20_000)]
    known = {tuple(row): POINTS.choices[i] for i, row in enumerate(POINTS._numbers.tolist())}
    none = [values for values in draws if tuple(values) not in known]
    count = Counter(POINTS.meant(values) for values in none)
    expected = len(none) / len(POINTS.choices)
    assert len(none) > len(draws) / 2 and expected > 20
    assert len(count) == len(POINTS.choices)
    assert max(count.values()) < 3 * expected
    assert all(POINTS.meant(row) == choice for row, choice in known.items())


def test_a_mutation_changes_one_decision_and_what_must_follow() -> None:
    task = task_of(LAYERS["3x3"])
    sch = candidate(task, POINTS, task.rule)
    before = sampled(sch.trace)
    assert before == POINTS.places(task.rule)
    mutate = MutateDecision(POINTS, 0)
    points = {tuple(POINTS.places(choice)): choice for choice in POINTS.choices}
    alone = set()
    for _ in range(60):
        after = tuple(sampled(mutate.apply(sch.trace)))
        assert after in points and points[after] != task.rule
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        alone |= {changed[0]} if len(changed) == 1 else set()
        # Had one of them a point of its own, the others would not have changed.
        ones = [(*before[:i], after[i], *before[i + 1 :]) for i in changed]
        assert len(changed) == 1 or not all(one in points for one in ones)
    assert len(alone) > 3


def test_a_space_of_one_point_has_no_mutations() -> None:
    task = task_of(LAYERS["3x3"])
    points = Points([task.rule])
    sch = candidate(task, points, task.rule)
    assert MutateDecision(points, 0).apply(sch.trace) is None


def test_modules_say_which_task_they_are() -> None:
    one, other = task_of(LAYERS["3x3"]), task_of(LAYERS["1x1"])
    renamed = replace(one.key, target=replace(one.key.target, name="mine"))
    assert tvm_ffi.structural_equal(task_module(one.key), task_module(renamed))
    assert not tvm_ffi.structural_equal(task_module(one.key), task_module(other.key))


@pytest.mark.parametrize("name", LAYERS)
def test_features_are_as_many_for_every_point(name: str) -> None:
    task = task_of(LAYERS[name])
    rows = {
        features.features(task.key.problem, task.key.entries, choice, 1.0, AVX2).tobytes()
        for choice in task.choices
    }
    assert {len(row) for row in rows} == {4 * features.COUNT}
    assert len(rows) > len(task.choices) // 2  # they tell most points apart


def test_predictions_for_records_of_other_tasks_are_those_of_the_space() -> None:
    task = task_of(LAYERS["3x3"])
    rule = features.predict(task.key.problem, task.key.entries, task.rule, AVX2)
    assert rule is not None and 0.9 < rule < 1.5
    other = replace(task.rule, block_rows=2)
    assert features.predict(task.key.problem, task.key.entries, other, AVX2) is None
    assert features.predict({"odd": 1, "block_rows": 8}, 10, task.rule, AVX2) is None
