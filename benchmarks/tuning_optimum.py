"""How much is there to gain at all? Every point of a task's space, measured, against the rule's.

A search can find no more than the best point. What is predicted to be far slower is in no space. Of
each network the tasks are taken whose spaces are small enough; all their points are measured once,
and the fastest ones again, in turns with the rule's choice.

    python -m benchmarks.tuning_optimum bert2:8x1@0.1 resnet18:8x1@0.1 --most 240 \\
        --json benchmarks/results/tuning_optimum.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import zoo
from benchmarks.tuning_gain import mean_gain
from benchmarks.tuning_tasks import measuring
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.targets import resolve
from tvm_pivot.tuning.machine import CandidateBuilder, LocalMachine, LocalRunner, Workshop
from tvm_pivot.tuning.search import Job, Search
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.tuner import model_tasks

# Candidates that are measured together, and what is measured again.
BATCH, FINALISTS, FINAL_ROUNDS = 16, 6, 6


def small(tasks: Sequence[LayerTask], most: int) -> list[LayerTask]:
    """Tasks with several points, but not more than `most`."""
    return [task for task in tasks if 1 < len(task.choices) <= most]


def batches(task: LayerTask) -> Iterator[list[Choice]]:
    """All points, the fastest by prediction first."""
    points = sorted(task.choices, key=lambda choice: task.choices[choice])
    for i in range(0, len(points), BATCH):
        yield points[i : i + BATCH]


def optimum(task: LayerTask, workshop: Workshop, machine: LocalMachine) -> dict[str, Any]:
    """The task's fastest point beside its rule's, in microseconds."""
    job = Job(task)
    search = Search([job], CandidateBuilder(workshop), LocalRunner(machine), lambda *measured: None)
    search.measure(job, [task.rule])
    for batch in batches(task):
        search.measure(job, batch)
    finalists = [choice for choice in job.best(FINALISTS + 1) if choice != task.rule]
    times = search.compare(job, [task.rule, *finalists[:FINALISTS]], FINAL_ROUNDS)
    costs = {choice: 1e6 * median(seconds) for choice, seconds in times.items()}
    best = min(costs, key=lambda choice: costs[choice])
    return {
        "layer": task.names[0],
        "layers": len(task.names),
        "points": len(job.times),
        "failed": len(job.failed),
        "rule_us": costs[task.rule],
        "best_us": costs[best],
        "gain": costs[task.rule] / costs[best],
        "best": best.decisions(),
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="network:variant of the standing set")
    parser.add_argument("--most", type=int, default=240, help="points of a task")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = resolve(options.target)
    found: list[dict[str, Any]] = []
    for model in options.models:
        network, _, variant = model.partition(":")
        tasks = small(model_tasks(str(zoo.load(network, variant)), target), options.most)
        with measuring(tasks, target) as (workshop, machine):
            for task in tasks:
                found.append({"model": model, **optimum(task, workshop, machine)})
                entry = found[-1]
                shown = f"{entry['points']} points, {entry['gain']:.3f}x"
                Console(stderr=True).print(f"{model} {entry['layer']}: {shown}")
                if options.json:
                    content = {"target": target.name, "tasks": found}
                    options.json.write_text(json.dumps(content, indent=1) + "\n")
    table = Table("model", "layer", "points", "rule us", "best us", "gain")
    for entry in found:
        times = [f"{entry[key]:.1f}" for key in ("rule_us", "best_us")]
        points, gain = str(entry["points"]), f"{entry['gain']:.2f}x"
        table.add_row(entry["model"], entry["layer"], points, *times, gain)
    Console().print(table)
    Console().print(f"{mean_gain(found):.3f}x over layers")


if __name__ == "__main__":
    main()
