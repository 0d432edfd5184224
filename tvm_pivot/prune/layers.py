"""The weights of a torch model that can be pruned, and why others can't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layer_names import layer_name
from ..layout import FloatArray
from .blocks import LayerShape
from .report import Skipped

# Channels of an image: what reads them is a stem.
IMAGE_CHANNELS = 4
# What a last layer must hold of all weights to be worth pruning.
LAST_SHARE = 0.01
_NO_KERNEL = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Conv3d, nn.Bilinear)
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, eq=False)
class PrunableLayer:
    """A weight that multiplies its input as a matrix [rows, columns], columns in (channel, tap)
    order.

    Attributes:
        name: the weight's name without ``.weight``, as reports of `build` have it.
        module: its owner.
        parameter: its name there.
        shape: the matrix.
        last: whether it gives the model's answer.
    """

    name: str
    module: nn.Module
    parameter: str
    shape: LayerShape
    last: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight itself."""
        return tuple(getattr(self.module, self.parameter).shape)

    def matrix(self, values: Tensor) -> FloatArray:
        """A tensor of the weight's shape as float32 [rows, columns]."""
        flat = values.detach().flatten(1).cpu().float().contiguous()
        return np.asarray(flat.numpy(), np.float32)


def find_layers(
    model: nn.Module, skip: Collection[str] = ()
) -> tuple[list[PrunableLayer], list[Skipped]]:
    """The weights to prune in the order of the model's modules, and those left dense with reasons.

    Args:
        model: any module.
        skip: names of layers to leave dense, with ``*`` for any part.
    """
    layers: list[PrunableLayer] = []
    skipped: list[Skipped] = []
    for name, module, parameter, weight in _weights(model):
        label = layer_name(name)
        shape = _shape(module, parameter, weight)
        reason = "asked to be left dense"
        if not any(fnmatchcase(label, pattern) for pattern in skip):
            reason = _refusal(module, parameter, weight, shape)
        if reason:
            skipped.append(Skipped(label, tuple(weight.shape), reason))
        elif shape is not None:
            layers.append(PrunableLayer(label, module, parameter, shape))
    layers, shared = _without_shared(model, layers)
    layers, small = _with_last(layers)
    return layers, [*skipped, *shared, *small]


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter of two or more axes: its full name, owner, name there, and value."""
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # its owner has it
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            names += list(module.parametrizations)
        for name in names:
            value = getattr(module, name)
            if value.ndim > 1:
                yield (f"{prefix}.{name}" if prefix else name), module, name, value


def _shape(module: nn.Module, parameter: str, weight: Tensor) -> LayerShape | None:
    """The weight as a matrix; None where it does not multiply as one."""
    rows, channels = weight.shape[:2]
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return LayerShape(rows, channels, weight[0, 0].numel(), module.groups)
    recurrent = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    if isinstance(module, nn.Linear) or (recurrent and parameter.startswith("weight_")):
        return LayerShape(rows, channels)
    if isinstance(module, nn.MultiheadAttention) and parameter.endswith("proj_weight"):
        return LayerShape(rows, channels)
    return None


def _refusal(module: nn.Module, parameter: str, weight: Tensor, shape: LayerShape | None) -> str:
    """Why a weight is left dense, or nothing."""
    if parametrize.is_parametrized(module, parameter):
        return "is parametrized already; prune before or after that"
    if isinstance(module, _LOOKED_UP):
        return "an embedding is looked up, not multiplied"
    if isinstance(module, _NO_KERNEL):
        return f"there is no sparse kernel for {type(module).__name__}"
    if not weight.is_floating_point():
        return f"its weights are {weight.dtype}, not floating point"
    if shape is None:
        return f"how {type(module).__name__} uses it is not known"
    if shape.groups > 1 and shape.channels == 1:
        return "depthwise: every row has one input channel of its own"
    if isinstance(module, nn.Conv2d) and shape.groups == 1 and shape.channels <= IMAGE_CHANNELS:
        return "the stem, which reads the image: small, and all else depends on it"
    return ""


def _without_shared(
    model: nn.Module, layers: list[PrunableLayer]
) -> tuple[list[PrunableLayer], list[Skipped]]:
    """Layers whose weight has one owner: a mask on one name of a tied weight would untie it."""
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update(id(p) for _, p in module.named_parameters(recurse=False))
    kept, skipped = [], []
    for layer in layers:
        weight = getattr(layer.module, layer.parameter)
        if holders[id(weight)] > 1:
            reason = "is tied to another module's weight, and a mask would untie it"
            skipped.append(Skipped(layer.name, tuple(weight.shape), reason))
        else:
            kept.append(layer)
    return kept, skipped


def _with_last(
    layers: list[PrunableLayer],
) -> tuple[list[PrunableLayer], list[Skipped]]:
    """The last layer marked; without it where it is small: it would save nothing."""
    if len(layers) < 2:
        return layers, []
    *others, last = layers
    if last.shape.weights < LAST_SHARE * sum(layer.shape.weights for layer in layers):
        return others, [Skipped(last.name, last.weight_shape, "the last layer, and a small one")]
    return [*others, replace(last, last=True)], []
