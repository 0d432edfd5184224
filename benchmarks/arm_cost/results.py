"""What is kept of the costs: ``benchmarks/results/arm_cost.json``, and the tables made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tvm_pivot import schema

from .cores import CORES
from .cost import Cost

RESULTS = Path(__file__).resolve().parents[1] / "results" / "arm_cost.json"

NETWORKS, VARIANTS = ("resnet50", "mobilenet_v1"), ("dense", "8x1@0.1")
OURS, YARDSTICK = "pivot", "litert"
TITLES = {
    "pivot": "**tvm_pivot**",
    "litert": "LiteRT (XNNPACK)",
    "mnn": "MNN",
    "mnn-sparse": "MNN, sparse",
    "onnxruntime": "ONNX Runtime",
}
_ZEROS = {"dense": "none", "8x1@0.1": "90 %, 8x1 blocks"}


@dataclass(frozen=True)
class Step:
    """A function or layer of a run."""

    name: str
    instructions: float
    cycles: float


@dataclass(frozen=True)
class NetworkCost:
    """What one inference of a network costs on a runtime and a core.

    Attributes:
        network: e.g. ``"resnet50"``.
        variant: e.g. ``"8x1@0.1"``.
        sha256: of the ONNX file.
        runtime: a key of `TITLES`.
        version: of the runtime.
        core: a name in `cores.CORES`.
        cost: of one inference on one thread.
        error: the largest error of the outputs over the largest value of ONNX Runtime's on x86.
        steps: functions that take 0.5 % of the cycles or more, the costliest first.
    """

    network: str
    variant: str
    sha256: str
    runtime: str
    version: str
    core: str
    cost: Cost
    error: float
    steps: tuple[Step, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What there is one of."""
        return (self.network, self.variant, self.runtime, self.core)


@dataclass(frozen=True)
class KernelCost:
    """What one run of a block-sparse kernel costs on a core.

    Attributes:
        pixels, inputs, outputs: of the layer.
        rows: R of its R x 1 blocks.
        density: kept weights / all weights.
        core: a name in `cores.CORES`.
        cost: of one run.
        limit: cycles that its multiply-adds alone take on the core's model.
        error: the largest error over the bound of the rounding of float sums; below 1 is right.
    """

    pixels: int
    inputs: int
    outputs: int
    rows: int
    density: float
    core: str
    cost: Cost
    limit: float
    error: float

    @property
    def key(self) -> tuple[int, int, int, int, float, str]:
        """What there is one of."""
        return (self.pixels, self.inputs, self.outputs, self.rows, self.density, self.core)

    @property
    def fraction(self) -> float:
        """Of the core's limit that it reaches."""
        return self.limit / self.cost.cycles


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Attributes:
        tools: names and versions of what counted.
        networks: costs of networks.
        kernels: costs of kernels.
    """

    tools: tuple[str, ...]
    networks: tuple[NetworkCost, ...] = ()
    kernels: tuple[KernelCost, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Results:
        """What a file holds.

        Raises:
            ArtifactError: the file is not such a file.
        """
        return schema.loads(cls, path.read_bytes())

    @classmethod
    def load(cls, path: Path, tools: tuple[str, ...]) -> Results:
        """What a file holds, unless other tools counted it: then, or without a file, nothing.

        Raises:
            ArtifactError: the file is not such a file.
        """
        found = cls.read(path) if path.exists() else cls(tools)
        return found if found.tools == tools else cls(tools)

    def save(self, path: Path) -> None:
        """Write them, sorted, to a file."""
        ordered = replace(
            self,
            networks=tuple(sorted(self.networks, key=lambda n: n.key)),
            kernels=tuple(sorted(self.kernels, key=lambda k: k.key)),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(schema.dumps(ordered, indent=1) + "\n", encoding="utf-8")

    def with_networks(self, new: Iterable[NetworkCost]) -> Results:
        """These, with the new ones instead of their like."""
        found = {entry.key: entry for entry in (*self.networks, *new)}
        return replace(self, networks=tuple(found.values()))

    def with_kernels(self, new: Iterable[KernelCost]) -> Results:
        """These, with the new ones instead of their like."""
        found = {entry.key: entry for entry in (*self.kernels, *new)}
        return replace(self, kernels=tuple(found.values()))


def networks_table(entries: Sequence[NetworkCost]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: a line per network, zeros and runtime; columns per core.

    Behind the cycles: how many times as many LiteRT takes for the dense network. It has no way with
    zeros, so that is as many as it takes for the pruned one.
    """
    cores = [name for name in CORES if any(entry.core == name for entry in entries)][::-1]
    known = {entry.key: entry for entry in entries}
    head = ["network", "zeros", "runtime"]
    for core in cores:
        head += [f"{core}: instructions, M", "model cycles, M", "LiteRT dense / this"]
    rows = []
    for network, variant, runtime in sorted({entry.key[:3] for entry in entries}, key=_order):
        cells = [network, _ZEROS.get(variant, variant), TITLES.get(runtime, runtime)]
        for core in cores:
            entry = known.get((network, variant, runtime, core))
            dense = known.get((network, "dense", YARDSTICK, core))
            cells += _cells(entry, dense)
        rows.append(tuple(cells))
    return tuple(head), rows


def _order(key: tuple[str, str, str]) -> tuple[str, bool, int]:
    network, variant, runtime = key
    return network, variant != "dense", list(TITLES).index(runtime)


def _cells(entry: NetworkCost | None, dense: NetworkCost | None) -> tuple[str, str, str]:
    if entry is None:
        return ("-", "-", "-")
    ratio = f"{dense.cost.cycles / entry.cost.cycles:.1f}x" if dense else "-"
    return (f"{entry.cost.instructions / 1e6:.0f}", f"{entry.cost.cycles / 1e6:.1f}", ratio)


def kernels_table(entries: Sequence[KernelCost]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: a line per shape and block, columns per core."""
    cores = [name for name in CORES if any(entry.core == name for entry in entries)][::-1]
    known = {entry.key: entry for entry in entries}
    head = ["pixels, K, N", "blocks", "density"]
    for core in cores:
        head += [f"{core}: model cycles, k", "of the limit"]
    rows = []
    for key in dict.fromkeys(entry.key[:5] for entry in entries):
        pixels, inputs, outputs, height, density = key
        cells = [f"{pixels}, {inputs}, {outputs}", f"{height}x1", f"{density:.2f}"]
        for core in cores:
            entry = known.get((*key, core))
            cells += (
                ["-", "-"]
                if entry is None
                else [f"{entry.cost.cycles / 1e3:.0f}", f"{entry.fraction:.2f}"]
            )
        rows.append(tuple(cells))
    return tuple(head), rows
