"""Does learning pay? Best time so far against trials: MetaSchedule with XGBoost, and at random.

Both search the same space, and neither knows the rule's choice. Both begin with the same eight
points, drawn at random; then one lets the cost model pick candidates, the other draws on, each
point equally likely and none twice. As in any search the cost model has learnt from the shipped
records before, here without those of the network's own tasks. A candidate that both try is measured
once. The fastest few of each are measured again in the end, in turns with each other and with the
rule's choice, for the fastest of many single measurements is the luckiest, too.

    python -m benchmarks.tuning_curves resnet18:8x1@0.1 resnet50:1x1@0.1 bert2:8x1@0.1 --tasks 4 \\
        --trials 40 --json benchmarks/results/tuning_curves.json --svg docs/tuning-curves.svg
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import zoo
from benchmarks.tuning_tasks import measuring
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.targets import resolve
from tvm_pivot.tuning.cost_model import WARM_UP
from tvm_pivot.tuning.explore import BATCH, explore
from tvm_pivot.tuning.machine import CandidateBuilder, LocalMachine, LocalRunner, Workshop
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.search import Job, Search
from tvm_pivot.tuning.selection import shipped_records
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.tuner import FINALISTS, model_tasks

LEARNED, RANDOM = "xgboost", "random"
# Closer than this, two searches are level.
SAME = 0.01
FINAL_ROUNDS = 6


def best_so_far(times: Sequence[float]) -> list[float]:
    """The smallest time up to each trial."""
    return [min(times[: i + 1]) for i in range(len(times))]


def chosen(tasks: Sequence[LayerTask], count: int) -> list[LayerTask]:
    """Those tasks that take longest, for they are worth tuning."""
    return sorted(tasks, key=lambda task: -task.plan.cycles * len(task.names))[:count]


def drawn(task: LayerTask, seed: int) -> list[Choice]:
    """All points of a task's space, in random order."""
    points = sorted(task.choices, key=lambda choice: sorted(choice.numbers().items()))
    random.Random(f"{seed} {task.names[0]}").shuffle(points)
    return points


def curves(
    task: LayerTask,
    records: Sequence[TuningRecord],
    trials: int,
    seed: int,
    workshop: Workshop,
    machine: LocalMachine,
) -> dict[str, Any]:
    """Both searches, for as many trials each, in seconds.

    Returns:
        "points": how many there are. "curves": the best time so far. "rule": the time of the
        rule's choice, and "found": of what each search found, measured in turns.
    """
    builder, runner = CandidateBuilder(workshop), LocalRunner(machine)
    order, measured = list[Choice](), dict[Choice, float]()

    def note(job: Job, choice: Choice, _: Sequence[float]) -> None:
        order.append(choice)
        job.times[choice] = measured.setdefault(choice, job.times[choice])

    # The machine compares with the rule's; what was noted of it is forgotten.
    first = Search([Job(task)], builder, runner, lambda *measured: None)
    first.measure(first.jobs[0], [task.rule])
    points = drawn(task, seed)
    best: dict[str, list[Choice]] = {}
    progress: dict[str, list[float]] = {}
    for how in (LEARNED, RANDOM):
        order.clear()
        job = Job(task)
        search = Search([job], builder, runner, note)
        search.measure(job, points[:WARM_UP])
        more = trials - WARM_UP + trials // 4  # some candidates fail, and some are met again
        if how == LEARNED:
            explore(search, records, more, seed)
        else:
            for i in range(WARM_UP, WARM_UP + more, BATCH):
                search.measure(job, points[i : i + BATCH])
        progress[how] = best_so_far([measured[choice] for choice in order[:trials]])
        best[how] = sorted(order[:trials], key=lambda choice: measured[choice])[:FINALISTS]
    finalists = dict.fromkeys([task.rule, *best[LEARNED], *best[RANDOM]])
    again = search.compare(job, list(finalists), FINAL_ROUNDS)
    times = {choice: median(seconds) for choice, seconds in again.items()}
    return {
        "points": len(points),
        "curves": progress,
        "rule": times[task.rule],
        "found": {how: min(times[choice] for choice in some) for how, some in best.items()},
    }


def lead(task: dict[str, Any]) -> float:
    """How many times as long the random search's best takes, on average over equal trials."""
    learned, at_random = (task["curves"][how][WARM_UP:] for how in (LEARNED, RANDOM))
    return mean(at_random) / mean(learned)


def verdict(task: dict[str, Any]) -> str:
    """Which search was ahead, on average over the trials behind those that they share."""
    ratio = lead(task)
    if max(ratio, 1 / ratio) < 1 + SAME:
        return "same"
    return LEARNED if ratio > 1 else RANDOM


def picture(tasks: Sequence[dict[str, Any]], path: Path) -> None:
    """Small multiples, one per task: time over the rule's, against trials."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    columns = 5
    rows = -(-len(tasks) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(11, 2.1 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks, strict=False):
        for how, colour in ((RANDOM, "0.6"), (LEARNED, "C0")):
            times = task["curves"][how]
            relative = [seconds / task["rule"] for seconds in times]
            axis.step(range(1, len(times) + 1), relative, where="post", color=colour, label=how)
        axis.axhline(1, color="0.8", linewidth=0.8)
        axis.set_title(f"{task['model']}\n{task['layer']}", fontsize=7)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.supxlabel("trials", fontsize=8)
    figure.supylabel("best time / the rule's", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="network:variant of the standing set")
    parser.add_argument("--tasks", type=int, default=5, help="of each model")
    parser.add_argument("--trials", type=int, default=32, help="of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    target = resolve(options.target)
    tasks: list[dict[str, Any]] = []
    for model in options.models:
        network, _, variant = model.partition(":")
        found = model_tasks(str(zoo.load(network, variant)), target)
        some = chosen(found, options.tasks)
        own = {task.key for task in found}
        records = [r for r in shipped_records(target) if r.task not in own]
        with measuring(some, target) as (workshop, machine):
            for task in some:
                both = curves(task, records, options.trials, options.seed, workshop, machine)
                entry = {"model": model, "layer": task.names[0], **both}
                tasks.append({**entry, "ahead": verdict(entry)})
                Console(stderr=True).print(f"{model} {task.names[0]}: {tasks[-1]['ahead']}")
                if options.json:
                    content = {
                        "target": target.name,
                        "trials": options.trials,
                        "seed": options.seed,
                        "tasks": tasks,
                    }
                    options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.svg:
        picture(tasks, options.svg)
    table = Table("model", "layer", "points", "rule us", "xgboost us", "random us", "lead", "ahead")
    for entry in tasks:
        shown = [entry["rule"], entry["found"][LEARNED], entry["found"][RANDOM]]
        cells = [str(entry["points"]), *(f"{seconds * 1e6:.1f}" for seconds in shown)]
        cells += [f"{lead(entry):.2f}x", entry["ahead"]]
        table.add_row(entry["model"], entry["layer"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
