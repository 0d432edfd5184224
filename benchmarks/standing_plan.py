"""What `make bench` measures, in which order, and how its results are summed up as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from tvm_pivot.bench.results import Comparison, Result

# Smallest memory first.
NETWORKS = (
    "mlp",
    "lstm",
    "resnet20_cifar",
    "ultraface",
    "mobilenet_v2",
    "mobilenet_v1",
    "bert2",
    "resnet18",
    "resnet50",
    "vgg16",
)
RUNTIMES = (
    "pivot",
    "pivot-dense",
    "mnn",
    "mnn-sparse",
    "litert",
    "onnxruntime",
    "openvino",
    "openvino-sparse",
    "deepsparse",
)
OURS, YARDSTICK = "pivot", "onnxruntime"
# A runtime that computes zeros takes the same time at any density: two files show that. On the
# others only those that skip zeros run, and one that does not, to compare with.
EVERY_RUNTIME = ("dense", "8x1@0.1")
# In order of importance: what the time does not suffice for is left out from the end.
TIERS = (
    EVERY_RUNTIME,
    ("1x1@0.1", "dlmc@0.1"),
    ("16x1@0.1", "8x1@0.2", "8x1@0.05", "1x1@0.2", "1x1@0.05"),
    ("4x1@0.1", "16x1@0.2", "16x1@0.05", "4x1@0.2", "4x1@0.05", "dlmc@0.2", "dlmc@0.05"),
)
VARIANTS = tuple(variant for tier in TIERS for variant in tier)
# The last tiers show how times change with density and block: there the first number of threads
# must do, and DeepSparse, which takes seconds to load a file, is not among the runtimes.
LAST_TIERS = tuple(variant for tier in TIERS[2:] for variant in tier)
SLOW_TO_LOAD = "deepsparse"
# It skips no arithmetic, only bytes that are read: the files of one tier show how much that is.
SAVES_BYTES = "openvino-sparse"
# Sparse options on the dense files, and our dense build of what runs dense anyway, show nothing.
NOT_ON_DENSE = ("pivot-dense", "mnn-sparse", SAVES_BYTES)
# Conversions that take minutes; each is the same network again, with other weights.
DENSE_ONLY = (("vgg16", "litert"),)
QUICK_NETWORKS, QUICK_VARIANTS = ("mlp", "lstm"), ("dense", "8x1@0.1")
# Made and converted side by side, so many files leave no core idle for long. VGG-16's take half a
# gigabyte each, and as much again for every runtime that they are converted for.
FILES, HEAVY_FILES = 6, 2
HEAVY = ("vgg16",)

File = tuple[str, str]
"""A network and a variant of it."""
Batch = tuple[File, ...]
"""Files that are made and converted side by side, and then measured one after the other."""


def batches(networks: Sequence[str], variants: Sequence[str]) -> list[Batch]:
    """All that is to be measured, the most important first; within that, small networks first."""
    order = sorted(networks, key=lambda n: NETWORKS.index(n) if n in NETWORKS else len(NETWORKS))
    own = tuple(variant for variant in variants if variant not in VARIANTS)
    found: list[Batch] = []
    for tier in (*TIERS[:1], own, *TIERS[1:]):
        files = [(n, v) for n in order for v in tier if v in variants and has_variant(n, v)]
        found += _split([file for file in files if file[0] not in HEAVY], FILES)
        found += _split([file for file in files if file[0] in HEAVY], HEAVY_FILES)
    return found


def _split(files: Sequence[File], most: int) -> Iterator[Batch]:
    """Files in batches of about the same size, and at most `most`."""
    count = -(-len(files) // most)
    for index in range(count):
        yield tuple(files[index * len(files) // count : (index + 1) * len(files) // count])


def has_variant(network: str, variant: str) -> bool:
    """Whether there is such a variant: DLMC's masks are of ResNet-50."""
    return not variant.startswith("dlmc@") or network == "resnet50"


def runtimes_for(
    network: str, variant: str, runtimes: Sequence[str], skipping: Iterable[str]
) -> list[str]:
    """The runtimes to measure on a variant of a network.

    Args:
        runtimes: those asked for.
        skipping: those of them that skip zeros.
    """
    if variant == "dense":
        return [name for name in runtimes if name not in NOT_ON_DENSE]
    wanted = set(runtimes) if variant in EVERY_RUNTIME else {OURS, YARDSTICK, *skipping}
    wanted -= {name for heavy, name in DENSE_ONLY if heavy == network}
    if variant not in TIERS[1]:
        wanted.discard(SAVES_BYTES)
    if variant in LAST_TIERS:
        wanted.discard(SLOW_TO_LOAD)
    return [name for name in runtimes if name in wanted]


def threads_for(variant: str, threads: Sequence[int]) -> Sequence[int]:
    """The numbers of threads to measure a variant with, of those asked for."""
    return threads[:1] if variant in LAST_TIERS else threads


def model_name(network: str, variant: str) -> str:
    """What a variant of a network is called in results."""
    return f"{network} {variant}"


def summary(comparison: Comparison) -> Iterator[str]:
    """Lines of a table per number of threads: our times, and each rival's as a multiple of ours."""
    rivals = list(dict.fromkeys(r.runtime for r in comparison.results if r.runtime != OURS))
    for threads in sorted({r.threads for r in comparison.results}):
        found = {(r.model, r.runtime): r for r in comparison.results if r.threads == threads}
        rows = [["", f"{OURS}, ms", *rivals]]
        ratios: dict[tuple[bool, str], list[float]] = {}
        for model in comparison.models:
            ours = found.get((model.name, OURS))
            cells = []
            for rival in rivals:
                value = ratio(found.get((model.name, rival)), ours)
                if value is not None:
                    ratios.setdefault((model.variant == "dense", rival), []).append(value)
                cells.append(_cell(found.get((model.name, rival)), value))
            rows.append([model.name, _time(ours), *cells])
        for dense, title in ((True, "dense, geometric mean"), (False, "pruned, geometric mean")):
            means = [_mean(ratios.get((dense, rival), [])) for rival in rivals]
            rows.append([title, "", *means])
        plural = "" if threads == 1 else "s"
        yield f"{threads} thread{plural}; rivals' times over ours (above 1, ours is faster)"
        yield from aligned(rows)
        yield ""


def ratio(rival: Result | None, ours: Result | None) -> float | None:
    """How many times ours a rival takes; None unless both ran."""
    if rival is None or ours is None or rival.median_ms is None or not ours.median_ms:
        return None
    return rival.median_ms / ours.median_ms


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        rest = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((first.ljust(widths[0]), *rest)).rstrip()


def _cell(rival: Result | None, value: float | None) -> str:
    if value is not None:
        return f"{value:.2f}"
    # Ours may have failed where the rival did not.
    return "-" if rival is None else _time(rival)


def _time(result: Result | None) -> str:
    if result is None:
        return "-"
    return result.status if result.median_ms is None else f"{result.median_ms:.3g}"


def _mean(values: Sequence[float]) -> str:
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}" if values else "-"
