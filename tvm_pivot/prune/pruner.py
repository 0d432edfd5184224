"""The pruner: masks on a model's weights, chosen anew while density falls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PruneError
from ..layout import BlockShape, FloatArray
from .allocation import by_block, by_density, by_latency
from .blocks import Blocks, Grouping
from .grouping import group_order
from .layers import PrunableLayer
from .masks import MaskedWeight
from .report import PrunedLayer, PruneReport, Skipped
from .settings import Settings, cubic

if TYPE_CHECKING:  # they import TVM, which takes seconds and is often not needed
    from .channels import ChannelTies
    from .latency import Times

# Rows are grouped anew in this share of the ramp, while little is dropped: later, that would take
# back much of what training has adapted to.
REGROUPING = 0.2
# The powers of e by which a worthless block shrinks over the ramp.
SHRINKING = 10.0
# How much of the average |w * gradient| each step keeps.
MEMORY = 0.9


@dataclass(eq=False)
class _Pruned:
    """A layer, its mask, and how its rows are grouped now."""

    layer: PrunableLayer
    weight: MaskedWeight
    grouping: Grouping
    kept: int  # weights
    average: Tensor | None = None  # of |w * gradient|


class Pruner:
    """Prunes a model inside its own training loop; made by `tvm_pivot.pruner`.

    >>> pruner = tvm_pivot.pruner(net, density=0.1, block="8x1", steps=len(loader) * epochs)
    >>> for x, y in batches:
    ...     loss(net(x), y).backward()
    ...     optimiser.step()
    ...     pruner.step()
    >>> print(pruner.finalize())

    While density falls, the gradient reaches dropped weights as if they were not dropped, so that
    they can come back when blocks are chosen anew. Each choice also shrinks the weights of blocks
    that the final density has no room for. Which rows share blocks is chosen anew only as long as
    little is dropped. After ``settle * steps`` steps nothing is chosen any more, and only kept
    weights learn.

    To go on later: save ``model.state_dict()`` and ``pruner.state_dict()``, make model and pruner
    as before, and load both.

    Attributes:
        skipped: weights that are left dense, with reasons.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[PrunableLayer],
        skipped: list[Skipped],
        settings: Settings,
        times: Times | None = None,
        ties: ChannelTies | None = None,
    ) -> None:
        self.skipped = tuple(skipped)
        if not layers:
            reasons = "; ".join(f"{s.name}: {s.reason}" for s in self.skipped)
            raise PruneError(f"{type(model).__name__} has no weight that can be pruned ({reasons})")
        self._settings, self._times, self._ties = settings, times, ties
        self._step = 0
        self._finished = False
        block = settings.blocks[0]
        self._pruned = [
            _Pruned(
                layer,
                MaskedWeight(layer.module, layer.parameter, settings.steps > 0),
                layer.shape.natural(block) if ties is None else ties.natural(number, block),
                layer.shape.weights,
            )
            for number, layer in enumerate(layers)
        ]

    @property
    def density(self) -> float:
        """Weights kept now / all weights of the pruned layers."""
        kept = sum(int(p.weight.mask.count_nonzero()) for p in self._pruned)
        return kept / sum(p.layer.shape.weights for p in self._pruned)

    def step(self) -> None:
        """Count one training step, after the optimiser's, and choose blocks anew if it is time.

        Raises:
            PruneError: the pruner has been finalized, or was made without `steps`.
        """
        self._require_unfinished()
        if not self._settings.steps:
            raise PruneError("step() needs pruner(..., steps=N), the training steps to come")
        if self._settings.saliency == "gradient":
            self._accumulate()
        self._step += 1
        progress = self._step / self._settings.steps
        last_choice = self._step == self._last_choice
        if last_choice or (progress < self._settings.settle and self._is_turn):
            self._choose(progress / self._settings.ramp)
            self._shrink(progress / self._settings.ramp)
        if last_choice:
            for pruned in self._pruned:
                pruned.weight.regrow(False)

    @property
    def _is_turn(self) -> bool:
        return self._step % self._settings.every == 0

    @property
    def _is_first(self) -> bool:
        """Whether nothing has been chosen before this step."""
        return self._step <= self._settings.every

    @property
    def _last_choice(self) -> int:
        """The step after which nothing is chosen any more."""
        return max(1, int(self._settings.settle * self._settings.steps))

    def finalize(self) -> PruneReport:
        """Make the masked weights plain parameters again, with zeros in them.

        A pruner whose schedule has not reached its end chooses the final blocks first.

        Returns:
            What was done to each layer.

        Raises:
            PruneError: the pruner has been finalized already.
        """
        self._require_unfinished()
        if self._step < self._last_choice:
            self._choose(1.0)
        report = self.report()
        for pruned in self._pruned:
            pruned.weight.remove()
        self._finished = True
        return report

    def report(self) -> PruneReport:
        """What the masks are now."""
        layers, total = [], 0.0
        for pruned in self._pruned:
            blocks, grouping = self._blocks(pruned), pruned.grouping
            mask = pruned.layer.matrix(pruned.weight.mask) > 0
            density, cycles = float(mask.mean()), None
            if self._times is not None:
                cycles = float(self._times.curve(pruned.layer.name, grouping.block).at(density))
                total += cycles
            whole = float(blocks.saliency.sum(dtype=np.float64))
            held = float(blocks.saliency[mask].sum(dtype=np.float64))
            layers.append(
                PrunedLayer(
                    pruned.layer.name,
                    tuple(pruned.weight.original.shape),
                    grouping.block,
                    density,
                    held / whole if whole > 0 else 1.0,
                    group_order(grouping.rows),
                    None if grouping.channels is None else group_order(grouping.channels),
                    cycles,
                )
            )
        predicted = None
        if self._times is not None:
            predicted = (total + self._fixed) / self._times.dense
        return PruneReport(tuple(layers), self.skipped, predicted)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands and how rows are grouped; the masks are in the model's own."""
        return {
            "step": self._step,
            "layers": {
                p.layer.name: {
                    "block": str(p.grouping.block),
                    "rows": torch.from_numpy(p.grouping.rows.copy()),
                    "channels": None
                    if p.grouping.channels is None
                    else torch.from_numpy(p.grouping.channels.copy()),
                    "kept": p.kept,
                    "average": p.average,
                }
                for p in self._pruned
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; the model's own state dict is loaded by itself.

        Raises:
            PruneError: it is the state of other layers.
        """
        layers = state["layers"]
        if set(layers) != {p.layer.name for p in self._pruned}:
            raise PruneError("the pruner's state is of a model with other layers")
        self._step = int(state["step"])
        for pruned in self._pruned:
            own = layers[pruned.layer.name]
            rows, columns = map(int, own["block"].split("x"))
            channels = None if own["channels"] is None else own["channels"].numpy()
            pruned.grouping = Grouping(BlockShape(rows, columns), own["rows"].numpy(), channels)
            pruned.kept, pruned.average = int(own["kept"]), own["average"]
            pruned.weight.regrow(self._step < self._last_choice)

    def _require_unfinished(self) -> None:
        if self._finished:
            raise PruneError("the pruner has been finalized; make a new one to prune further")

    @property
    def _fixed(self) -> float:
        assert self._times is not None
        return self._times.dense - sum(self._times.layer(p.layer.name) for p in self._pruned)

    @torch.no_grad()
    def _accumulate(self) -> None:
        for pruned in self._pruned:
            weight = pruned.weight.original
            if weight.grad is not None:
                now = (weight * weight.grad).abs()
                before = pruned.average
                pruned.average = now if before is None else before.lerp(now, 1 - MEMORY)

    def _saliency(self, pruned: _Pruned) -> FloatArray:
        """float32 [rows, columns]: what each weight counts."""
        weight = pruned.weight.original
        if self._settings.saliency != "gradient":
            size = pruned.layer.matrix(weight.abs())
            if self._settings.saliency == "magnitude":
                return size
            energy = np.square(size)
            mean = np.mean(energy, axis=1, keepdims=True)
            relative: FloatArray = energy / np.maximum(mean, np.finfo(np.float32).tiny)
            return relative
        if pruned.average is not None:
            return pruned.layer.matrix(pruned.average)
        if weight.grad is None:
            raise PruneError(
                f"{pruned.layer.name}: saliency='gradient' needs gradients; call "
                "loss.backward() on some data first"
            )
        return pruned.layer.matrix((weight * weight.grad).abs())

    def _blocks(self, pruned: _Pruned) -> Blocks:
        return Blocks(pruned.layer.shape, self._saliency(pruned), pruned.grouping)

    @torch.no_grad()
    def _choose(self, progress: float) -> None:
        """Choose groups for the final density, and masks for the one at this share of the ramp."""
        blocks = [self._blocks(pruned) for pruned in self._pruned]
        if len(self._settings.blocks) > 1 and self._times is not None:
            blocks = self._with_best_shapes(blocks)
        kept = self._allocate(blocks)
        if self._settings.pivot and (self._is_first or progress < REGROUPING):
            seed, adapted = self._settings.seed, not self._is_first
            if self._ties is not None:
                blocks = self._ties.regroup(blocks, kept, seed, adapted)
            else:
                pairs = zip(blocks, kept, strict=True)
                blocks = [own.regrouped(weights, seed, adapted) for own, weights in pairs]
            kept = self._allocate(blocks)
        for pruned, own, weights in zip(self._pruned, blocks, kept, strict=True):
            whole = own.shape.weights
            pruned.grouping, pruned.kept = own.grouping, weights
            mask = own.mask(round(whole * cubic(progress, weights / whole)))
            pruned.weight.mask.copy_(torch.from_numpy(mask).view(pruned.weight.mask.shape))

    @torch.no_grad()
    def _shrink(self, progress: float) -> None:
        """Shrink the blocks that the final density has no room for, the worst of them fastest.

        The network gets used to their absence before they are dropped, and one that has begun to
        shrink seldom comes back. The pull grows with `progress`, the share of the ramp.
        """
        if progress >= 1:
            return
        turn = self._settings.every / (self._settings.ramp * self._settings.steps)
        pull = SHRINKING * 2 * progress * turn
        for pruned in self._pruned:
            lack = torch.from_numpy(self._blocks(pruned).lack(pruned.kept))
            weight = pruned.weight.original
            weight.mul_(torch.exp(-pull * lack).view(weight.shape).to(weight))

    @property
    def _names(self) -> list[str]:
        return [pruned.layer.name for pruned in self._pruned]

    @property
    def _last(self) -> int | None:
        """The number of the layer that gives the answer, if it is pruned."""
        return next((n for n, pruned in enumerate(self._pruned) if pruned.layer.last), None)

    def _allocate(self, blocks: list[Blocks]) -> list[int]:
        """Weights that each layer keeps in the end."""
        if self._settings.density is not None:
            return by_density(blocks, self._settings.density, self._last)
        assert self._times is not None and self._settings.latency is not None
        shapes = zip(self._names, (b.grouping.block for b in blocks), strict=True)
        curves = [self._times.curve(name, block) for name, block in shapes]
        return by_latency(blocks, curves, self._settings.latency * self._times.dense, self._fixed)

    def _with_best_shapes(self, blocks: list[Blocks]) -> list[Blocks]:
        """The block shape of each layer that keeps the most in the time that the first one takes.

        Chosen once: later choices would undo what training has adapted to.
        """
        if not self._is_first:
            return blocks
        assert self._times is not None
        chosen = []
        for pruned, own, kept in zip(self._pruned, blocks, self._allocate(blocks), strict=True):
            name, first = pruned.layer.name, self._settings.blocks[0]
            cycles = float(self._times.curve(name, first).at(kept / own.shape.weights))
            options, curves = {}, {}
            for block in self._settings.blocks:
                curves[str(block)] = self._times.curve(name, block)
                option = replace(own, grouping=own.shape.natural(block))
                weights = round(curves[str(block)].density_for(cycles) * own.shape.weights)
                options[str(block)] = option.regrouped(weights, self._settings.seed)
            chosen.append(options[by_block(options, curves, cycles)[0]])
        return chosen
