"""Draws the pictures of docs/pivoting.md: ``python -m benchmarks.pivot_pictures``.

Masks before and after pivoting: a planted one, one of a really pruned ResNet-50 (DLMC, pruned
without blocks in mind), and a layer of the trained ResNet-20 that is pruned with a pivot here. And
what it comes to: the speed-up of the standing networks against the share of their operations that
is kept, from ``results/standing_set.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

REPOSITORY = Path(__file__).resolve().parents[1]
import tvm_pivot
from benchmarks.pivot_masks import masks_of, planted_masks
from benchmarks.zoo.data import cifar_resnet_state
from benchmarks.zoo.vision import CifarResNet
from tvm_pivot.layout import BlockShape
from tvm_pivot.pivot import find_pivot
from tvm_pivot.pivot_groups import BoolArray

plt.switch_backend("Agg")  # no window

PICTURES = REPOSITORY / "docs"
STANDING = REPOSITORY / "benchmarks" / "results" / "standing_set.json"
BLOCK = BlockShape(8)
SHOWN_COLUMNS = 144
KEPT_SLOT, NON_ZERO = (0.99, 0.80, 0.55), (0.10, 0.25, 0.45)
FAMILIES = {"8x1": "8x1 blocks", "1x1": "unstructured"}
DENSITIES = ("0.05", "0.1", "0.2")
REAL = ("dlmc_rn50_magnitude_0.9", "bottleneck_3_block_group1_1_1")


def masks() -> Iterator[tuple[str, BoolArray]]:
    """A planted mask, one that was pruned without blocks in mind, and one pruned with a pivot."""
    title, mask = next(planted_masks())
    yield f"{title}, 512x512, shuffled", mask
    file, layer = REAL
    yield f"ResNet-50 (DLMC, 90 %), {layer}", dict(masks_of(file, False))[layer]
    net = CifarResNet(3)
    net.load_state_dict(cifar_resnet_state("resnet20_cifar10"), strict=False)
    tvm_pivot.prune(net, density=0.1, block=str(BLOCK))
    weight = net.layer3[1].conv2.weight.detach().numpy()
    yield "ResNet-20, layer3.1.conv2, pruned to 10 % with a pivot", weight.reshape(64, -1) != 0


def draw_mask(axes: Axes, mask: BoolArray, title: str) -> None:
    """Non-zeros dark, the other slots of kept blocks light; rows are in blocks already."""
    columns = min(SHOWN_COLUMNS, mask.shape[1])
    shown = mask[: mask.shape[0] // BLOCK.rows * BLOCK.rows, :columns][:128]
    kept = np.repeat(shown.reshape(-1, BLOCK.rows, columns).any(axis=1), BLOCK.rows, axis=0)
    image = np.ones((*shown.shape, 3))
    image[kept] = KEPT_SLOT
    image[shown] = NON_ZERO
    axes.imshow(image, interpolation="nearest", aspect="equal")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_masks(path: Path) -> None:
    """Each mask before and after, one below the other."""
    found = list(masks())
    figure, rows = plt.subplots(len(found), 2, figsize=(9, 3.3 * len(found)), squeeze=False)
    for (title, mask), (before, after) in zip(found, rows, strict=True):
        pivot = find_pivot(mask, BLOCK, seconds=20)
        natural = np.add.reduceat(mask, np.arange(0, len(mask), BLOCK.rows)).astype(bool).sum()
        fill = np.count_nonzero(mask) / (natural * BLOCK.rows)
        draw_mask(before, mask, f"{title}\nas it is: fill of {BLOCK} blocks {fill:.2f}")
        draw_mask(
            after, mask[pivot.slots()], f"{pivot.kind}\nfill of {BLOCK} blocks {pivot.fill:.2f}"
        )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def speed_ups(results: dict[str, Any], family: str) -> dict[str, list[tuple[float, float]]]:
    """Per network: operations kept, and times as fast as our dense build (1 thread, medians)."""
    times = {
        r["model"]: r["median_ms"]
        for r in results["results"]
        if r["runtime"] == "pivot" and r["threads"] == 1 and r["status"] == "ok"
    }
    kept = {m["name"]: m["flops_kept"] / m["flops_dense"] for m in results["models"]}
    points: dict[str, list[tuple[float, float]]] = {}
    for network in sorted({m["network"] for m in results["models"]}):
        dense = f"{network} dense"
        for name in (f"{network} {family}@{density}" for density in DENSITIES):
            if name in times and dense in times:
                points.setdefault(network, []).append((kept[name], times[dense] / times[name]))
    return points


def draw_speed_ups(path: Path) -> None:
    """One plot for blocks and one for single weights, with the line that is linear."""
    results = json.loads(STANDING.read_text(encoding="utf-8"))
    figure, plots = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    shares = np.geomspace(0.03, 1, 50)
    for axes, (family, title) in zip(plots, FAMILIES.items(), strict=True):
        axes.plot(shares, 1 / shares, color="0.6", linestyle="--", label="linear: 1 / share")
        for number, (network, points) in enumerate(speed_ups(results, family).items()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker="o", markersize=4, color=f"C{number}", label=network)
        axes.set(xscale="log", yscale="log", xlabel="share of multiply-adds kept", title=title)
        ticks = [0.05, 0.1, 0.2, 0.5, 1]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_yticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    plots[0].set_ylabel("speed-up over our own dense build")
    plots[1].legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    plt.rcParams["svg.hashsalt"] = "tvm_pivot"
    draw_masks(PICTURES / "pivot-masks.png")
    draw_speed_ups(PICTURES / "speed-up.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
