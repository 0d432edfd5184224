"""Tuning in batches: built here, measured on an emulated GPU by the script of the batch, read back.

Nothing here depends on what was measured: the emulated GPU's clock stands still, and where times
matter they are made up.
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cuda_emulation import emulated_gpu, scratch
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_layers import conv_layer, dense_layer, network, task_of, weights
from tvm import relax
from typer.testing import CliRunner

import tvm_pivot
from tvm_pivot.cli import app
from tvm_pivot.errors import TuningError
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.cuda_kernels import cuda_points
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.targets import PRESETS
from tvm_pivot.tuning import batch, on_gpu
from tvm_pivot.tuning.batch_results import read_batch
from tvm_pivot.tuning.log_files import read
from tvm_pivot.tuning.on_gpu.measure import loaded, random_values, stored
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.search import Job
from tvm_pivot.tuning.selection import Selection
from tvm_pivot.tuning.wanted import wanted_outputs

__all__ = ["emulated_gpu"]

H100 = replace(PRESETS["h100"], precision="float16")


def tune(*args: object) -> Any:
    done = CliRunner().invoke(app, ["tune", *map(str, args)])
    assert done.exit_code == 0, done.output
    return done.stdout


def measured(folder: Path) -> tuple[dict[str, Any], str]:
    """What a batch's script finds in a process of its own, which has no TVM but the batch's."""
    results = folder.with_suffix(".json")
    command = [sys.executable, "-S", str(folder / "measure.py"), "--json", str(results)]
    numpy_home = Path(np.__file__).parents[1]
    env = os.environ | {"LD_LIBRARY_PATH": str(scratch()), "PYTHONPATH": str(numpy_home)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text()), done.stdout


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are built in this process, where the emulator is."""
    monkeypatch.setattr(batch, "workers", lambda: 1)


def test_from_a_model_to_a_build_that_uses_what_was_measured(
    emulated_gpu: None, one_process: None, tmp_path: Path
) -> None:
    model, log, folder = network(tmp_path / "m.onnx"), tmp_path / "log.jsonl", tmp_path / "batch"
    how = ("--target", "cuda", "--log", log, "--pivot-seconds", 0, "--trials", 10)
    said = tune(model, *how, "--batch-out", folder)
    assert "10 candidates of 2 kinds of layers" in said and "--batch-in results.json" in said
    stated = json.loads((folder / "batch.json").read_text())
    spoiled, crashing = stated["tasks"][0]["candidates"][1:3]
    spoiled["arguments"][3][2] = spoiled["arguments"][0][2]  # the input in place of the weights
    crashing["function"] = "nothing"
    (folder / "batch.json").write_text(json.dumps(stated))
    results, said = measured(folder)
    first = results["tasks"][0]["candidates"]
    reasons = [one["failed"] for one in first]
    assert "wrong results" in reasons[1] and "has no function nothing" in reasons[2]
    assert not any(reasons[:1] + reasons[3:]) and "2 failed; rule" in said
    path = tmp_path / "results.json"
    for task in results["tasks"]:  # the last candidate is twice as fast as the rule's
        compared = [task["candidates"][0], task["candidates"][-1]]
        task["again"] = [{**compared[0], "seconds": [2e-6]}, {**compared[1], "seconds": [1e-6]}]
    path.write_text(json.dumps(results))
    said = tune("--log", log, "--batch-in", path)
    assert "2.00x over layers" in said and "measured on emulated GPU (sm_90)" in said
    assert "2 candidates failed" in said and "is not what the target cuda describes" in said
    net = tvm_pivot.build(model, target="cuda", log=log, pivot_seconds=0)
    assert {layer.tuned for layer in net.report.layers} == {"by records of the same tasks"}
    x = np.random.default_rng(0).standard_normal((1, 8, 12, 12)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(str(model)).run(None, {"x": x})
    assert np.allclose(net.run(x), want, rtol=0, atol=1e-3 * abs(want).max())
    again = read(log)
    read_batch(path, log)
    assert read(log).records == again.records  # results that are read twice add nothing


def test_a_machine_without_a_gpu_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "batch.json").write_text(
        json.dumps(results_of(TASK, [timed(TASK.rule, 1.0)], []) | {"spacing": 0})
    )
    (tmp_path / "measure.py").write_text(batch.START)
    shutil.copytree(Path(on_gpu.__file__).parent, tmp_path / "on_gpu")
    command = [sys.executable, tmp_path / "measure.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("conv: OSError: lib")


def odd_layers() -> list[tuple[Layer, Epilogue]]:
    """A strided convolution of channel groups, several input rows, and one."""
    axis, other = AxisGeometry(7, 3, 2, 1, 1, 1), AxisGeometry(9, 3, 1, 2, 2, 1)
    geometry = ConvGeometry(2, 8, 16, axis, other, 2)
    grouped = Layer(
        relax.Var("grouped"), "conv2d", (16, 4, 3, 3), weights(16, 36, 8, 0.3), geometry
    )
    everything = Epilogue(residual=True, low=-0.5, high=1.5)
    plain = [
        replace(dense_layer(64, 32, rows, 0.3), var=relax.Var(f"rows{rows}")) for rows in (40, 3)
    ]
    return [
        (grouped, everything),
        (conv_layer(), Epilogue(low=0.0)),
        *((layer, everything) for layer in plain),
    ]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "tf32"])
def test_every_candidate_computes_its_layer(
    precision: str,
    emulated_gpu: None,
    one_process: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a100 = replace(PRESETS["a100"], precision=precision)  # the emulator has no clusters
    tasks = [task_of(layer, a100, epilogue) for layer, epilogue in odd_layers()]
    monkeypatch.setattr(batch, "model_tasks", lambda *_, **__: tasks)

    def some(job: Job, *_: Any) -> list[Choice]:
        pick, forms = random.Random(0), {choice.form for choice in job.task.choices}
        alike = [[c for c in job.task.choices if c.form == form] for form in sorted(forms)]
        return [job.task.rule, *(c for same in alike for c in pick.sample(same, 1))]

    monkeypatch.setattr(batch, "propose", some)
    batch.write_batch("", a100, tmp_path / "batch", log=tmp_path / "log.jsonl", precision=precision)
    results, _ = measured(tmp_path / "batch")
    candidates = [one for task in results["tasks"] for one in task["candidates"]]
    assert [one["failed"] for one in candidates if one["failed"]] == []
    assert len(results["tasks"]) == 4 and len(candidates) >= 12
    forms = {one["decisions"]["form"] for one in candidates}
    assert forms == {"cuda_planes", "cuda_rows", "tensor_cores"}


def made_up(choice: Choice) -> float:
    """Times that no prediction foresees."""
    tile: Any = choice.tile
    slow = 1.0 + choice.keep_all + (choice.block_rows != 16)
    if choice.form == "tensor_cores":
        apart = abs(math.log2(tile.slab / 128)) + abs(math.log2(tile.warp_pixels / 64))
        return 1e-5 * (slow + apart + (tile.warp_rows != 4))
    return 1e-5 * (slow + 4)


def test_batches_find_what_is_fast() -> None:
    task = task_of(conv_layer(channels=16, outputs=32, size=14), H100)
    records: list[TuningRecord] = []
    seen = dict[Choice, float]()
    for number in range(6):
        job = Job(task)
        chosen = batch.propose(job, records, 12, seed=number)
        assert chosen[0] == task.rule and len(set(chosen)) == 12 <= len(task.choices)
        assert set(chosen) <= set(task.choices)
        if seen:  # the best are compared once more, and all others are new
            best = sorted(seen, key=seen.__getitem__)[:3]
            assert set(chosen) & set(seen) == {task.rule, *best}
        seen |= {choice: made_up(choice) for choice in chosen}
        records += [
            TuningRecord.now(task.key, {"choice": c.decisions(), "stage": "search"}, [made_up(c)])
            for c in chosen
        ]
    assert min(seen.values()) == min(map(made_up, task.choices)) < made_up(task.rule)
    assert len(seen) < len(task.choices) / 6


def test_a_task_has_no_more_candidates_than_its_space() -> None:
    task = task_of(dense_layer(16, 8, 1, 0.5), H100)
    assert sorted(map(repr, batch.propose(Job(task), [], 10**4, 0))) == sorted(
        map(repr, task.choices)
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2)),
    st.booleans(),
)
def test_what_candidates_are_compared_with(
    batch_size: int, groups: int, axis: tuple[int, int, int, int], residual: bool
) -> None:
    kernel, stride, dilation, padding = axis
    y = AxisGeometry(6, kernel, stride, dilation, padding, padding)
    x = AxisGeometry(8, kernel, stride, dilation, padding, padding)
    g = ConvGeometry(batch_size, 8, 16, y, x, groups)
    shape = (16, 8 // groups, kernel, kernel)
    matrix = weights(16, int(np.prod(shape[1:])), 8, 0.5)
    layer = Layer(relax.Var("conv"), "conv2d", shape, matrix, g)
    task = task_of(layer, H100, Epilogue(residual, low=-0.25, high=2.0))
    bias = np.linspace(-1, 1, 16, dtype=np.float32)
    pixels, wanted = wanted_outputs(task, bias)
    image = torch.from_numpy(random_values(batch_size * 8 * 48, 0).astype(float))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    exact = torch.nn.functional.conv2d(
        image.reshape(batch_size, 8, 6, 8),
        torch.from_numpy(matrix.astype(float).reshape(shape)),
        torch.from_numpy(bias.astype(float)),
        **options,
    ).reshape(batch_size, 16, -1)
    if residual:
        exact = exact + torch.from_numpy(random_values(exact.numel(), 1)).reshape(exact.shape)
    each = exact.shape[2]
    some = exact.clamp(-0.25, 2.0).numpy()[np.array(pixels) // each, :, np.array(pixels) % each]
    np.testing.assert_allclose(wanted, some, rtol=1e-12, atol=1e-12)
    assert {0, batch_size * each - 1} <= set(pixels)


def test_every_precision_holds_the_random_values() -> None:
    values = random_values(1 << 16, 3)
    assert values.min() == -1 and values.max() < 1 and abs(values.mean()) < 0.02
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    for dtype in ("float32", "float16", "bfloat16"):
        there = torch.from_numpy(values).to(getattr(torch, dtype))
        raw = stored(values, dtype)
        np.testing.assert_array_equal(raw.view(np.uint8), there.view(torch.uint8).numpy())
        np.testing.assert_array_equal(loaded(raw.view(np.uint8), dtype), values)


def results_of(task: Any, candidates: list[dict[str, Any]], again: list[int]) -> dict[str, Any]:
    """Results of one task."""
    key = json.loads(json.dumps({**task.key.__dict__, "target": task.key.target.__dict__}))
    machine = {"device": "GPU", "arch": "sm_90", "multiprocessors": 132, "driver": "580"}
    return {
        "format": 1, "batch": "0", "target": "h100", "tvm": "0.27.0", "package": "0.1.0",
        "machine": machine | {"python": "3.12", "date": "2026-11-21T12:00:00Z"},
        "tasks": [{"task": key, "layers": ["conv"], "candidates": candidates,
                   "again": [candidates[i] for i in again]}],
    }  # fmt: skip


TASK = task_of(conv_layer(size=10), H100)
OTHER = next(choice for choice in TASK.choices if choice.form != TASK.rule.form)


def timed(choice: Choice, seconds: float, failed: str = "") -> dict[str, Any]:
    """A candidate's results."""
    return {"decisions": choice.decisions(), "seconds": [seconds] * 3, "failed": failed}


@pytest.mark.parametrize(("seconds", "kept"), [(0.9, OTHER), (0.99, TASK.rule)])
def test_the_outcome_is_clearly_faster_than_the_rules(
    seconds: float, kept: Choice, tmp_path: Path
) -> None:
    path, log = tmp_path / "results.json", tmp_path / "log.jsonl"
    pair = [timed(TASK.rule, 1.0), timed(OTHER, seconds)]
    path.write_text(json.dumps(results_of(TASK, pair, [0, 1])))
    report = read_batch(path, log)
    assert report.notes == ("measured on GPU (sm_90), driver 580",)
    assert [r.decisions["stage"] for r in read(log).records] == ["rule", "search", "final"]
    found = Selection(read(log).fresh).choose(TASK.layer, TASK.plan, TASK.epilogue, H100)
    assert found is not None and found[1] == kept
    assert found[0].form == kept.plan_form and found[0].block_rows == kept.block_rows


def test_without_the_rules_kernel_there_is_no_outcome(tmp_path: Path) -> None:
    path, log = tmp_path / "results.json", tmp_path / "log.jsonl"
    pair = [{**timed(TASK.rule, 1.0, "crashed"), "seconds": []}, timed(OTHER, 0.5)]
    path.write_text(json.dumps(results_of(TASK, pair, [1])))
    report = read_batch(path, log)
    assert report.tasks == () and "conv: the rule's kernel failed: crashed" in report.notes
    assert Selection(read(log).fresh).choose(TASK.layer, TASK.plan, TASK.epilogue, H100) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2"),
        ({"machine": {}}, "machine: missing"),
        ({"tasks": [{}]}, "missing"),
        ({"more": 1}, "unknown more"),
    ],
)
def test_damaged_results_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, log = tmp_path / "results.json", tmp_path / "log.jsonl"
    whole = results_of(TASK, [timed(TASK.rule, 1.0)], [0])
    path.write_text(json.dumps(whole | changes))
    with pytest.raises(TuningError, match=message):
        read_batch(path, log)
    whole["tasks"][0]["candidates"][0]["decisions"] = {"form": "other"}
    path.write_text(json.dumps(whole))
    with pytest.raises(TuningError, match="no kernel has the form"):
        read_batch(path, log)
    with pytest.raises(TuningError, match="cannot read"):
        read_batch(tmp_path / "none.json", log)
    assert not log.exists()


@pytest.mark.parametrize("form", ["cuda_planes", "cuda_rows", "tensor_cores"])
def test_a_gpu_choice_is_what_its_decisions_say(form: str) -> None:
    task = task_of(dense_layer(64, 32, 3, 0.3), H100) if form == "cuda_rows" else TASK
    choice = next(choice for choice in task.choices if choice.form == form)
    decisions = choice.decisions()
    assert Choice.of(decisions) == choice
    assert all(type(value) is int for name, value in decisions.items() if name != "form")
    with pytest.raises(ValueError, match=f"not the decisions of a {form} kernel"):
        Choice.of(decisions | {"more": 1})
    if "loader" in decisions:
        with pytest.raises(ValueError, match="no loader has the number 9"):
            Choice.of(decisions | {"loader": 9})


SIZES = st.sampled_from([1, 3, 8, 40, 196])


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.sampled_from([8, 24, 64]), st.booleans(), st.sampled_from(["t4", "h100"]))
def test_the_rules_choice_is_a_point_of_the_space(
    pixels: int, columns: int, outputs: int, halves: bool, name: str
) -> None:
    target = PRESETS[name].with_precision("float16" if halves else "float32")
    task = task_of(dense_layer(columns, outputs, pixels, 0.3), target)
    points = cuda_points(task.layer, task.plan, task.epilogue, target)
    assert task.rule in points
    assert next(iter(task.choices)) == task.rule
    kinds = {(choice.form, choice.keep_all) for choice in task.choices}
    assert kinds == {
        (f"{'' if p.form[0] == 't' else 'cuda_'}{p.form}", p.keep_all) for p in task.plans
    }


def test_what_runs_on_gpu_machines_is_python_3_9() -> None:
    for path in Path(on_gpu.__file__).parent.glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))


def test_similar_tasks_of_a_gpu_lend_their_records() -> None:
    near = task_of(conv_layer(size=10), H100, Epilogue(low=0.0, high=6.0))
    record = TuningRecord.now(near.key, {"choice": near.rule.decisions(), "stage": "final"}, [1.0])
    found = Selection([record]).choose(TASK.layer, TASK.plan, TASK.epilogue, H100)
    assert found is not None and found[2] == "by records of similar tasks"
    assert found[1] in TASK.choices
    odd = {**TASK.rule.decisions(), "warp_pixels": 96}
    record = TuningRecord.now(TASK.key, {"choice": odd, "stage": "final"}, [1.0])
    one = Selection([record])
    assert one.choose(TASK.layer, TASK.plan, TASK.epilogue, H100) is None
    assert one.notes == ["tuning record of conv ignored: its tile is not possible here"]


def test_records_know_gpus_of_one_architecture_apart() -> None:
    layer = conv_layer()
    keys = [task_of(layer, PRESETS[name]).key.target for name in ("a10", "rtx-3090")]
    assert keys[0] != keys[1] and keys[0].mcpu == keys[1].mcpu == "sm_86"
    floats = task_of(layer, PRESETS["h100"]).key
    assert floats.problem != task_of(layer, H100).key.problem


def test_what_cannot_be_a_batch_is_refused(tmp_path: Path) -> None:
    model, log = network(tmp_path / "m.onnx"), tmp_path / "log.jsonl"
    with pytest.raises(TuningError, match="batches are for GPUs"):
        batch.write_batch(model, "x86", tmp_path / "out", log=log)
    with pytest.raises(TuningError, match="is not an empty folder"):
        batch.write_batch(model, "h100", tmp_path, log=log)
    with pytest.raises(TuningError, match="GPUs are tuned by batches"):
        tvm_pivot.tune(model, "h100", log=log)
    done = CliRunner().invoke(app, ["tune", "--log", str(log), "--batch-out", str(tmp_path)])
    assert done.exit_code == 1 and "which model" in done.output
