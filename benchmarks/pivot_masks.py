"""What pivoting does for masks of really pruned networks: `python -m benchmarks.pivot_masks`.

The fill of blocks on DLMC masks as they are, with orders that others have published (see
`pivot_baselines`), and with `find_pivot`; the time of a few layers' kernels with the rows in their
own order and in the one the compiler finds, interleaved in one process on one thread; and the CPU
time of the search over all layers of a ResNet-50.

One layer of every shape up to a million weights is taken; ``--all`` takes every layer, but only the
best of the rivals. ``--only`` measures some methods' fills again and keeps all else that was found.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tvm import relax

from benchmarks import zoo
from benchmarks.layers import compiled, interleaved
from benchmarks.pivot_baselines import BASELINES, fill, natural, two_sided
from tvm_pivot.bench.machine import describe_machine
from tvm_pivot.layout import BlockShape
from tvm_pivot.pivot import Pivot, find_pivot
from tvm_pivot.pivot_groups import BoolArray
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import candidates, plan_layer
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.relay_passes.pivot_layer import SearchTime
from tvm_pivot.targets import PivotTarget, resolve

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "pivot_masks.json"
FILES = (
    "dlmc_rn50_magnitude_0.8",
    "dlmc_rn50_magnitude_0.9",
    "dlmc_rn50_magnitude_0.95",
    "dlmc_transformer_magnitude_0.9",
)
BLOCKS = (BlockShape(2), BlockShape(4), BlockShape(8), BlockShape(4, 4), BlockShape(8, 8))
QUICK = "Jaccard + swaps"
NATURAL, OURS = "as it is", "find_pivot"
METHODS = (NATURAL, *BASELINES, OURS)
MOST_WEIGHTS = 1 << 20
# Pixels of the layers that are timed, and how often candidates take turns.
PIXELS, ROUNDS = 196, 40
TIMED = (
    ("dlmc_rn50_magnitude_0.9", "bottleneck_3_block_group_projection_block_group1"),
    ("dlmc_rn50_magnitude_0.9", "bottleneck_3_block_group2_1_1"),
    ("dlmc_rn50_magnitude_0.9", "bottleneck_3_block_group2_2_1"),
    ("dlmc_rn50_magnitude_0.8", "bottleneck_3_block_group2_1_1"),
    ("dlmc_rn50_magnitude_0.8", "bottleneck_3_block_group3_2_1"),
    ("dlmc_rn50_magnitude_0.95", "bottleneck_1_block_group2_1_1"),
)


@dataclass(frozen=True)
class Fills:
    """The fill of one mask's blocks, by method, and the seconds that `find_pivot` took."""

    file: str
    layer: str
    shape: tuple[int, int]
    nonzeros: int
    block: str
    fills: dict[str, float]
    kind: str
    seconds: float


def masks_of(file: str, every: bool) -> Iterator[tuple[str, BoolArray]]:
    """Name and mask of the layers of a file: the first of each shape, not too large, or all."""
    seen = set()
    with np.load(DATA / f"{file}.npz") as archive:
        for name in (n for n in archive.files if not n.endswith(".shape")):
            rows, columns = (int(extent) for extent in archive[f"{name}.shape"])
            if every or ((rows, columns) not in seen and rows * columns <= MOST_WEIGHTS):
                seen.add((rows, columns))
                bits = np.unpackbits(archive[name], axis=1)[:, :columns]
                yield name, bits.astype(np.bool_)


def measure_fills(
    file: str,
    name: str,
    mask: BoolArray,
    block: BlockShape,
    methods: Collection[str],
    before: Fills | None = None,
) -> Fills:
    """One mask and block with some methods, and with all others as they were found `before`."""
    fills = {} if before is None else dict(before.fills)
    for key, order in {NATURAL: natural, **BASELINES}.items():
        if key in methods:
            fills[key] = fill(mask, two_sided(order, mask, block), block)
    shape = (mask.shape[0], mask.shape[1])
    nonzeros = int(np.count_nonzero(mask))
    if before is None or OURS in methods:
        seconds, pivot = timed_pivot(mask, block)
        fills[OURS], kind = pivot.fill, pivot.kind
    else:
        seconds, kind = before.seconds, before.kind
    fills = {key: fills[key] for key in METHODS if key in fills}
    return Fills(file, name, shape, nonzeros, str(block), fills, kind, seconds)


def timed_pivot(mask: BoolArray, block: BlockShape) -> tuple[float, Pivot]:
    """The CPU seconds of a search that no time limit ends, and what it finds."""
    began = time.process_time()
    pivot = find_pivot(mask, block, seconds=60.0)
    return time.process_time() - began, pivot


def search_network(name: str, masks: Iterable[BoolArray]) -> dict[str, Any]:
    """The CPU time of searching 8x1 blocks in all layers of a network."""
    seconds = [timed_pivot(mask, BlockShape(8))[0] for mask in masks]
    return {
        "network": name,
        "layers": len(seconds),
        "cpu_seconds": sum(seconds),
        "longest": max(seconds),
    }


def search_networks() -> Iterator[dict[str, Any]]:
    """ResNet-50 with random weights, and as others have pruned it."""
    net, _ = zoo.build_torch("resnet50", "1x1@0.1")
    weights = zoo.prunable_weights(zoo.find("resnet50"), net).values()
    yield search_network("resnet50 1x1@0.1", (w.flatten(1).numpy() != 0 for w in weights))
    for file in (f for f in FILES if "rn50" in f):
        yield search_network(file, (mask for _, mask in masks_of(file, every=True)))


def show_networks(found: list[dict[str, Any]], console: Console) -> None:
    """A line per network."""
    for f in found:
        console.print(
            f"search for 8x1 blocks in all {f['layers']} layers of {f['network']}: "
            f"{f['cpu_seconds']:.1f} s of CPU time, at most {f['longest']:.1f} s in a layer"
        )


def mean_fill(found: list[Fills], method: str) -> float:
    """Non-zeros per slot over all masks together."""
    return sum(f.nonzeros for f in found) / sum(f.nonzeros / f.fills[method] for f in found)


def show_fills(found: list[Fills], console: Console) -> None:
    """A table with one line per file and block."""
    methods = list(found[0].fills)
    table = Table("masks", "block", *methods, "least, to " + QUICK, "CPU s")
    for file in dict.fromkeys(f.file for f in found):
        for block in map(str, BLOCKS):
            group = [f for f in found if (f.file, f.block) == (file, block)]
            means = [f"{mean_fill(group, method):.3f}" for method in methods]
            least = min(f.fills[OURS] / f.fills[QUICK] for f in group)
            seconds = sum(f.seconds for f in group)
            name = file.removeprefix("dlmc_").replace("_magnitude", "")
            table.add_row(name, block, *means, f"{least:.3f}", f"{seconds:.1f}")
    console.print(table)


def planted_masks() -> Iterator[tuple[str, BoolArray]]:
    """Structured masks whose rows and columns are shuffled, with some noise."""
    rng = np.random.default_rng(0)
    blocks = np.repeat(rng.random((64, 512)) < 0.1, 8, axis=0)
    diagonal = np.arange(512)[:, None] // 64 == np.arange(512) // 64
    for name, mask in (("8x1 blocks", blocks), ("8 diagonal blocks", diagonal)):
        noisy = mask | (rng.random(mask.shape) < 0.002)
        yield f"planted {name}", noisy[np.ix_(rng.permutation(512), rng.permutation(512))]


def time_layer(name: str, mask: BoolArray, target: PivotTarget) -> dict[str, Any]:
    """Microseconds of the kernel that the compiler chooses without and with a pivot."""
    rng = np.random.default_rng(0)
    n, k = mask.shape
    weight = np.where(mask, rng.standard_normal((n, k)), 0).astype(np.float32)
    geometry = ConvGeometry(1, k, n, AxisGeometry(1, 1), AxisGeometry(PIXELS, 1))
    layer = Layer(relax.Var("layer"), "dense", (k, n), weight, geometry)
    x = rng.standard_normal((k, PIXELS)).astype(np.float32)
    plans = {
        "without": min(candidates(layer, target, keep_all=False), key=lambda p: p.cycles),
        "with": plan_layer(layer, target, True, SearchTime(60.0)).plan,
    }
    calls = {key: compiled(layer, plan, target, x) for key, plan in plans.items()}
    outputs = []
    for call, out in calls.values():
        call()
        outputs.append(out.numpy())
    np.testing.assert_allclose(*outputs, atol=1e-3)
    times = interleaved({key: call for key, (call, _) in calls.items()}, ROUNDS)
    low = {key: 1e6 * min(t) for key, t in times.items()}
    return {
        "layer": name,
        "shape": [n, k],
        "pixels": PIXELS,
        "density": float(mask.mean()),
        "pivot": plans["with"].pivot,
        "blocks": {key: f"{plan.block_rows}x1" for key, plan in plans.items()},
        "predicted_gain": plans["without"].cycles / plans["with"].cycles,
        "us_min": low,
        "us_median": {key: 1e6 * median(t) for key, t in times.items()},
        "gain": low["without"] / low["with"],
    }


def timed_masks() -> Iterator[tuple[str, BoolArray]]:
    """The masks whose kernels are timed."""
    for file, wanted in TIMED:
        for name, mask in masks_of(file, every=True):
            if name == wanted:
                yield f"{file.removeprefix('dlmc_')} {name}", mask
    yield from planted_masks()


def show_times(found: list[dict[str, Any]], console: Console) -> None:
    """A table with one line per layer."""
    table = Table("layer", "density", "without: us", "with: us", "gain", "predicted", "pivot")
    for f in found:
        cells = [f"{f['us_min'][key]:.1f} ({f['blocks'][key]})" for key in ("without", "with")]
        gains = [f"{f[key]:.2f}x" for key in ("gain", "predicted_gain")]
        table.add_row(f["layer"], f"{f['density']:.2f}", *cells, *gains, f["pivot"] or "-")
    console.print(table)


def read_fills(path: Path) -> dict[tuple[str, str, str], Fills]:
    """The fills of an earlier run, by file, layer and block."""
    rows = json.loads(path.read_text())["fills"]
    fills = [Fills(**{**row, "shape": tuple(row["shape"])}) for row in rows]
    return {(f.file, f.layer, f.block): f for f in fills}


def all_fills(args: argparse.Namespace) -> list[Fills]:
    """The fills of all masks and blocks asked for."""
    methods = args.only or ((NATURAL, QUICK, OURS) if args.all else METHODS)
    before = read_fills(args.json) if args.only else {}
    return [
        measure_fills(file, name, mask, block, methods, before.get((file, name, str(block))))
        for file in args.files
        for name, mask in masks_of(file, args.all)
        for block in BLOCKS
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every layer, fewer rivals")
    parser.add_argument("--files", nargs="*", choices=FILES, default=FILES)
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the results there")
    parser.add_argument("--only", nargs="*", choices=METHODS, help="the others as --json has them")
    return parser.parse_args()


def main() -> int:
    args, console = parse(), Console(width=160)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if args.only:
        data = json.loads(args.json.read_text())
        data["again"] = {**data.get("again", {}), **dict.fromkeys(args.only, date)}
    else:
        command = "python -m benchmarks.pivot_masks" + (" --all" if args.all else "")
        data = {"date": date, "command": command, "machine": asdict(describe_machine())}
    found = all_fills(args)
    data["fills"] = [asdict(f) for f in found]
    if not args.only:
        target = replace(resolve("x86"), cores=1)
        data["times"] = [time_layer(name, mask, target) for name, mask in timed_masks()]
    if not args.only or OURS in args.only:
        data["networks"] = list(search_networks())
    show_times(data["times"], console)
    show_fills(found, console)
    show_networks(data["networks"], console)
    ratio = fmean(f.fills[OURS] / f.fills[QUICK] for f in found)
    console.print(f"{len(found)} masks and blocks; mean fill over that of {QUICK}: {ratio:.3f}")
    args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
