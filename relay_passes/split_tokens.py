"""Choose in how many parts dense layers have the rows of their matrices: tokens, samples.

A layer reads its whole input for every few of its outputs. Inputs that do not stay in level 2 have
to come from further away each time, so rows are then computed part by part, each with all of the
layer's weights. And cores that share a layer by its outputs read what others have written last,
which comes slowly; where each core has rows of its own, it reads what it has written itself. Only
an attention reads other rows.

To a kernel, parts are images of a convolution, and so they are to tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..planes import AxisGeometry
from ..schedules.core_costs import core_costs
from ..targets import PivotTarget
from .axis_order import Shape
from .feature_major import features_first
from .graph import static_shape
from .layers import Layer

# Of a part: a weight is loaded for as many multiplications.
LEAST_ROWS = 64
# Of level 2, for the inputs of a part.
INPUTS_SHARE = 0.4


def split_tokens(layers: Sequence[Layer], target: PivotTarget) -> list[Layer]:
    """The layers, dense ones with their rows in parts where that pays.

    Layers with as many rows have as many parts, for nothing should be moved between them.
    """
    if target.family != "x86" or not core_costs(target).far_lines:
        return list(layers)
    alike: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.op == "dense":
            alike.setdefault(layer.pixels, []).append(layer)
    parts = {rows: _parts(dense, target) for rows, dense in alike.items()}
    return [_split(x, parts[x.pixels]) if x.op == "dense" else x for x in layers]


def _parts(layers: Sequence[Layer], target: PivotTarget) -> int:
    """In how many parts layers with as many rows have them."""
    shapes, rows = {_shape(layer) for layer in layers}, layers[0].pixels
    most = rows // LEAST_ROWS
    shared = range(target.cores, most + 1, target.cores)
    even = [p for p in shared if rows % (p * target.lanes) == 0]
    counts = [p for p in even if all(features_first(shape, p) for shape in shapes)]
    widest = max(layer.matrix.shape[1] for layer in layers)
    fits = [p for p in counts if 4 * widest * rows // p <= INPUTS_SHARE * target.l2_bytes]
    if fits or target.cores == 1:
        return min(fits, default=1)
    return max(counts, default=1)


def _shape(layer: Layer) -> Shape:
    shape = static_shape(layer.var)
    assert shape is not None
    return shape


def _split(layer: Layer, parts: int) -> Layer:
    rows = AxisGeometry(layer.pixels // parts, 1)
    return replace(layer, geometry=replace(layer.geometry, batch=parts, x=rows))
