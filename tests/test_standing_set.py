"""What `make bench` would measure, how it sums that up, and how two runs are compared."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import repeatability, standing_plan, standing_set, zoo
from benchmarks.standing_plan import (
    NETWORKS,
    RUNTIMES,
    VARIANTS,
    Batch,
    batches,
    runtimes_for,
    threads_for,
)
from tvm_pivot.bench.results import Comparison, Machine, ModelFacts, Noise, Result
from tvm_pivot.bench.runtimes import ADAPTERS

SKIPPING = ("pivot", "mnn-sparse", "deepsparse")


def result(model: str, runtime: str, ms: float | None, threads: int = 1) -> Result:
    status = "ok" if ms is not None else "failed"
    return Result(model, runtime, runtime, status, "1", threads, "fp32", median_ms=ms)


def comparison(results: list[Result]) -> Comparison:
    """A comparison of the models that the results name: ``"<network> <variant>"``."""
    names = dict.fromkeys(r.model for r in results)
    models = [ModelFacts(n, *n.split(), "0", "dense", 1.0, 2, 2) for n in names]
    machine = Machine("cpu", 2, (), 8.0, "Linux", "3.11")
    return Comparison("2026", "make bench", machine, "", (), tuple(models), tuple(results))


# --- the plan


def test_the_standing_set_is_complete() -> None:
    work = batches(NETWORKS, VARIANTS)
    files = [file for batch in work for file in batch]
    assert len(files) == len(set(files)) == 10 * 13 + 3
    patterns = {(p, d) for p in ("8x1", "16x1", "4x1", "1x1") for d in ("0.2", "0.1", "0.05")}
    for network in NETWORKS:
        found = {variant for n, variant in files if n == network and "dlmc" not in variant}
        assert found == {"dense", *("@".join(pattern) for pattern in patterns)}
    dlmc = [file for file in files if file[1].startswith("dlmc")]
    assert sorted(dlmc) == [("resnet50", f"dlmc@{d}") for d in ("0.05", "0.1", "0.2")]
    assert set(NETWORKS) <= set(zoo.CATALOGUE)
    for variant in VARIANTS:
        zoo.Variant.parse(variant)
    assert set(RUNTIMES) <= set(ADAPTERS)


def test_the_most_important_files_come_first_and_small_networks_before_large_ones() -> None:
    files = [file for batch in batches(NETWORKS, VARIANTS) for file in batch]
    assert files[:20] == [(n, v) for n in NETWORKS for v in standing_plan.EVERY_RUNTIME]
    tiers = [next(i for i, tier in enumerate(standing_plan.TIERS) if v in tier) for _, v in files]
    assert tiers == sorted(tiers)


def test_batches_are_of_one_tier_and_large_files_by_themselves() -> None:
    work = batches(NETWORKS, VARIANTS)
    for batch in work:
        assert any({v for _, v in batch} <= set(tier) for tier in standing_plan.TIERS)
        heavy = {network in standing_plan.HEAVY for network, _ in batch}
        assert len(heavy) == 1
        assert len(batch) <= (standing_plan.HEAVY_FILES if True in heavy else standing_plan.FILES)
    light = [len(batch) for batch in work if batch[0][0] not in standing_plan.HEAVY]
    assert min(light) >= standing_plan.FILES - 1, "no batch is a small rest of a tier"


def test_chosen_networks_and_variants_only() -> None:
    assert batches(["vgg16", "mlp"], ["16x1@0.1", "dense", "dlmc@0.1"]) == [
        (("mlp", "dense"),),
        (("vgg16", "dense"),),
        (("mlp", "16x1@0.1"),),
        (("vgg16", "16x1@0.1"),),
    ]
    # Others of the zoo come last, and variants that are no part of the set are measured too.
    assert batches(["gru", "mlp"], ["2x1@0.5"]) == [(("mlp", "2x1@0.5"), ("gru", "2x1@0.5"))]


def test_every_runtime_runs_on_one_pruned_file_and_sparse_options_not_on_the_dense_one() -> None:
    assert runtimes_for("mlp", "8x1@0.1", RUNTIMES, SKIPPING) == [
        name for name in RUNTIMES if name != "openvino-sparse"
    ]
    assert runtimes_for("mlp", "dense", RUNTIMES, SKIPPING) == [
        "pivot", "mnn", "litert", "onnxruntime", "openvino", "deepsparse"
    ]  # fmt: skip


def test_what_takes_minutes_to_convert_is_measured_on_the_dense_file() -> None:
    assert "litert" in runtimes_for("vgg16", "dense", RUNTIMES, SKIPPING)
    assert "litert" not in runtimes_for("vgg16", "8x1@0.1", RUNTIMES, SKIPPING)
    assert "litert" in runtimes_for("resnet50", "8x1@0.1", RUNTIMES, SKIPPING)


def test_all_that_do_anything_about_zeros_run_on_the_unstructured_files() -> None:
    skipping = (*SKIPPING, "openvino-sparse")
    for variant in ("1x1@0.1", "dlmc@0.1"):
        found = runtimes_for("resnet50", variant, RUNTIMES, skipping)
        assert set(found) == {"onnxruntime", *skipping}
    assert "openvino-sparse" not in runtimes_for("mlp", "8x1@0.2", RUNTIMES, skipping)


def test_the_least_important_files_are_measured_with_one_number_of_threads() -> None:
    assert threads_for("1x1@0.1", [1, 2]) == [1, 2]
    assert threads_for("2x1@0.5", [1, 2]) == [1, 2]
    assert threads_for("8x1@0.05", [1, 2]) == [1]
    assert threads_for("4x1@0.05", [1, 2]) == [1]


@pytest.mark.parametrize("variant", ["8x1@0.05", "4x1@0.1", "1x1@0.2", "dlmc@0.05"])
def test_elsewhere_those_that_skip_zeros_and_one_that_does_not(variant: str) -> None:
    found = runtimes_for("resnet50", variant, RUNTIMES, SKIPPING)
    assert found == ["pivot", "mnn-sparse", "onnxruntime"]
    assert runtimes_for("resnet50", variant, ["openvino", "pivot"], ["pivot"]) == ["pivot"]


def test_what_the_time_does_not_suffice_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files take ten minutes per network here; nothing is really measured."""
    clock = [0.0]
    monkeypatch.setattr(standing_set.time, "monotonic", lambda: clock[0])
    measured = []

    def pretend(self: standing_set.StandingSet, batch: Batch, _pool: object) -> None:
        clock[0] += 600
        self.seconds[batch[0][0]] = 600 / len(batch) / 2
        measured.append(batch[0][0])

    monkeypatch.setattr(standing_set.StandingSet, "_measure_batch", pretend)
    options = standing_set._parse(
        ["--runtimes", "pivot,onnxruntime", "--minutes", "25", "--json", str(tmp_path / "a.json")]
    )
    standing = standing_set.StandingSet(options)
    standing.run(
        [((network, "dense"), (network, "8x1@0.1")) for network in ("mlp", "lstm", "bert2")]
    )
    assert measured == ["mlp", "lstm"]
    assert standing.skipped == ["bert2 dense: no time left", "bert2 8x1@0.1: no time left"]


def test_resuming_leaves_out_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    found = comparison([result("mlp dense", "pivot", 1.0)])
    replace(found, machine=standing_set.describe_machine()).save(path)
    arguments = ["--runtimes", "pivot", "--json", str(path)]
    resumed = standing_set.StandingSet(standing_set._parse([*arguments, "--resume"]))
    batch = (("mlp", "dense"), ("mlp", "8x1@0.1"))
    assert resumed._remaining(batch) == (("mlp", "8x1@0.1"),)
    fresh = standing_set.StandingSet(standing_set._parse(arguments))
    assert fresh._remaining(batch) == batch
    found.save(path)
    assert standing_set.main([*arguments, "--resume"]) == 2  # another machine's results


# --- the summary


def test_summary_has_times_ratios_and_means() -> None:
    lines = list(
        standing_plan.summary(
            comparison(
                [
                    result("mlp dense", "pivot", 2.0),
                    result("mlp dense", "mnn", 3.0),
                    result("mlp 8x1@0.1", "pivot", 0.5),
                    result("mlp 8x1@0.1", "mnn", 1.0),
                    result("bert2 8x1@0.1", "pivot", 1.0),
                    result("bert2 8x1@0.1", "mnn", 8.0),
                    result("bert2 1x1@0.1", "pivot", 1.0),
                    result("bert2 1x1@0.1", "mnn", None),
                    result("vgg16 1x1@0.1", "mnn", 40.0),
                ]
            )
        )
    )
    assert lines[0].startswith("1 thread;")
    assert [line.split() for line in lines[1:]] == [
        ["pivot,", "ms", "mnn"],
        ["mlp", "dense", "2", "1.50"],
        ["mlp", "8x1@0.1", "0.5", "2.00"],
        ["bert2", "8x1@0.1", "1", "8.00"],
        ["bert2", "1x1@0.1", "1", "failed"],
        ["vgg16", "1x1@0.1", "-", "40"],
        ["dense,", "geometric", "mean", "1.50"],
        ["pruned,", "geometric", "mean", "4.00"],
        [],
    ]


# --- repeating a run


def run_of(*ratios: float, speed: float = 1.0) -> Comparison:
    """Three networks on a machine of some speed; a rival takes `ratios` times ours."""
    results = []
    for network, value in zip(("mlp", "lstm", "bert2"), ratios, strict=True):
        results += [
            result(f"{network} dense", "pivot", speed),
            result(f"{network} dense", "mnn", value * speed),
        ]
    return comparison(results)


def test_changes_are_those_of_ratios_not_of_times() -> None:
    found = repeatability.changes(run_of(2.0, 4.0, 1.0), run_of(2.2, 3.0, 1.0, speed=1.5))
    assert found == pytest.approx({"mlp": 0.1, "lstm": 0.25, "bert2": 0.0})


def test_only_common_cases_count() -> None:
    old, new = run_of(2.0, 4.0, 1.0), run_of(2.0, 4.0, 1.0)
    failed = [replace(r, median_ms=None) if r.model == "lstm dense" else r for r in old.results]
    assert set(repeatability.changes(old, replace(new, results=tuple(failed)))) == {"mlp", "bert2"}
    assert repeatability.changes(old, replace(new, results=())) == {}


@pytest.mark.parametrize(("change", "code"), [(1.05, 0), (1.2, 1)])
def test_repeatability_command(tmp_path: Path, change: float, code: int) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    run_of(2.0, 4.0, 1.0).save(old)
    replace(run_of(2.0 * change, 4.0 * change, 1.0), noise=(Noise("m", "r", 1, "fp32", 1.0),)).save(
        new
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.repeatability", str(old), str(new)],
        cwd=Path(repeatability.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1].split() == [
        "median",
        "over",
        "networks",
        f"{change - 1:.1%}",
    ]
    run_of(1.0, 1.0, 1.0).save(new)
    replace(run_of(1.0, 1.0, 1.0), results=()).save(old)
    assert repeatability.main([str(old), str(new)]) == 2
