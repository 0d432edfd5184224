"""What tuning gains: tuned kernels and networks against the rule's, in turns, one thread.

    python -m benchmarks.tuning_gain resnet50:8x1@0.1 resnet18:8x1@0.1 \\
        --json benchmarks/results/tuning_gain.json

Layers are measured alone, with their copy to planes, each one's two kernels in turns. Networks are
measured whole, both builds in turns. Records are those of the shipped logs, or of `--log`.
"""

from __future__ import annotations

import os

os.environ["TVM_NUM_THREADS"] = "1"

import argparse
import json
import tempfile
import time
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tvm_pivot
from benchmarks import zoo
from tvm_pivot.targets import PivotTarget, resolve
from tvm_pivot.tuning.selection import select
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.trials import build_candidate, measure_candidates
from tvm_pivot.tuning.tuner import model_tasks

ROUNDS, LEAST_SECONDS = 45, 0.001


def of_layers(model: Path, records: Path | None, target: PivotTarget) -> list[dict[str, Any]]:
    """Times of every task's two kernels, in microseconds; equal kernels are not measured."""
    selection = select(records, target)
    found = []
    for task in model_tasks(str(model), target):
        chosen = selection.choose(task.layer, task.plan, task.epilogue, task.target)
        entry = {"layer": task.names[0], "layers": len(task.names), "record": "", "gain": 1.0}
        if chosen is not None:
            plan, choice, entry["record"] = chosen
            if choice != task.rule:
                assert plan.block_rows == choice.block_rows
                entry.update(_two_kernels(task, choice.decisions()))
        found.append(entry)
    return found


def _two_kernels(task: LayerTask, decisions: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        both = (task.rule.decisions(), decisions)
        paths = [build_candidate(task, one, folder, str(i)) for i, one in enumerate(both)]
        times = measure_candidates(paths, task.target.l2_bytes, ROUNDS, LEAST_SECONDS)
    # The rounds that others disturbed least.
    rule, tuned = (1e6 * median(sorted(one)[: ROUNDS // 3]) for one in times)
    return {"rule_us": rule, "tuned_us": tuned, "gain": rule / tuned}


def of_network(model: Path, records: Path | None, runs: int) -> dict[str, float]:
    """Times of both builds, in milliseconds."""
    nets = [
        tvm_pivot.build(model, tuned=False, threads=1),
        tvm_pivot.build(model, log=records, threads=1),
    ]
    return in_turns(nets, runs)


def in_turns(nets: list[tvm_pivot.Session], runs: int) -> dict[str, float]:
    """Times of two sessions, in milliseconds."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(spec.shape).astype(spec.dtype) for spec in nets[0].inputs]
    times: list[list[float]] = [[], []]
    for turn in range(runs + 3):
        for net, own in zip(nets, times, strict=True):
            began = time.thread_time()  # not counting what else the core runs meanwhile
            net.run(*inputs)
            if turn >= 3:
                own.append(time.thread_time() - began)
    ratios = [rule / tuned for rule, tuned in zip(*times, strict=True)]
    return {
        "rule_ms": 1e3 * median(times[0]),
        "tuned_ms": 1e3 * median(times[1]),
        "rule_min_ms": 1e3 * min(times[0]),
        "tuned_min_ms": 1e3 * min(times[1]),
        "gain": median(ratios),
    }


def mean_gain(layers: list[dict[str, Any]]) -> float:
    """The geometric mean over layers, those with equal kernels among them."""
    logs = [log(entry["gain"]) for entry in layers for _ in range(entry["layers"])]
    return exp(sum(logs) / len(logs))


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="network:variant of the standing set")
    parser.add_argument("--log", type=Path, help="records beside the shipped ones")
    parser.add_argument("--runs", type=int, default=60, help="of each network")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in options.models:
        network, _, variant = name.partition(":")
        model = zoo.load(network, variant)
        layers = of_layers(model, options.log, resolve("x86"))
        whole = of_network(model, options.log, options.runs)
        found.append({"model": name, "mean": mean_gain(layers), "network": whole, "layers": layers})
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("model", "layers, mean", "least", "most", "network", "rule ms", "tuned ms")
    for entry in found:
        gains, whole = [layer["gain"] for layer in entry["layers"]], entry["network"]
        cells = [f"{value:.2f}x" for value in (entry["mean"], min(gains), max(gains))]
        times = [f"{whole[key]:.2f}" for key in ("rule_ms", "tuned_ms")]
        table.add_row(entry["model"], *cells, f"{whole['gain']:.3f}x", *times)
    Console().print(table)


if __name__ == "__main__":
    main()
