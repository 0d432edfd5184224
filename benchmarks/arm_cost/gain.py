"""What records of a search on counted cycles gain, over the kernels of the target's rule."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from tvm_pivot.bench.models import ModelInput
from tvm_pivot.schedules.choices import Choice
from tvm_pivot.targets import resolve
from tvm_pivot.tuning.artifacts import arguments_of, contents_of
from tvm_pivot.tuning.rpc_devices import Trial
from tvm_pivot.tuning.selection import select
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.trials import build_candidate
from tvm_pivot.tuning.tuner import model_tasks

from .cores import Core
from .networks import run_ours
from .tuning import SECONDS_PER_CYCLE, EmulatedCores


@dataclass(frozen=True)
class LayerGain:
    """A kernel.

    Attributes:
        layer: the first layer that it is for.
        layers: how many there are.
        record: whose record it has, empty if the rule's kernel is kept.
        rule, tuned: model cycles of both kernels; 0 where they are the same one.
    """

    layer: str
    layers: int
    record: str
    rule: float = 0.0
    tuned: float = 0.0

    @property
    def gain(self) -> float:
        """How many times as few cycles."""
        return self.rule / self.tuned if self.tuned else 1.0


def of_layers(model: ModelInput, core: Core, records: Path | None) -> list[LayerGain]:
    """Each kernel of a network by itself.

    Args:
        model: the network.
        core: what it runs on.
        records: a log beside the shipped ones.

    Raises:
        PivotError: it cannot be built.
        TuningError: a kernel fails.
    """
    target = resolve(core.name)
    selection = select(records, target)
    found = []
    for task in model_tasks(str(model.path), target):
        chosen = selection.choose(task.layer, task.plan, task.epilogue, task.target)
        name, count = task.names[0], len(task.names)
        if chosen is None or chosen[1] == task.rule:
            found.append(LayerGain(name, count, ""))
            continue
        rule, tuned = (_cycles(task, choice, core) for choice in (task.rule, chosen[1]))
        found.append(LayerGain(name, count, chosen[2], rule, tuned))
    return found


def _cycles(task: LayerTask, choice: Choice, core: Core) -> float:
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        path = Path(build_candidate(task, choice.decisions(), scratch, "candidate"))
        trial = Trial(path, "cpu", tuple(arguments_of(path)))
        (seconds,) = EmulatedCores(core, contents_of, 1).acquire(0).measure(trial)
    return seconds / SECONDS_PER_CYCLE


def mean_gain(layers: list[LayerGain]) -> float:
    """The geometric mean over layers."""
    logs = [log(layer.gain) for layer in layers for _ in range(layer.layers)]
    return exp(sum(logs) / len(logs)) if logs else 1.0


def of_network(model: ModelInput, core: Core, records: Path | None) -> tuple[float, float]:
    """Model cycles of the whole network by the rule, and with records.

    Raises:
        PivotError: it cannot be built.
        ArmCostError: it fails.
    """
    ran = [run_ours(model, core, tuned=tuned, log=records)[0] for tuned in (False, True)]
    rule, tuned = (sum(cost.cycles for cost in one.functions.values()) for one in ran)
    return rule, tuned
