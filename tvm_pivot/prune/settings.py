"""How a network is to be pruned: what the user asked for, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import PruneError
from ..layout import BlockShape
from ..targets import PivotTarget, resolve

Saliency = Literal["magnitude", "relative", "gradient"]


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see `prune` and `pruner`, which document each.

    Raises:
        PruneError: they contradict each other, or are out of range; the message says which.
    """

    density: float | None
    latency: float | None
    blocks: tuple[BlockShape, ...]
    pivot: bool
    saliency: Saliency
    seed: int
    steps: int = 0
    every: int = 1
    ramp: float = 0.5
    settle: float = 0.6

    def __post_init__(self) -> None:
        if (self.density is None) == (self.latency is None):
            raise PruneError("give either density= or latency=, a share of 1 each")
        for name in ("density", "latency"):
            share = getattr(self, name)
            if share is not None and not 0.0 < share <= 1.0:
                raise PruneError(f"{name} must be above 0 and at most 1, not {share}")
        if self.saliency not in get_args(Saliency):
            raise PruneError(f"saliency is one of {get_args(Saliency)}, not {self.saliency!r}")
        if self.steps < 0 or self.every < 1:
            raise PruneError(f"{self.steps} steps, a choice every {self.every}: not positive")
        if not 0.0 < self.ramp <= self.settle <= 1.0:
            raise PruneError(
                f"ramp {self.ramp} and settle {self.settle} must hold 0 < ramp <= settle <= 1"
            )

    @property
    def timed(self) -> bool:
        """Whether predicted times are needed to choose."""
        return self.latency is not None or len(self.blocks) > 1

    @property
    def tied(self) -> bool:
        """Whether blocks hold several channels, so that layers must agree on their order."""
        return self.blocks[0].cols > 1

    @property
    def traced(self) -> bool:
        """Whether the model has to be traced."""
        return self.timed or self.tied


def parse_blocks(text: str | BlockShape, target: str | PivotTarget) -> tuple[BlockShape, ...]:
    """The block shapes to choose from: one, or for ``"auto"`` those that the target likes.

    Raises:
        UnsupportedTargetError: the target is needed and unknown.
        PruneError: it is no block shape, or one whose channels could not be moved together.
    """
    if text == "auto":
        return tuple(BlockShape(rows) for rows in resolve(target).block_rows)
    match = re.fullmatch(r"(\d+)x(\d+)", str(text))
    if match is None or 0 in (sides := (int(match[1]), int(match[2]))):
        raise PruneError(f"block is 'auto' or '<rows>x<columns>', e.g. '8x1', not {text!r}")
    if sides[1] not in (1, sides[0]):
        raise PruneError(
            f"block {text}: a block is R x 1 or R x R, as the rows of one layer are the columns "
            "of the next"
        )
    return (BlockShape(*sides),)


def cubic(progress: float, final: float) -> float:
    """The density at a point of the schedule of Zhu and Gupta (2017): falls fast, then slowly.

    Args:
        progress: 0 at the start, 1 or more at the end.
        final: the density at the end.
    """
    left: float = (1 - min(max(progress, 0.0), 1.0)) ** 3
    return final + (1 - final) * left
