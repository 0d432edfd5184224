"""`tune` from end to end on a network of a few small layers, and builds that use its log.

Nothing here depends on what was measured: whatever wins, the network computes the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from farm_machines import running
from tuned_layers import AVX2, conv_layer, dense_layer, network, task_of
from typer.testing import CliRunner

import tvm_pivot
from benchmarks import zoo
from tvm_pivot.cli import app
from tvm_pivot.errors import TuningError
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.schedules.problems import Epilogue, PlanesTile
from tvm_pivot.targets import PRESETS, resolve
from tvm_pivot.tuning import selection, tuner
from tvm_pivot.tuning.confirm import in_network
from tvm_pivot.tuning.log_files import append, read
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.rpc_runner import rpc
from tvm_pivot.tuning.search import Job
from tvm_pivot.tuning.selection import Selection, exported, stored_choice, winner


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A network, the log of tuning it from the command line, and what that said."""
    folder = tmp_path_factory.mktemp("tuned")
    model, log = network(folder / "small.onnx"), folder / "mine.jsonl"
    out = folder / "best.jsonl"
    args = ["tune", str(model), "--log", str(log), "--trials", "20", "--export", str(out), "--json"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    return model, log, json.loads(done.stdout)


def test_equal_layers_are_one_task(tuned: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, said = tuned
    assert sorted(len(task["layers"]) for task in said["tasks"]) == [1, 2]
    assert all(task["seconds"] <= task["rule_seconds"] for task in said["tasks"])
    assert said["stopped"] == "" and said["gain"] >= 1.0


def test_the_log_holds_every_trial_and_one_outcome_for_each_task(
    tuned: tuple[Path, Path, dict[str, Any]],
) -> None:
    _, log, said = tuned
    found = read(log)
    assert found.bad_count == 0
    stages = [record.decisions["stage"] for record in found.records]
    # A kernel that is not faster in the network has two outcomes: it won, and then it went.
    tasks = len(said["tasks"])
    assert stages.count("rule") == tasks <= stages.count("final") <= 2 * tasks
    searched = len(stages) - stages.count("final")
    assert searched == sum(task["trials"] for task in said["tasks"]) <= 20 + 8
    assert all(isinstance(stored_choice(record), Choice) for record in found.records)


def test_a_build_uses_the_log_and_says_so(tuned: tuple[Path, Path, dict[str, Any]]) -> None:
    model, log, _ = tuned
    x = np.random.default_rng(0).standard_normal((1, 8, 12, 12)).astype(np.float32)
    (want,) = onnxruntime.InferenceSession(str(model)).run(None, {"x": x})
    for path in (log, log.with_name("best.jsonl")):
        net = tvm_pivot.build(model, log=path, threads=1)
        assert {layer.tuned for layer in net.report.layers} == {"by records of the same tasks"}
        assert "tuned: by records of the same tasks, 3 layers" in str(net.report)
        assert np.allclose(net.run(x), want, rtol=0, atol=1e-3 * abs(want).max())
    report = tvm_pivot.inspect(model, log=log, threads=1)
    assert {layer.tuned for layer in report.layers} == {"by records of the same tasks"}
    plain = tvm_pivot.inspect(model, log=log, tuned=False, threads=1)
    assert {layer.tuned for layer in plain.layers} == {""}


def test_tuning_again_goes_on_with_the_log(tuned: tuple[Path, Path, dict[str, Any]]) -> None:
    model, log, _ = tuned
    before = len(read(log).records)
    report = tvm_pivot.tune(model, log=log, trials=1)
    assert len(read(log).records) > before
    assert len(report.tasks) == 2 and "trials in" in str(report)


INTERRUPTED = """
import json, os, signal, sys
import tvm_pivot
from tvm_pivot.tuning import tuner

class Interrupts(tuner.Progress):
    sent = False

    def measured(self, task, seconds, best):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)

tuner._FINAL_ROUNDS = 1
report = tvm_pivot.tune(sys.argv[1], log=sys.argv[2], progress=Interrupts())
(task,) = report.tasks
print(json.dumps({"stopped": report.stopped, "best": task.decisions}))
"""


def test_ctrl_c_ends_a_search_with_what_is_known(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", INTERRUPTED, network(tmp_path / "small.onnx"), log]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    finals = [r.decisions for r in read(log).records if r.decisions["stage"] == "final"]
    # Its only task was compared once; what won there may have gone when networks were.
    assert said["stopped"] == "Ctrl-C" and len(finals) in (1, 2)
    assert finals[-1]["choice"] == said["best"]


def test_a_farm_measures_candidates_with_their_own_tables(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with (
        running("tracker", "--port", "0") as hub,
        running("server", "--tracker", hub.address, "--key", "mine", "--port", "0"),
    ):
        allocate = "tvm_pivot.tuning.artifacts:contents_of"
        how = {"allocate": allocate, "number": 1, "repeat": 2, "min_repeat_ms": 0}
        runner = rpc(hub.address, "mine", **how)
        model = network(tmp_path / "small.onnx")
        report = tvm_pivot.tune(model, log=log, trials=1, runner=runner)
    records = read(log).records
    assert len(report.tasks) == 2
    assert len(records) == sum(task.trials for task in report.tasks) + 2  # none has failed


def test_what_cannot_be_tuned_is_refused_at_once(tmp_path: Path) -> None:
    model = network(tmp_path / "small.onnx")
    with pytest.raises(TuningError, match="there is no directory"):
        tvm_pivot.tune(model, log=tmp_path / "none" / "log.jsonl")
    for target, message in (("h100", "--batch-out"), ("cortex-a76", "on a farm")):
        with pytest.raises(TuningError, match=message):
            tvm_pivot.tune(model, target=target, log=tmp_path / "log.jsonl")
    done = CliRunner().invoke(app, ["tune", str(model)])
    assert done.exit_code == 1 and "--log" in done.output


def a_record(task: Any, choice: Choice, seconds: float, stage: str, day: int = 1) -> TuningRecord:
    record = TuningRecord.now(task.key, {"choice": choice.decisions(), "stage": stage}, [seconds])
    return replace(record, date=f"2026-11-{day:02}T00:00:00Z")


TASK = task_of(conv_layer(size=14))
RULE = TASK.rule
FAST, OTHER = list(TASK.choices)[3], list(TASK.choices)[5]


def test_the_outcome_of_the_latest_search_wins() -> None:
    search = [a_record(TASK, RULE, 1.0, "rule"), a_record(TASK, FAST, 0.2, "search")]
    first, last = a_record(TASK, OTHER, 0.9, "final", 2), a_record(TASK, RULE, 1.0, "final", 3)
    assert winner([*search, last, first]) == last
    assert exported([*search, first]) == [first, *search]


def test_an_export_keeps_candidates_to_learn_from() -> None:
    choices = list(TASK.choices)[:20]
    rule, *others = [a_record(TASK, c, 1.0 + i, "search") for i, c in enumerate(choices)]
    rule = replace(rule, decisions={**rule.decisions, "stage": "rule"})
    best = a_record(TASK, choices[3], 0.5, "final")
    kept = exported([*others, rule, best])
    assert kept[:2] == [best, rule] and len(kept) == 7 == len(set(kept))
    assert kept[2:] == sorted(kept[2:], key=lambda record: record.cost)
    assert {kept[2], kept[-1]} == {others[0], others[-1]}
    assert exported([rule, others[5]]) == []  # a search that found nothing


def test_of_two_outcomes_in_one_second_the_last_one_counts() -> None:
    first, last = a_record(TASK, FAST, 0.9, "final"), a_record(TASK, RULE, 1.0, "final")
    assert winner([first, last]) == last


@pytest.mark.parametrize(("there", "kept"), [(0.8, True), (0.995, False), (1.2, False)])
def test_a_kernel_that_is_not_faster_in_its_network_goes(
    there: float, kept: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    append(log, [a_record(TASK, FAST, 0.5, "final")])
    found = tuner.TunedTask(TASK.names, "planes", 9, 1.0, 0.5, FAST.decisions())
    times = ({"conv": 2.0, "other": 1.0}, {"conv": 2.0 * there, "other": 9.0})
    task = tuner._confirmed(found, [Job(TASK)], times, log)
    best = winner(read(log).records)
    assert best is not None
    assert task.seconds == (pytest.approx(there) if kept else 1.0)
    assert stored_choice(best) == Choice.of(task.decisions) == (FAST if kept else RULE)


def test_layers_are_timed_in_both_networks(tmp_path: Path) -> None:
    model = network(tmp_path / "small.onnx")
    times = in_network(model, resolve("x86"), tmp_path_log(tmp_path))
    for one in times:
        operators = {name for name in one if name.startswith("operator ")}
        assert set(one) - operators == {layer.name for layer in tvm_pivot.inspect(model).layers}
        assert all(seconds > 0 for seconds in one.values())


def tmp_path_log(folder: Path) -> Path:
    """A log that says nothing of the network."""
    path = folder / "log.jsonl"
    append(path, [a_record(TASK, FAST, 0.5, "final")])
    return path


def test_without_an_outcome_a_candidate_must_be_clearly_faster() -> None:
    rule = a_record(TASK, RULE, 1.0, "rule")
    fast = a_record(TASK, FAST, 0.9, "search")
    assert winner([rule, fast]) == fast
    assert winner([rule, a_record(TASK, FAST, 0.97, "search")]) is None
    assert winner([fast]) is None
    assert winner([]) is None


def chosen(records: list[TuningRecord], task: Any) -> Any:
    one = Selection(records)
    return one, one.choose(task.layer, task.plan, task.epilogue, task.target)


def test_a_record_of_the_same_task_comes_first() -> None:
    near = task_of(conv_layer(size=13))
    records = [a_record(TASK, FAST, 1.0, "final"), a_record(near, near.rule, 0.1, "final")]
    _, found = chosen(records, TASK)
    plan, choice, told = found
    assert (choice, told) == (FAST, "by records of the same tasks")
    assert plan.block_rows == FAST.block_rows


def test_blocks_of_a_record_replace_those_of_the_plan() -> None:
    other = next(c for c in TASK.choices if c.block_rows != RULE.block_rows)
    _, (plan, choice, _) = chosen([a_record(TASK, other, 1.0, "final")], TASK)
    assert choice == other
    assert plan.block_rows == other.block_rows != TASK.plan.block_rows


def test_similar_tasks_lend_their_records() -> None:
    near = task_of(conv_layer(size=15))
    _, found = chosen([a_record(near, near.rule, 0.1, "final")], TASK)
    assert found is not None
    plan, choice, told = found
    assert told == "by records of similar tasks"
    assert choice in TASK.choices and plan is TASK.plan


def test_a_cpu_of_the_same_maker_lends_its_record_unasked() -> None:
    # A choice that is predicted to be far slower, for which a similar task's record is not taken.
    slow = max(TASK.choices, key=lambda choice: TASK.choices[choice])
    assert TASK.choices[slow] > 1.2 * TASK.choices[RULE]

    def chosen(mcpu: str) -> Any:
        there = replace(TASK.key, target=replace(TASK.key.target, mcpu=mcpu))
        record = replace(a_record(TASK, slow, 0.5, "final"), task=there)
        return Selection([record]).choose(TASK.layer, TASK.plan, TASK.epilogue, TASK.target)

    assert chosen("broadwell")[1:] == (slow, "by records of the same tasks")
    other = chosen("znver4")
    assert other is None or other[1] != slow


def test_unlike_tasks_do_not() -> None:
    far = task_of(conv_layer(channels=32, outputs=64, size=7))
    rows = task_of(dense_layer(), epilogue=Epilogue())
    for other in (far, rows):
        one, found = chosen([a_record(other, other.rule, 0.1, "final")], TASK)
        assert found is None and one.notes == []


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"choice": {**RULE.decisions(), "vectors": 99}}, "its tile is not possible here"),
        ({"choice": {**RULE.decisions(), "block_rows": 3}}, "its blocks are not possible here"),
        ({"choice": {**RULE.decisions(), "band_rows": 99}}, "there are no such bands here"),
        ({"choice": {"form": "planes"}}, "not the decisions of a planes kernel"),
        ({"trace": []}, "a record without a choice"),
    ],
)
def test_a_record_that_does_not_fit_is_ignored_with_one_line(
    decisions: dict[str, Any], message: str
) -> None:
    record = replace(a_record(TASK, RULE, 1.0, "final"), decisions={**decisions, "stage": "final"})
    one, found = chosen([record], TASK)
    one.choose(TASK.layer, TASK.plan, TASK.epilogue, TASK.target)
    assert found is None
    (note,) = one.notes
    assert note.startswith("tuning record of conv ignored: ") and message in note


def test_stale_records_cost_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    old = replace(a_record(TASK, FAST, 1.0, "final"), tvm="0.26.0")
    append(log, [old, a_record(TASK, RULE, 1.0, "final")])
    found = selection.select(log, TASK.target)
    assert found.notes == ["1 tuning records of another TVM release ignored"]


def test_own_records_hide_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = [a_record(TASK, FAST, 0.5, "final", 9)]
    monkeypatch.setattr(selection, "shipped_records", lambda _: shipped)
    log = tmp_path / "log.jsonl"
    append(log, [a_record(TASK, OTHER, 0.9, "final", 1)])
    args = (TASK.layer, TASK.plan, TASK.epilogue, TASK.target)
    for path, choice in ((log, OTHER), (None, FAST)):
        found = selection.select(path, TASK.target).choose(*args)
        assert found is not None and found[1] == choice


def test_more_cores_share_a_tuned_kernel(tmp_path: Path) -> None:
    """Records are of one core; how work is shared stays the rule's to say."""
    many = replace(TASK.target, cores=8)
    record = a_record(TASK, FAST, 1.0, "final")
    found = Selection([record]).choose(TASK.layer, TASK.plan, TASK.epilogue, many)
    assert found is not None and found[1] == FAST
    tile = FAST.tile
    assert isinstance(tile, PlanesTile) and not tile.parallel


def test_shipped_logs_are_whole() -> None:
    targets = (AVX2, replace(AVX2, lanes=16), PRESETS["cortex-a76"])
    logs = [path for target in targets for path in selection.shipped_logs(target)]
    for path in logs:
        log = read(path)
        assert log.bad_count == 0
        outcomes = [r.task for r in log.records if r.decisions["stage"] == "final"]
        assert len(set(outcomes)) == len(outcomes)
        assert set(outcomes) == {record.task for record in log.records}
    assert selection.shipped_logs(PRESETS["raspberry-pi-5"])
    assert selection.shipped_logs(PRESETS["cortex-a53"]) == []
    assert selection.shipped_logs(PRESETS["h100"]) == []


def test_builds_for_arm_use_the_shipped_records_of_that_core() -> None:
    model = zoo.load("mobilenet_v1", "8x1@0.1")
    same = "by records of the same tasks"
    report = tvm_pivot.inspect(model, target="raspberry-pi-5")
    assert any(layer.tuned == same for layer in report.layers)
    assert f"tuned: {same}" in str(report)
    other = tvm_pivot.inspect(model, target="cortex-a53")
    assert {layer.tuned for layer in other.layers} == {""}


def test_the_command_line_does_not_load_the_compiler_for_its_help() -> None:
    code = "import sys, tvm_pivot.cli_tune; assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
