"""Random weights and batch-norm statistics that keep every activation near one.

Random networks with default batch-norm statistics either explode or decay into denormals, and a
benchmark of them measures the processor's slow paths.  Statistics taken from data prevent both.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter of ``net`` from ``generator``, in the order of ``net.modules()``.

    Convolutions and dense layers get a variance that keeps the scale of their input: 2 / fan-in
    where a ReLU halves the power behind them, 1 / fan-in elsewhere.
    """
    rectified = _before_relu(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            gain = 2.0 if module in rectified else 1.0
            nn.init.normal_(module.weight, 0.0, (gain / fan_in) ** 0.5, generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.02, generator)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.0, generator)
            nn.init.normal_(module.bias, 0.0, 0.1, generator)
        elif isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                deviation = 0.02 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, 0.0, deviation, generator)


def _before_relu(net: nn.Module) -> set[nn.Module]:
    """Convolutions (all rectified or normalised here) and dense layers followed by a ReLU."""
    found: set[nn.Module] = {m for m in net.modules() if isinstance(m, nn.Conv2d)}
    for parent in net.modules():
        if isinstance(parent, nn.Sequential):
            children = list(parent)
            found.update(
                layer
                for layer, after in pairwise(children)
                if isinstance(layer, nn.Linear) and isinstance(after, nn.ReLU)
            )
    return found


@torch.no_grad()
def calibrate_batch_norm(net: nn.Module, samples: Tensor) -> None:
    """Sets each batch norm's mean and variance to those of its input on ``samples`` [N, 3, H, W].

    One pass is exact: in training mode a layer normalises by the very statistics it records, so
    the layers behind it see what they will see in inference.  Leaves ``net`` in inference mode.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # plain average over batches instead of a moving one
        norm.train()
    net(samples)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
