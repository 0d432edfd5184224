"""The public calls: `prune` at once, `pruner` inside a training loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import PruneError
from ..layout import BlockShape
from ..targets import PivotTarget, resolve
from .report import PruneReport, Skipped
from .settings import Saliency, Settings, parse_blocks

# How often blocks are chosen anew in a schedule, were it to go on to its end.
CHOICES = 40

if TYPE_CHECKING:
    from .layers import PrunableLayer
    from .pruner import Pruner


def prune(
    model: Any,
    *,
    density: float | None = None,
    latency: float | None = None,
    block: str | BlockShape = "8x1",
    target: str | PivotTarget = "x86",
    example_inputs: Any = None,
    skip: Collection[str] = (),
    saliency: Saliency = "magnitude",
    pivot: bool = True,
    measure: bool = False,
    seed: int = 0,
) -> PruneReport:
    """Prune a torch model at once, in place: zeros in blocks that `build` can skip.

    Which rows share their blocks is chosen together with the blocks, so that the weights that
    matter most are kept. Fine-tune the model afterwards, or prune it while training: `pruner`.

    Args:
        model: a `torch.nn.Module`.
        density: weights to keep, of all weights of the layers that are pruned, 0 to 1. What that
            means for each layer follows from its weights.
        latency: instead of a density, the predicted time to reach, as a share of the dense
            network's: 0.25 is four times as fast. What matters least per cycle goes first.
        block: R x 1, R output rows that keep the same inputs; R x R; ``"1x1"`` for single weights;
            or ``"auto"``: for each layer that of the target's block shapes which keeps most in
            the predicted time that its first shape takes.
        target: the machine whose time and block shapes count; see `build`.
        example_inputs: as for `build`; needed for `latency`, for ``"auto"``, and for R x R.
        skip: names of layers to leave dense, ``*`` stands for any part.
        saliency: what a weight counts: ``"magnitude"``, its size; ``"relative"``, its square
            over the mean square of its row, for rows that a batch norm scales anyway;
            ``"gradient"``, its size times that of its gradient, which must be there already.
        pivot: False keeps neighbours in blocks.
        measure: correct the predicted latency by what copies of the model, pruned and compiled,
            take on this machine.
        seed: the same seed gives the same result.

    Returns:
        What was done to each layer, and which were left dense and why.

    Raises:
        PruneError: torch is not installed, the arguments do not fit together, or nothing can be
            pruned.
        ModelImportError: `example_inputs` are needed and the model cannot be traced with them.
    """
    _require_torch()
    shapes = parse_blocks(block, target)
    settings = Settings(density, latency, shapes, pivot, saliency, seed)
    settings, measured = _measured(model, settings, target, example_inputs, skip, measure)
    report = _make(model, settings, target, example_inputs, skip).finalize()
    return replace(report, measured=measured)


def pruner(
    model: Any,
    *,
    steps: int,
    density: float | None = None,
    latency: float | None = None,
    block: str | BlockShape = "8x1",
    target: str | PivotTarget = "x86",
    example_inputs: Any = None,
    skip: Collection[str] = (),
    saliency: Saliency = "magnitude",
    pivot: bool = True,
    measure: bool = False,
    seed: int = 0,
    every: int | None = None,
    ramp: float = 0.5,
    settle: float = 0.6,
) -> Pruner:
    """Prune a torch model while it trains: call `step()` after each step of the optimiser.

    Args:
        model: see `prune`, and there for the arguments not named here.
        steps: training steps to come.
        every: steps between two choices of blocks; default: a fortieth of all steps.
        ramp: the share of the steps over which density falls.
        settle: the share after which nothing is chosen any more.

    Returns:
        A `Pruner` with `step`, `finalize`, `report`, `state_dict` and `load_state_dict`.

    Raises:
        As `prune`.
    """
    _require_torch()
    if steps < 1:
        raise PruneError(f"steps must be the training steps to come, not {steps}")
    shapes = parse_blocks(block, target)
    turn = max(1, steps // CHOICES) if every is None else every
    settings = Settings(density, latency, shapes, pivot, saliency, seed, steps, turn, ramp, settle)
    settings, _ = _measured(model, settings, target, example_inputs, skip, measure)
    return _make(model, settings, target, example_inputs, skip)


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise PruneError("pruning needs torch: pip install 'tvm-pivot[torch]'")


def _measured(
    model: Any,
    settings: Settings,
    target: str | PivotTarget,
    example_inputs: Any,
    skip: Collection[str],
    measure: bool,
) -> tuple[Settings, float | None]:
    """The settings, corrected by measurements if that is asked for, and the last of those."""
    if not measure:
        return settings, None
    if settings.latency is None:
        raise PruneError("measure=True corrects latency=, which is not given")
    from .measure import calibrated

    at_once = replace(settings, steps=0)
    found, ratio = calibrated(
        model,
        at_once,
        resolve(target),
        example_inputs,
        lambda trial, trying: _make(trial, trying, target, example_inputs, skip),
    )
    return replace(settings, latency=found.latency), ratio


def _make(
    model: Any,
    settings: Settings,
    target: str | PivotTarget,
    example_inputs: Any,
    skip: Collection[str],
) -> Pruner:
    from torch import nn

    from .layers import find_layers
    from .pruner import Pruner

    if not isinstance(model, nn.Module):
        raise PruneError(f"prune takes a torch.nn.Module, not a {type(model).__name__}")
    layers, skipped = find_layers(model, skip)
    if not settings.traced:
        return Pruner(model, layers, skipped, settings)
    return _traced(model, layers, skipped, settings, resolve(target), example_inputs)


def _traced(
    model: Any,
    layers: list[PrunableLayer],
    skipped: list[Skipped],
    settings: Settings,
    target: PivotTarget,
    example_inputs: Any,
) -> Pruner:
    """A pruner that knows the compiled network: its times, and which channels are tied."""
    from .latency import Times
    from .network import trace
    from .pruner import Pruner

    network = trace(model, example_inputs, [layer.name for layer in layers])
    lost = [layer for layer in layers if not network.named[layer.name]]
    skipped = skipped + [
        Skipped(layer.name, layer.weight_shape, "the compiled network has no layer of that name")
        for layer in lost
    ]
    layers = [layer for layer in layers if layer not in lost]
    times = Times(network, target) if settings.timed else None
    ties = None
    if settings.tied:
        from .channels import ChannelTies

        ties = ChannelTies(network, layers)
    return Pruner(model, layers, skipped, settings, times, ties)
