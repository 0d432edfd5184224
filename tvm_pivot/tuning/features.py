"""What the cost model sees of a candidate: its problem, its decisions, its predicted cycles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.feature_extractor import PyFeatureExtractor

from ..errors import ArtifactError
from ..schedules import cpu_tiles, tile_rule
from ..schedules.choices import Choice
from ..schedules.depthwise_tiles import (
    DepthwiseProblem,
    DepthwiseTile,
    choose_depthwise,
    rows_read,
    tile_cycles,
)
from ..schedules.problems import PlanesProblem, PlanesTile
from ..schema import decode
from ..targets import PivotTarget
from .space import TASK, choice_of

_PROBLEM = (
    "batch", "columns", "rows", "row_blocks", "block_rows", "height", "width", "pitch", "taps",
    "groups", "lines", "reach", "planes", "shifts", "inputs", "window", "channels", "taps_y",
    "taps_x", "stride_y",
)  # fmt: skip
_DECISIONS = (
    "keep_all", "own_columns", "window", "block_rows", "unfolded", "band_rows", "lanes", "vectors",
    "tiles", "group_rows", "k_tiles", "stretches", "panel_pitch", "slides", "singles", "unroll",
    "ahead", "inputs_ahead", "form", "loader", "cluster", "pixels", "vector", "warp_pixels",
    "blocks", "warp_rows", "warp_columns", "slab", "slots", "splits", "warps", "grid",
)  # fmt: skip
COUNT = len(_PROBLEM) + len(_DECISIONS) + 8


def features(
    problem: Mapping[str, Any],
    entries: int,
    choice: Choice,
    predicted: float | None,
    target: PivotTarget,
) -> npt.NDArray[np.float32]:
    """One row of `COUNT` numbers; what is not known is not a number.

    Args:
        problem: the fields of the task's problem.
        entries: its packed entries.
        choice: the candidate.
        predicted: its predicted cycles over those of the rule's choice, if known.
        target: for its caches.
    """
    decisions = choice.numbers()
    facts = {**problem, **_axes(problem)}
    row = [_log(facts.get(name)) for name in _PROBLEM]
    row += [_log(decisions.get(name)) for name in _DECISIONS]
    row.append(_log(entries))
    row.append(math.nan if predicted is None else math.log2(max(predicted, 1e-6)))
    depthwise = isinstance(choice.tile, DepthwiseTile)
    row += (_of_depthwise if depthwise else _of_planes)(problem, entries, choice, target)
    return np.array(row, np.float32)


def _log(value: Any) -> float:
    return math.nan if value is None else math.log2(1 + value)


def _axes(problem: Mapping[str, Any]) -> dict[str, int]:
    """Of a depthwise problem what others have as numbers of their own."""
    own = _decoded(DepthwiseProblem, problem)
    if own is None:
        return {}
    found = {"height": own.y.output, "width": own.x.output, "taps": own.taps}
    found |= {"taps_y": own.y.kernel, "taps_x": own.x.kernel, "stride_y": own.y.stride}
    return found


T = TypeVar("T")


def _decoded(kind: type[T], problem: Mapping[str, Any]) -> T | None:
    """The problem as a record of this kind, None if it is of another."""
    try:
        return decode(kind, dict(problem))
    except ArtifactError:
        return None


def _of_depthwise(
    problem: Mapping[str, Any], entries: int, choice: Choice, target: PivotTarget
) -> list[float]:
    """The same of a depthwise tile."""
    tile, own = choice.tile, _decoded(DepthwiseProblem, problem)
    if own is None or not isinstance(tile, DepthwiseTile):
        return [math.nan] * 6
    blocks = -(-own.y.output // tile.group_rows)
    pieces = -(-own.x.output // tile.width)
    computed = blocks * tile.group_rows * pieces * tile.width
    plane = 4.0 * own.y.size * own.x.size
    # Sums that are begun and not stored.
    live = min(tile.group_rows, -(-((own.y.kernel - 1) * own.y.dilation + 1) // own.y.stride))
    return [
        computed / (own.y.output * own.x.output),
        float(live * tile.vectors),
        _log(entries / own.rows * tile.group_rows * tile.vectors),
        _log(plane / target.l1_bytes),
        rows_read(own, tile) / (tile.group_rows * own.y.stride),
        float(own.x.output % tile.lanes == 0),
    ]


def _of_planes(
    problem: Mapping[str, Any], entries: int, choice: Choice, target: PivotTarget
) -> list[float]:
    """What follows from tile and problem together, which trees find hard to see."""
    tile, own = choice.tile, _decoded(PlanesProblem, problem)
    if own is None or not isinstance(tile, PlanesTile):
        return [math.nan] * 6
    own = replace(own, height=choice.band_rows or own.height)
    vectors = (tile.tiles - 1) * tile.vectors + tile.last(own)
    computed = tile.groups(own) * vectors * tile.lanes
    per_block = entries * own.block_rows / choice.block_rows
    blocks = own.row_blocks * own.block_rows / choice.block_rows
    inputs = 4.0 * own.channels * tile.group_floats(own) / tile.k_tiles
    return [
        computed / own.pixels,
        float(choice.block_rows * tile.vectors),
        _log(per_block / max(blocks, 1) / tile.k_tiles),
        _log(inputs / target.l1_bytes),
        _log(inputs / target.l2_bytes),
        float(tile.panel_pitch % tile.lanes == 0 if tile.panel else own.compact),
    ]


def predict(
    problem: Mapping[str, Any], entries: int, choice: Choice, target: PivotTarget
) -> float | None:
    """Predicted cycles of a choice over the rule's, where the problem alone tells: same blocks."""
    tile = choice.tile
    if isinstance(tile, DepthwiseTile):
        own = _decoded(DepthwiseProblem, problem)
        if own is None:
            return None
        known = choose_depthwise(own, target)
        return tile_cycles(own, tile, target) / tile_cycles(own, known, target)
    if not isinstance(tile, PlanesTile) or choice.block_rows != problem.get("block_rows"):
        return None
    whole = _decoded(PlanesProblem, problem)
    if whole is None:
        return None
    rule = tile_rule(target)
    best = rule.choose_planes(whole, entries, target)[1]
    if not choice.band_rows:
        return rule.planes_cycles(whole, tile, entries, target) / best
    band, count = whole.band(choice.band_rows), cpu_tiles.band_count(whole, choice.band_rows)
    kernel = rule.planes_cycles(band, tile, entries, target, count)
    return cpu_tiles.bands_cycles(whole, choice.band_rows, kernel, target) / best


@derived_object
class ChoiceFeatures(PyFeatureExtractor):  # type: ignore[misc]
    """The features of candidates of any tasks."""

    def __init__(self, target: PivotTarget) -> None:
        super().__init__()
        self.target = target
        self.known: dict[str, dict[Choice, float]] = {}

    def add(self, task: str, predicted: Mapping[Choice, float]) -> None:
        """Predicted cycles of a task's space; its first choice is the rule's."""
        rule = next(iter(predicted.values()))
        self.known[task] = {choice: cycles / rule for choice, cycles in predicted.items()}

    def predictions(self, context: Any, candidates: Sequence[Any]) -> list[float | None]:
        """Predicted cycles of candidates over those of the rule's choice, where they are known."""
        task = str(context.mod["main"].attrs[TASK])
        return [self._predicted(task, choice_of(one.sch.mod)) for one in candidates]

    def extract_from(self, context: Any, candidates: Sequence[Any]) -> list[Any]:
        """One row for each candidate."""
        task = str(context.mod["main"].attrs[TASK])
        stated = json.loads(task)
        rows = []
        for one in candidates:
            choice = choice_of(one.sch.mod)
            predicted = self._predicted(task, choice)
            row = features(stated["problem"], stated["entries"], choice, predicted, self.target)
            rows.append(tvm.runtime.tensor(row[None, :]))
        return rows

    def _predicted(self, task: str, choice: Choice) -> float | None:
        known = self.known.setdefault(task, {})
        if choice not in known:
            stated = json.loads(task)
            found = predict(stated["problem"], stated["entries"], choice, self.target)
            if found is None:
                return None
            known[choice] = found
        return known[choice]
