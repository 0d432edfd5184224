"""Does learning pay? Best time so far against trials: MetaSchedule with XGBoost, and at random.

Both start from the rule's choice and search the same space with the same evolutionary search; one
lets the cost model pick candidates, the other picks at random. As in any search the cost model has
learnt from the shipped records before, here without those of the network's own tasks. A candidate
that both try is measured once. What each search found is measured again in the end, in turns, for
the fastest of many single measurements is the luckiest, too.

    python -m benchmarks.tuning_curves resnet18:8x1@0.1 resnet18:1x1@0.1 --tasks 5 --trials 32 \\
        --json benchmarks/results/tuning_curves.json --svg docs/tuning-curves.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import zoo
from benchmarks.tuning_tasks import measuring
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.targets import resolve
from tvm_pivot.tuning.explore import explore
from tvm_pivot.tuning.machine import CandidateBuilder, LocalMachine, LocalRunner, Workshop
from tvm_pivot.tuning.records import TuningRecord
from tvm_pivot.tuning.search import Job, Search
from tvm_pivot.tuning.selection import shipped_records
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.tuner import model_tasks

LEARNED, RANDOM = "xgboost", "random"
# Closer than this, two searches found the same.
SAME = 0.01
FINAL_ROUNDS = 6


def best_so_far(times: Sequence[float]) -> list[float]:
    """The smallest time up to each trial."""
    return [min(times[: i + 1]) for i in range(len(times))]


def chosen(tasks: Sequence[LayerTask], count: int) -> list[LayerTask]:
    """Those tasks that take longest, for they are worth tuning."""
    return sorted(tasks, key=lambda task: -task.plan.cycles * len(task.names))[:count]


def curves(
    task: LayerTask,
    records: Sequence[TuningRecord],
    trials: int,
    seed: int,
    workshop: Workshop,
    machine: LocalMachine,
) -> dict[str, dict[str, Any]]:
    """Both searches, for as many trials each, in seconds.

    Returns:
        "curves": the best time so far. "found": the times of what each found, measured in turns.
    """
    progress: dict[str, list[float]] = {}
    best: dict[str, Choice] = {}
    measured: dict[Choice, float] = {}
    for how in (LEARNED, RANDOM):
        job, order = Job(task), list[Choice]()

        def note(job: Job, choice: Choice, _: Sequence[float], order: list[Choice] = order) -> None:
            order.append(choice)
            job.times[choice] = measured.setdefault(choice, job.times[choice])

        builder, runner = CandidateBuilder(workshop), LocalRunner(machine)
        search = Search([job], builder, runner, note, learn=how == LEARNED)
        search.measure(job, [task.rule])
        # Some candidates fail, and some are met again.
        explore(search, records, trials + trials // 4, seed)
        tried = order[:trials]
        progress[how] = best_so_far([measured[choice] for choice in tried])
        best[how] = min(tried, key=lambda choice: measured[choice])
    again = search.compare(job, list(dict.fromkeys(best.values())), FINAL_ROUNDS)
    return {
        "curves": progress,
        "found": {how: median(again[choice]) for how, choice in best.items()},
    }


def verdict(task: dict[str, Any]) -> str:
    """Which search found the faster kernel."""
    learned, random = (task["found"][how] for how in (LEARNED, RANDOM))
    if abs(learned / random - 1) < SAME:
        return "same"
    return LEARNED if learned < random else RANDOM


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
            relative = [seconds / times[0] for seconds in times]
            axis.step(range(1, len(times) + 1), relative, where="post", color=colour, label=how)
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
                tasks.append({**entry, "better": verdict(entry)})
                Console(stderr=True).print(f"{model} {task.names[0]}: {tasks[-1]['better']}")
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
    table = Table("model", "layer", "rule us", "xgboost us", "random us", "better")
    for entry in tasks:
        shown = [entry["curves"][LEARNED][0], entry["found"][LEARNED], entry["found"][RANDOM]]
        cells = [f"{seconds * 1e6:.1f}" for seconds in shown]
        table.add_row(entry["model"], entry["layer"], *cells, entry["better"])
    Console().print(table)


if __name__ == "__main__":
    main()
