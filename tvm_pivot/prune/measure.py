"""Latencies as they are measured: the predicted one is corrected until the measured one fits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..compiler import build
from ..session import Session
from ..targets import PivotTarget
from .pruner import Pruner
from .settings import Settings

# Corrections of the prediction, and how near to the asked latency is near enough.
CORRECTIONS, NEAR = 3, 0.03
# Dense and pruned networks run in turn, so that a machine that slows down slows both.
TURNS, TURN_SECONDS = 15, 0.02


def calibrated(
    model: nn.Module,
    settings: Settings,
    target: PivotTarget,
    example_inputs: Any,
    make: Callable[[nn.Module, Settings], Pruner],
) -> tuple[Settings, float]:
    """Settings whose predicted latency leads to the asked one when measured, and that measurement.

    Prunes copies of the model at once, compiles and times them beside the dense network.

    Args:
        model: stays as it is.
        settings: with a latency.
        target: this machine.
        example_inputs: see `build`; they are what is run.
        make: a pruner of a model.
    """
    assert settings.latency is not None
    dense = build(model, target, example_inputs=example_inputs, sparse=False)
    asked, ratio = settings.latency, 1.0
    for correction in range(CORRECTIONS + 1):
        trial = copy.deepcopy(model)
        make(trial, settings).finalize()
        pruned = build(trial, target, example_inputs=example_inputs)
        ratio = time_ratio(pruned, dense, example_inputs)
        if abs(ratio / asked - 1) < NEAR or correction == CORRECTIONS:
            break
        assert settings.latency is not None
        settings = replace(settings, latency=min(1.0, settings.latency * asked / ratio))
    return settings, ratio


def time_ratio(one: Session, other: Session, example_inputs: Any) -> float:
    """The shortest time of a run of `one` over that of `other`."""
    inputs = [value.numpy() for value in _tensors(example_inputs)]
    best = [float("inf"), float("inf")]
    for _ in range(TURNS):
        for number, session in enumerate((one, other)):
            stop = time.perf_counter() + TURN_SECONDS
            while (began := time.perf_counter()) < stop:
                session.run(*inputs)
                best[number] = min(best[number], time.perf_counter() - began)
    return best[0] / best[1]


def _tensors(example_inputs: Any) -> list[torch.Tensor]:
    if isinstance(example_inputs, torch.Tensor):
        return [example_inputs]
    if isinstance(example_inputs, Mapping):
        return list(example_inputs.values())
    return list(example_inputs)
