"""What pruning did to each layer of a network."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..layout import BlockShape, Permutation


@dataclass(frozen=True)
class Skipped:
    """A weight that was left dense: its layer's name, its shape, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """A pruned layer.

    Attributes:
        name: as the reports of `build` have it.
        shape: the weight's.
        block: R x C.
        density: kept / all weights.
        retained: the share of its saliency that the kept blocks hold.
        rows: the order of rows in which the R of each block are neighbours.
        channels: the same for the input channels; None where C is 1.
        cycles: predicted cycles on one core, None where they were not asked for.
    """

    name: str
    shape: tuple[int, ...]
    block: BlockShape
    density: float
    retained: float
    rows: Permutation
    channels: Permutation | None = None
    cycles: float | None = None


@dataclass(frozen=True, eq=False)
class PruneReport:
    """All layers, pruned or not. ``print(report)`` shows a table.

    Attributes:
        layers: the pruned ones, in the model's order.
        skipped: the dense ones, with reasons.
        predicted: predicted time / predicted time of the dense network; None where not asked for.
        measured: the same, measured; None where not asked for.
    """

    layers: tuple[PrunedLayer, ...]
    skipped: tuple[Skipped, ...]
    predicted: float | None = None
    measured: float | None = None

    @property
    def density(self) -> float:
        """Kept weights / all weights of the pruned layers; 1.0 if there are none."""
        total = sum(prod(layer.shape) for layer in self.layers)
        kept = sum(layer.density * prod(layer.shape) for layer in self.layers)
        return kept / total if total else 1.0

    def __str__(self) -> str:
        width = max([4, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'shape':>16}  block  density  saliency kept"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            lines.append(
                f"{layer.name:<{width}}  {shape:>16}  {layer.block!s:>5}  "
                f"{layer.density * 100:5.1f} %  {layer.retained * 100:11.1f} %"
            )
        lines.append(f"density of the pruned layers: {self.density * 100:.1f} %")
        for kind, ratio in (("predicted", self.predicted), ("measured", self.measured)):
            if ratio is not None:
                lines.append(f"{kind} time: {ratio:.3f} of the dense network's")
        lines += [f"dense: {skip.name}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)
