"""How dense each layer ends: what matters most is kept for a number of weights, or for a time.

The saliency of layers is compared through the logarithm of the share that each one retains: a
signal passes all layers in turn, so shares multiply. A block's worth is what it adds to its
layer's logarithm, which for single weights ranks them as LAMP does (Lee et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import PruneError
from .blocks import Blocks

Floats = npt.NDArray[np.float64]

# No layer goes below or above these multiples of the asked density, nor the last one below its own:
# what passes a layer that is all but empty is lost, and one that is all but full gains no time.
FLOOR, CEILING, LAST_FLOOR = 0.3, 3.0, 2.0
# Densities tried for a latency, and halvings of the price of a cycle.
CHOICES, HALVINGS = 160, 60


def by_density(layers: Sequence[Blocks], density: float, last: int | None) -> list[int]:
    """Weights kept in each layer when the share `density` of all of them is kept.

    Args:
        layers: their blocks.
        density: kept / all weights.
        last: the layer that is kept denser than the others, if any.
    """
    budget = round(density * sum(blocks.shape.weights for blocks in layers))
    worth, sizes, owners = [], [], []
    for number, blocks in enumerate(layers):
        size = blocks.sizes.ravel()[blocks.order]
        floor = density * (LAST_FLOOR if number == last else FLOOR)
        first, most = (
            blocks.count(round(min(share, 1.0) * blocks.shape.weights))
            for share in (floor, density * CEILING)
        )
        sums = np.cumsum(blocks.scores.ravel()[blocks.order], dtype=np.float64)
        gain = np.full(size.size, np.inf)
        gain[first:] = _log_steps(sums)[first:] / size[first:]
        gain[most:] = -np.inf
        worth.append(np.minimum.accumulate(gain))  # a layer's blocks are kept in their order
        sizes.append(size)
        owners.append(np.full(size.size, number))
    order = np.argsort(-np.concatenate(worth), kind="stable")
    size, owner = np.concatenate(sizes)[order], np.concatenate(owners)[order]
    count = int(np.searchsorted(np.cumsum(size, dtype=np.int64), budget, side="right"))
    kept = np.bincount(owner[:count], size[:count], len(layers))
    return [max(1, round(weights)) for weights in kept]


def _log_steps(sums: Floats) -> Floats:
    """What each entry of a cumulative sum adds to its logarithm; the first adds everything."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.diff(np.log(sums), prepend=-np.inf)
    return np.nan_to_num(steps, nan=0.0, posinf=np.inf)


@dataclass(frozen=True, eq=False)
class TimeCurve:
    """Predicted cycles of a layer at some densities, rising; the last one is 1.0, the dense layer.

    Attributes:
        densities: float64 [points].
        cycles: float64 [points].
    """

    densities: Floats
    cycles: Floats

    @property
    def dense(self) -> float:
        return float(self.cycles[-1])

    def at(self, density: float | Floats) -> Floats:
        """Cycles at a density, between the points by straight lines."""
        return np.asarray(np.interp(density, self.densities, self.cycles))

    def density_for(self, cycles: float) -> float:
        """The highest density that takes at most so many cycles, or that of the first point."""
        grid = np.linspace(float(self.densities[0]), 1.0, 4 * CHOICES)
        fits = np.flatnonzero(self.at(grid) <= cycles * (1 + 1e-9))
        return float(grid[fits[-1]]) if fits.size else float(grid[0])


@dataclass(frozen=True, eq=False)
class _Options:
    """Weights that a layer may keep, what that is worth, and what it costs."""

    weights: npt.NDArray[np.int64]
    value: Floats
    cycles: Floats

    def best(self, price: float) -> int:
        return int(np.argmax(self.value - price * self.cycles))


def by_latency(
    layers: Sequence[Blocks], curves: Sequence[TimeCurve], cycles: float, fixed: float
) -> list[int]:
    """Weights kept in each layer when all of them and `fixed` take at most `cycles` together.

    Raises:
        PruneError: not even the lowest densities are that fast.
    """
    options = [_options(blocks, curve) for blocks, curve in zip(layers, curves, strict=True)]

    def spent(price: float) -> float:
        return fixed + sum(float(o.cycles[o.best(price)]) for o in options)

    least = fixed + sum(float(o.cycles.min()) for o in options)
    if least > cycles:
        whole = fixed + sum(curve.dense for curve in curves)
        raise PruneError(
            f"a latency of {cycles / whole:.3f} cannot be reached by pruning: with next to no "
            f"weights left, {least / whole:.3f} of the time remains; ask for more than that"
        )
    low, high = 0.0, 1.0
    while spent(high) > cycles and high < 1e12:
        high *= 8.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > cycles else (low, middle)
    return [int(o.weights[o.best(high)]) for o in options]


def _options(blocks: Blocks, curve: TimeCurve) -> _Options:
    total = blocks.shape.weights
    densities = np.geomspace(max(float(curve.densities[0]), 1 / total), 1.0, CHOICES)
    sums = np.cumsum(blocks.scores.ravel()[blocks.order], dtype=np.float64)
    held = np.cumsum(blocks.sizes.ravel()[blocks.order], dtype=np.int64)
    at = np.minimum(np.searchsorted(held, densities * total), held.size - 1)
    whole = max(float(sums[-1]), 1e-300)
    value = np.log(np.maximum(sums[at] / whole, 1e-300))
    return _Options(held[at], value, curve.at(held[at] / total))


def by_block(
    candidates: Mapping[str, Blocks], curves: Mapping[str, TimeCurve], cycles: float
) -> tuple[str, int]:
    """The block shape that keeps the most saliency within `cycles`, and the weights it keeps."""

    def weights(name: str) -> int:
        share = curves[name].density_for(cycles)
        return max(1, round(share * candidates[name].shape.weights))

    best = max(candidates, key=lambda name: candidates[name].retained(weights(name)))
    return best, weights(best)
