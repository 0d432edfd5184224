"""Predicted times of a model's layers at any density, from the cost model of the compiler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..layout import BlockShape, FloatArray
from ..relay_passes.detect import plan_layer
from ..relay_passes.layers import Layer
from ..targets import PivotTarget
from .allocation import TimeCurve
from .network import Network

# Where cycles are predicted; between, they are taken to follow straight lines.
DENSITIES = (0.01, 0.03, 0.1, 0.2, 0.35, 0.6, 0.8)


class Times:
    """Predicted cycles on one core of a network's dense and convolution layers.

    Other operators are not counted: they take the same time whatever is pruned.

    Attributes:
        dense: cycles of all layers with no zero skipped.
    """

    def __init__(self, network: Network, target: PivotTarget) -> None:
        self._target, self._layers = target, network.named
        self._curves: dict[Any, TimeCurve] = {}
        self._whole: dict[Any, float] = {}
        self.dense = sum(self._dense(layer) for layer in network.layers)

    def layer(self, name: str) -> float:
        """Cycles of a layer in the dense network."""
        return sum(self._dense(layer) for layer in self._layers[name])

    def curve(self, name: str, block: BlockShape) -> TimeCurve:
        """Cycles of a layer that is pruned in blocks; where it is run several times, of all."""
        curves = [self._curve(layer, block) for layer in self._layers[name]]
        cycles = np.sum([curve.cycles for curve in curves], axis=0)
        return TimeCurve(curves[0].densities, cycles)

    def _dense(self, layer: Layer) -> float:
        key = (layer.op, layer.shape, layer.geometry)
        if key not in self._whole:
            self._whole[key] = plan_layer(layer, self._target, False).plan.cycles
        return self._whole[key]

    def _curve(self, layer: Layer, block: BlockShape) -> TimeCurve:
        key = (layer.op, layer.shape, layer.geometry, block)
        if key not in self._curves:
            dense = self._dense(layer)
            cycles = [self._cycles(layer, block, density) for density in DENSITIES]
            rising = np.minimum(np.maximum.accumulate(cycles), dense)
            self._curves[key] = TimeCurve(np.array([*DENSITIES, 1.0]), np.append(rising, dense))
        return self._curves[key]

    def _cycles(self, layer: Layer, block: BlockShape, density: float) -> float:
        matrix = _scattered(layer.matrix.shape, layer.geometry.groups, block.rows, density)
        return plan_layer(replace(layer, matrix=matrix), self._target, True).plan.cycles


def _scattered(shape: tuple[int, ...], groups: int, rows: int, density: float) -> FloatArray:
    """A matrix of ones in R x 1 blocks at random, as many in each row block: float32 [N, K]."""
    rng = np.random.default_rng(0)
    per_group, columns = shape[0] // groups, shape[1]
    blocks = -(-per_group // rows)
    kept = max(1, round(density * columns))
    chosen = np.argsort(rng.random((groups, blocks, columns)), axis=2) < kept
    return chosen.repeat(rows, axis=1)[:, :per_group].reshape(shape).astype(np.float32)
