"""Masks on the weights of torch modules, as parametrizations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class BlockMask(nn.Module):
    """Multiplies a weight by a mask; what is dropped reads as exactly zero.

    Attributes:
        mask: bool, of the weight's shape; part of the state dict.
        regrow: whether the gradient reaches the dropped weights too, as if they were not dropped
            (a straight-through estimate). So they keep learning and may come back when blocks are
            chosen anew.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, regrow: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.regrow = regrow

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight, of the same shape."""
        if self.regrow and torch.is_grad_enabled():
            return weight - torch.where(self.mask, 0.0, weight).detach()
        return torch.where(self.mask, weight, 0.0)


class MaskedWeight:
    """One weight of a module under a mask, until `remove`."""

    def __init__(self, module: nn.Module, parameter: str, regrow: bool) -> None:
        self.module, self.parameter = module, parameter
        original: nn.Parameter = getattr(module, parameter)
        self._mask = BlockMask(original.detach(), regrow)
        parametrize.register_parametrization(module, parameter, self._mask)
        self._hook = None
        if isinstance(module, nn.RNNBase):
            self._hook = module.register_forward_pre_hook(_refresh)

    @property
    def original(self) -> nn.Parameter:
        """The weight that is trained, with no zero in it."""
        stored = self.module.parametrizations[self.parameter].original  # type: ignore[index,union-attr]
        assert isinstance(stored, nn.Parameter)
        return stored

    @property
    def mask(self) -> Tensor:
        """bool, of the weight's shape."""
        return self._mask.mask

    def regrow(self, wanted: bool) -> None:
        """Whether dropped weights go on learning."""
        self._mask.regrow = wanted

    def remove(self) -> None:
        """Leave the masked weight as a plain parameter, the same object as before."""
        if self._hook is not None:
            self._hook.remove()
        parametrize.remove_parametrizations(self.module, self.parameter, leave_parametrized=True)
        if isinstance(self.module, nn.RNNBase):
            _refresh(self.module)


def _refresh(module: nn.Module, _: object = None) -> None:
    """Recurrent modules keep a list of their weights, which must hold the masked ones."""
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
