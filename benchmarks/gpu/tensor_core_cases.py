"""Build what `tensor_core_timing` measures: tensor-core kernels, compiled, and their tables.

    python -m benchmarks.gpu.tensor_core_cases [--arch sm_90] [--masks DLMC.npz]

prints what each case has to do: megabytes, and the microseconds that each unit of the GPU takes.
`bundle` builds the cases, for which it needs nvcc and no GPU: of each loader and size of cluster
the tile with the shortest predicted time. Their folder holds cubins, tables, weights and
cases.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tvm_pivot.fragments import from_bits, to_bits
from tvm_pivot.layout import BlockShape, FloatArray
from tvm_pivot.pack_tensor_cores import PackedFragments, pack_tensor_cores
from tvm_pivot.pivot import gather_rows
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.schedules.tensor_core_rule import Roofline, candidates, choose_tensor_core_tile
from tvm_pivot.schedules.tensor_cores import (
    TensorCoreProblem,
    TensorCoreTile,
    entry_source,
    kernel_name,
)
from tvm_pivot.targets import PRESETS, Gpu

PIXELS = 4096
DLMC_SHAPES = ((512, 512), (2048, 512), (512, 2048))


CHIPS = {gpu.arch: gpu for name in ("a100", "h100") if (gpu := PRESETS[name].gpu) is not None}


@dataclass(frozen=True, eq=False)
class Case:
    """A weight, in values that float16 holds, in blocks of `rows` x `columns`."""

    name: str
    weight: FloatArray
    rows: int
    columns: int
    slots: np.ndarray | None = None


def random_case(rng: np.random.Generator, n: int, k: int, block: BlockShape, share: float) -> Case:
    """Blocks kept at random."""
    kept = rng.random((n // block.rows, k // block.cols)) < share
    mask = np.kron(kept, np.ones((block.rows, block.cols), np.float32))
    weight = _halves(rng.standard_normal((n, k)).astype(np.float32)) * mask
    return Case(f"{n}x{k} {block}@{share}", weight, block.rows, block.cols)


def _halves(values: FloatArray) -> FloatArray:
    return from_bits(to_bits(values, "float16"), "float16")


def real_cases(rng: np.random.Generator, path: Path) -> Iterator[Case]:
    """One really pruned matrix of each shape, its rows pivoted for 8 x 1 blocks."""
    masks, wanted = np.load(path), set(DLMC_SHAPES)
    for key in masks.files:
        if not key.endswith(".shape") and (shape := tuple(masks[f"{key}.shape"])) in wanted:
            wanted.remove(shape)
            mask = np.unpackbits(masks[key], axis=1)[:, : shape[1]].astype(bool)
            weight = _halves(rng.standard_normal(shape).astype(np.float32)) * mask
            slots = gather_rows(mask, 8)
            yield Case(f"{shape[0]}x{shape[1]} real, pivoted 8x1", weight, 8, 1, slots)


def cases(masks: Path | None) -> Iterator[Case]:
    """Everything that is measured."""
    rng = np.random.default_rng(0)
    for size, share in ((32, 0.1), (32, 0.05), (16, 0.1)):
        yield random_case(rng, PIXELS, PIXELS, BlockShape(size, size), share)
    yield random_case(rng, PIXELS, PIXELS, BlockShape(8), 0.1)
    for n, k in DLMC_SHAPES:
        yield random_case(rng, n, k, BlockShape(8), 0.1)
    if masks is not None:
        yield from real_cases(rng, masks)


def described(case: Case) -> tuple[TensorCoreProblem, float, np.ndarray]:
    """The problem, the share of blocks kept, and the slots of a case."""
    n, k = case.weight.shape
    slots = np.arange(n, dtype=np.int32) if case.slots is None else case.slots
    problem = TensorCoreProblem(
        1, n, k, PIXELS, k * PIXELS, case.rows, slots.size // case.rows, "float16", "float16",
        Epilogue(), block_columns=case.columns,
    )  # fmt: skip
    density = float((case.weight != 0)[slots].reshape(-1, case.rows, k).any(axis=1).mean())
    return problem, density, slots


def table(masks: Path | None, arch: str) -> Iterator[str]:
    """The rooflines of all cases, as lines of a Markdown table: megabytes and microseconds."""
    heads = ["case", "GFLOP", "L2 MB", "shared MB", "memory MB"]
    heads += ["tensor", "L2", "port", "copies", "shared", "memory", "all"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for case in cases(masks):
        problem, density, _ = described(case)
        found = choose_tensor_core_tile(problem, density, CHIPS[arch])
        assert found is not None
        cost = found[1]
        sizes = (cost.l2_bytes, cost.shared_bytes, cost.memory_bytes)
        times = (cost.tensor, cost.l2, cost.port, cost.copies)
        times += (cost.shared, cost.memory, cost.seconds)
        cells = [f"{cost.flops / 1e9:.2f}", *(f"{size / 1e6:.0f}" for size in sizes)]
        cells += [f"{seconds * 1e6:.1f}" for seconds in times]
        yield f"| {case.name} | {' | '.join(cells)} |"


def build(case: Case, out: Path, number: int, arch: str) -> dict[str, object]:
    """Compile and pack a case into `out`; what its entry in cases.json says."""
    problem, density, slots = described(case)
    chosen = _best_of_each_kind(problem, density, CHIPS[arch])
    source, cubin = out / f"case{number}.cu", f"case{number}.cubin"
    source.write_text("".join(entry_source(problem, tile) for tile, _ in chosen))
    flags = ["-std=c++17", "-cubin", f"-arch={arch}", "-o", str(out / cubin)]
    subprocess.run(["nvcc", *flags, str(source)], check=True)
    np.savez_compressed(out / f"case{number}.npz", weight=case.weight.astype(np.float16))
    offsets = np.arange(problem.columns, dtype=np.int32) * PIXELS
    variants = []
    for tile, cost in chosen:
        tables = f"case{number}_{tile.loader}{tile.cluster}.npz"
        packed = pack_tensor_cores(case.weight, tile.team(case.rows), slots=slots, offsets=offsets)
        np.savez_compressed(out / tables, **_tables(packed))
        variants.append(_variant(problem, tile, cost) | {"tables": tables})
    return {
        "name": case.name, "density": density, "pixels": PIXELS, "cubin": cubin,
        "weight": f"case{number}.npz", "variants": variants, "block": [case.rows, case.columns],
    }  # fmt: skip


def _best_of_each_kind(
    problem: TensorCoreProblem, density: float, chip: Gpu
) -> list[tuple[TensorCoreTile, Roofline]]:
    best: dict[object, tuple[TensorCoreTile, Roofline]] = {}
    for tile, cost in candidates(problem, density, chip):
        kind = tile.loader, tile.cluster
        if kind not in best or cost.seconds < best[kind][1].seconds:
            best[kind] = tile, cost
    return list(best.values())


def _variant(problem: TensorCoreProblem, tile: TensorCoreTile, cost: Roofline) -> dict[str, object]:
    return {
        "kernel": f"entry_{kernel_name(problem, tile)}", "tile": asdict(tile),
        "shared": tile.shared_bytes(problem.block_rows), "threads": tile.threads,
        "roofline": asdict(cost), "predicted_us": cost.seconds * 1e6,
    }  # fmt: skip


def _tables(packed: PackedFragments) -> dict[str, np.ndarray]:
    bias = packed.slot_bias(np.zeros(packed.shape[0], np.float32))
    return {f"t{i}": table for i, table in enumerate((*packed.tables, bias))}


def build_all(out: Path, arch: str, masks: Path | None, only: str = "") -> list[str]:
    """Build the cases with `only` in their names; returns these names."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in cases(masks) if only in case.name]
    built = [build(case, out, number, arch) for number, case in enumerate(chosen)]
    (out / "cases.json").write_text(json.dumps(built, indent=1))
    return [case.name for case in chosen]


def main() -> None:
    """Print the rooflines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=sorted(CHIPS), default="sm_90")
    parser.add_argument("--masks", type=Path)
    options = parser.parse_args()
    print(*table(options.masks, options.arch), sep="\n")


if __name__ == "__main__":
    main()
