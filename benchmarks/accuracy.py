"""What pruning costs in accuracy, and what it buys in time: ResNets on CIFAR-10.

    python -m benchmarks.accuracy --data ../shared/data

Each trained network is first fine-tuned dense on the images at hand; that network is the teacher of
all others. Then every variant starts from it and trains for the same number of epochs with the same
settings: dense, unstructured, 8x1 blocks of neighbouring rows, and blocks whose rows are chosen (a
pivot). Runs go side by side, one thread each. Then each pruned network is
compiled and timed beside the dense one, with nothing else running. After each step the results are
written, and a second start goes on with what is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

for _name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
import torch
from torch import Tensor, nn

import tvm_pivot
from benchmarks.cifar_training import (
    Split,
    Training,
    accuracy,
    cached_split,
    epoch_printer,
    to_input,
    train,
)
from benchmarks.zoo import DEFAULT_CACHE, SHARED_DATA, build_torch
from tvm_pivot.bench.machine import describe_machine
from tvm_pivot.prune.settings import Saliency

RESULTS = REPOSITORY / "benchmarks" / "results" / "accuracy.json"
NETWORKS = ("resnet20", "resnet56")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe(Training):
    """What decides the results, the same for all variants."""

    train_images: int = 20_000
    test_images: int = 10_000
    dense_epochs: int = 3
    dense_lr: float = 0.02
    epochs: int = 6
    lr: float = 0.05
    ramp: float = 0.4  # share of the steps over which density falls
    settle: float = 0.6  # share after which blocks stay as they are
    saliency: Saliency = "relative"  # every convolution has a batch norm behind it


@dataclass(frozen=True)
class Variant:
    """A way to prune: its name in the results, the block, and whether rows are chosen."""

    name: str
    block: str
    pivot: bool


DENSE = Variant("dense", "1x1", False)
UNSTRUCTURED = Variant("unstructured", "1x1", False)
NEIGHBOURS = Variant("8x1 neighbours", "8x1", False)
PIVOT = Variant("8x1 pivot", "8x1", True)
VARIANTS = (
    UNSTRUCTURED,
    NEIGHBOURS,
    PIVOT,
    Variant("4x1 pivot", "4x1", True),
    Variant("16x1 pivot", "16x1", True),
)


@dataclass(frozen=True)
class Run:
    """One network, pruned one way, with one seed."""

    network: str
    variant: Variant
    sparsity: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.network} {self.variant.name} {self.sparsity:g} seed {self.seed}"


def runs() -> Iterator[Run]:
    """All of them, those that answer the question first."""
    for seed in SEEDS:
        for variant in (DENSE, UNSTRUCTURED, NEIGHBOURS, PIVOT):
            yield Run("resnet20", variant, 0.0 if variant is DENSE else 0.9, seed)
    for seed in SEEDS:
        for variant in VARIANTS[3:]:
            yield Run("resnet20", variant, 0.9, seed)
    for variant in (DENSE, *VARIANTS):
        yield Run("resnet56", variant, 0.0 if variant is DENSE else 0.9, 0)
    for sparsity in (0.8, 0.95):
        for variant in VARIANTS:
            yield Run("resnet20", variant, sparsity, 0)


def make_net(network: str) -> nn.Module:
    """The trained dense network as it was published, to be trained further."""
    net, _ = build_torch(f"{network}_cifar")
    return net.requires_grad_(True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def teacher_path(network: str, recipe: Recipe) -> Path:
    """Where the dense network that was fine-tuned is kept."""
    settings = f"{recipe.train_images}x{recipe.dense_epochs}"
    return DEFAULT_CACHE / f"{network}_fine_tuned_{settings}.pt"


def make_teacher(network: str, data: Path, recipe: Recipe) -> None:
    """Fine-tune the dense network on the images at hand, unless that was done."""
    path = teacher_path(network, recipe)
    if path.is_file():
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, (images, test) = make_net(network), splits(data, recipe)
    report = epoch_printer(f"{network} fine-tuned", net, test)
    train(net, images, recipe, recipe.dense_epochs, recipe.dense_lr, report)
    save(net, path)


def pruned_path(key: str) -> Path:
    """Where a pruned network waits to be timed."""
    return DEFAULT_CACHE / "accuracy" / f"{key.replace(' ', '_')}.pt"


def save(net: nn.Module, path: Path) -> None:
    """Write a network's weights, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def splits(data: Path, recipe: Recipe) -> tuple[Split, Split]:
    """Training and test images."""
    images = cached_split(data, "train", recipe.train_images)
    return images, cached_split(data, "test", recipe.test_images)


def perform(run: Run, data: Path, recipe: Recipe) -> dict[str, Any]:
    """Train one variant, score it, and keep it to be timed."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    images, test = splits(data, recipe)
    net = load(run.network, teacher_path(run.network, recipe))
    teacher = copy.deepcopy(net).eval()
    torch.manual_seed(run.seed)
    pruner = None
    if run.variant is not DENSE and run.sparsity:
        pruner = tvm_pivot.pruner(
            net,
            density=1 - run.sparsity,
            block=run.variant.block,
            pivot=run.variant.pivot,
            steps=recipe.epochs * (len(images.labels) // recipe.batch),
            ramp=recipe.ramp,
            settle=recipe.settle,
            saliency=recipe.saliency,
            seed=run.seed,
        )
    report = epoch_printer(run.key, net, test)
    step = None if pruner is None else pruner.step
    train(net, images, recipe, recipe.epochs, recipe.lr, report, teacher, step)
    facts: dict[str, Any] = {"density": 1.0, "speed_up": 1.0}
    if pruner is not None:
        facts = {"density": pruner.finalize().density}
        save(net, pruned_path(run.key))
    return {
        "network": run.network,
        "variant": run.variant.name,
        "sparsity": run.sparsity,
        "seed": run.seed,
        "accuracy": accuracy(net, test),
        **facts,
        "minutes": (time.perf_counter() - start) / 60,
    }


def load(network: str, weights: Path) -> nn.Module:
    """A network with the weights that `save` wrote."""
    net = make_net(network)
    net.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return net


def speed_up(dense: nn.Module, pruned: nn.Module, test: Split) -> float:
    """How many times as fast one image passes the pruned network, one thread each."""
    from tvm_pivot.prune.measure import time_ratio  # training needs no compiler

    image: Tensor = to_input(test.pixels[:1]).contiguous()
    sessions = [
        tvm_pivot.build(
            net.to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
            example_inputs=image,
            sparse=net is pruned,
            threads=1,
        )
        for net in (dense.eval(), pruned.eval())
    ]
    return time_ratio(sessions[0], sessions[1], image)


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Mean and spread over the seeds of each variant, and how much of the gap the pivot closes."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["network"], result["sparsity"], result["variant"])
        found.setdefault(key, []).append(result)
    lines = []
    for (network, sparsity, variant), own in sorted(found.items()):
        scores = [result["accuracy"] for result in own]
        spread = f" +- {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        faster = statistics.median(result.get("speed_up", math.nan) for result in own)
        lines.append(
            f"{network} {sparsity * 100:3.0f} % {variant:<15} {statistics.mean(scores):6.2f}"
            f"{spread} %, {faster:.2f}x as fast, {len(own)} seeds"
        )
    closed = gap_closed(found)
    return (
        lines if closed is None else [*lines, f"the pivot closes {closed * 100:.0f} % of the gap"]
    )


def gap_closed(found: dict[tuple[str, float, str], list[dict[str, Any]]]) -> float | None:
    """The share of what neighbours lose against single weights at 90 % that the pivot wins back."""
    means = []
    for variant in (UNSTRUCTURED, NEIGHBOURS, PIVOT):
        own = found.get(("resnet20", 0.9, variant.name))
        if own is None:
            return None
        means.append(statistics.mean(result["accuracy"] for result in own))
    free, neighbours, pivot = means
    return (pivot - neighbours) / (free - neighbours) if free > neighbours else None


def write(path: Path, recipe: Recipe, results: dict[str, dict[str, Any]]) -> None:
    """The results so far, whole or not at all."""
    facts = {"recipe": asdict(recipe), "machine": asdict(describe_machine()), "runs": results}
    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The results of an earlier start; none if they were made with another recipe."""
    if not path.is_file():
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = facts["runs"]
    return found if facts["recipe"] == asdict(recipe) else {}


def main() -> None:
    """Command line: where the data lies, what of the recipe to change, and which runs."""
    parser = argparse.ArgumentParser(description="Accuracy of pruned ResNets on CIFAR-10.")
    parser.add_argument("--data", type=Path, default=SHARED_DATA)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--timing", action=argparse.BooleanOptionalAction, default=True)
    for name, default in asdict(Recipe()).items():
        action: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            action = {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + name.replace("_", "-"), default=default, **action)
    options = vars(parser.parse_args())
    names = ("data", "json", "processes", "only", "timing")
    data, path, processes, only, timing = (options.pop(name) for name in names)
    recipe = Recipe(**options)
    results = read(path, recipe)
    chosen = [run for run in runs() if only in run.key]
    splits(data, recipe)  # decoded once, before several processes want them
    for run, result in train_all(chosen, results, processes, data, recipe):
        results[run.key] = result
        write(path, recipe, results)
    for run in chosen if timing else []:
        if "speed_up" not in results[run.key]:
            dense = load(run.network, teacher_path(run.network, recipe))
            pruned = load(run.network, pruned_path(run.key))
            results[run.key]["speed_up"] = speed_up(dense, pruned, splits(data, recipe)[1])
            write(path, recipe, results)
    print("\n".join(summary(list(results.values()))))


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it is gone, killed for instance."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait_and_end() -> None:
        wait([parent.sentinel])
        os._exit(1)  # training is in the way of anything gentler

    threading.Thread(target=wait_and_end, daemon=True).start()


def train_all(
    chosen: list[Run],
    results: dict[str, dict[str, Any]],
    processes: int,
    data: Path,
    recipe: Recipe,
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Train the runs that have no result yet, several at a time; yield each as it ends."""
    todo = [run for run in chosen if run.key not in results]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, end_with_parent) as pool:
        networks = sorted({run.network for run in todo})
        for made in [pool.submit(make_teacher, net, data, recipe) for net in networks]:
            made.result()
        started = {pool.submit(perform, run, data, recipe): run for run in todo}
        for done in as_completed(started):
            yield started[done], done.result()


if __name__ == "__main__":
    main()
