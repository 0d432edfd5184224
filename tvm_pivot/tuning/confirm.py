"""Whether tuned kernels are faster in their network too, where other layers leave the caches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from ..bench.watch import Watch
from ..compiler import build
from ..report import Report
from ..session import Session
from ..targets import PivotTarget

_ROUNDS = 45
_PACKING = "pack_planes"


def in_network(
    model: Any, target: PivotTarget, log: Path, **more: Any
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Seconds of each layer and operator in a build by the rule, and in one with a log's records.

    Both run in turns, with one thread. A layer's time has in it that of the copy to planes before
    it, and is the mean of the third of the rounds that others disturbed least.

    Args:
        model, more: as for `build`.
        target: as for `build`.
        log: the records.

    Returns:
        Both by the layers' names; operators that are no layer by `operator`.
    """
    nets = [
        build(model, target, tuned=False, threads=1, **more),
        build(model, target, log=log, threads=1, **more),
    ]
    watches = [Watch(net) for net in nets]
    for _ in range(_ROUNDS):
        for watch in watches:
            watch.run()
    rule, tuned = (_layers(w, n) for w, n in zip(watches, nets, strict=True))
    return rule, tuned


def _layers(watch: Watch, net: Session) -> dict[str, float]:
    waiting = _names(net.report)
    found: dict[str, float] = {}
    copy = 0.0
    for call, times in zip(watch.calls, watch.times(_ROUNDS), strict=True):
        seconds = mean(sorted(times)[: _ROUNDS // 3])
        if call.function.startswith(_PACKING):
            copy += seconds
        elif waiting.get(call.function):
            # Layers that are alike share a kernel: its calls come in the order of the layers.
            found[waiting[call.function].pop(0)] = seconds + copy
            copy = 0.0
        elif not call.builtin:
            name = operator(call.function)
            found[name] = found.get(name, 0.0) + seconds
    return found


def operator(function: str) -> str:
    """What functions that are alike are called here: numbers depend on the rest of the network."""
    return "operator " + re.sub(r"\d+", "", function)


def _names(report: Report) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for layer in report.layers:
        names.setdefault(layer.kernel, []).append(layer.name)
    return names
