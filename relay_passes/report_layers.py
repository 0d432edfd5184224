"""Tell the user, layer by layer of the model as it was given, what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..layout import BlockShape
from ..pattern import FULL, TOLD, BlockMasks, Pattern, classify
from ..report import BlockFill, LayerReport, Pivoted
from .layers import Layer, Plan, PlannedLayer


def report_layers(
    originals: Mapping[str, Layer], planned: Sequence[PlannedLayer]
) -> list[LayerReport]:
    """One report per layer of the model, in its order.

    Args:
        originals: the layers before dead rows and columns were dropped, by name.
        planned: those that are left, with their plans.
    """
    plans = {p.layer.name: p for p in planned}
    return [
        _report(layer, plans[name]) if name in plans else _dead(layer)
        for name, layer in originals.items()
    ]


def _dead(layer: Layer) -> LayerReport:
    return LayerReport(
        name=layer.name,
        op=layer.op,
        shape=layer.shape,
        pattern="dead",
        density=float(np.count_nonzero(layer.matrix)) / layer.matrix.size,
        block="",
        fill=1.0,
        mode="sparse",
        reason="nothing depends on it but constants: it was folded away",
        flops_dense=2 * layer.matrix.size * layer.pixels,
        flops_kept=0,
        kernel="",
    )


def _report(layer: Layer, planned: PlannedLayer) -> LayerReport:
    plan, left = planned.plan, planned.layer
    masks = BlockMasks(layer.matrix != 0)
    pattern = classify(layer.matrix, masks)
    kept = int(np.count_nonzero(left.matrix))
    slots = plan.entries * plan.block_rows
    fill = kept / slots if slots else 1.0
    found = plan.block_rows > pattern.block.rows and fill >= FULL and not plan.own_columns
    name = f"{plan.block_rows}x1 permuted" if planned.skips and found else pattern.name
    dropped = left.matrix.size < layer.matrix.size
    skips = planned.skips or dropped
    return LayerReport(
        name=layer.name,
        op=layer.op,
        shape=layer.shape,
        pattern=name,
        density=pattern.density,
        block=str(BlockShape(1 if plan.own_columns else plan.block_rows)) if skips else "",
        fill=fill if skips else pattern.density,
        mode="sparse" if skips else "dense",
        reason=_reason(planned, pattern, dropped),
        flops_dense=2 * layer.matrix.size * layer.pixels,
        flops_kept=2 * (kept if planned.skips else left.matrix.size) * left.pixels,
        kernel="",
        fills=_fills(masks) if pattern.density < 1.0 else (),
        pivot=_pivot(plan, kept) if planned.skips else None,
        shared=planned.shared,
        tuned=planned.record,
    )


def _pivot(plan: Plan, kept: int) -> Pivoted | None:
    if not plan.pivot:
        return None
    before, after = (
        round(kept / (n * plan.block_rows), 4) for n in (plan.natural_entries, plan.entries)
    )
    return Pivoted(plan.pivot, before, after)


def _fills(masks: BlockMasks) -> tuple[BlockFill, ...]:
    return tuple(BlockFill(str(block), round(masks.fill(block), 4)) for block in TOLD)


def _reason(planned: PlannedLayer, pattern: Pattern, dropped: bool) -> str:
    if planned.within:
        return f"computed in the bands of {planned.within}, by its kernel"
    if not planned.sparse:
        return "the dense build was asked for"
    if planned.skips:
        gain = planned.dense_cycles / max(planned.plan.cycles, 1.0)
        return f"predicted {gain:.1f}x over dense"
    if dropped:
        return "what is left without its dead rows and columns is dense"
    if pattern.density == 1.0:
        return "no weight is zero"
    if planned.plan.keep_all:
        return f"density {pattern.density:.0%} is above break-even"
    return "no block of zeros is large enough to skip"
