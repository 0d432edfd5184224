"""Makes a network of the standing set: weights, pruning, calibration, example input."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import data
from .calibrate import calibrate_batch_norm, initialise
from .catalogue import Entry, find, prunable_weights
from .pruning import Mask, Variant, apply_mask, block_diagonal_mask, magnitude_mask

_TRAINED_SAMPLES = 256
_IMAGENET_SAMPLES = 4  # at 224 x 224; smaller images get more, so that statistics stay as good
_MOST_SAMPLES = 32
_INPUT_STREAM = 1  # added to the seed, so that input and weights are drawn independently


def build_torch(
    name: str,
    variant: str = "dense",
    seed: int = 0,
    *,
    image: int | None = None,
    length: int | None = None,
) -> tuple[nn.Module, Tensor]:
    """A network of the standing set in inference mode, and an example input for it.

    ``variant`` is "dense", "<R>x<C>@<density>" (magnitude pruning in blocks of R output rows by C
    input columns; "1x1" is unstructured), "dlmc@<density>" (ResNet-50 only; published masks),
    "diag@<1/n>" or "hidden-diag@<1/n>".  ``image`` and ``length`` shrink the input.

    The same arguments give the same weights and input, and the caller's random state is left
    alone.  Batch norm is kept as modules; a pruned network's is calibrated after pruning.

    Raises ValueError for an unknown name, variant or size and
    :class:`~benchmarks.zoo.data.MissingDataError` if real data is needed and absent.
    """
    entry = find(name).resized(image, length)
    asked = Variant.parse(variant)
    if entry.file is not None:
        raise ValueError(f"{name} is an ONNX file, not a torch module")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)  # constructors draw before `initialise` overwrites
        net = entry.make(entry.shape).eval()
        if entry.trained is None:
            initialise(net, torch.Generator().manual_seed(seed))
        else:
            net.load_state_dict(data.cifar_resnet_state(entry.trained))
        prune(entry, net, asked, seed)
        if entry.trained is None or asked.kind != "dense":
            _calibrate(entry, net, seed)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net, example_input(name, seed, image=image, length=length)


def example_input(
    name: str, seed: int = 0, *, image: int | None = None, length: int | None = None
) -> Tensor:
    """The float32 input :func:`build_torch` returns: an image for the CIFAR networks, else noise.

    Raises as :func:`build_torch` does.
    """
    entry = find(name).resized(image, length)
    if entry.trained is not None:
        return data.cifar10("test", 1)[0]
    generator = torch.Generator().manual_seed(seed + _INPUT_STREAM)
    return torch.randn(entry.shape, generator=generator)


def prune(entry: Entry, net: nn.Module, variant: Variant, seed: int = 0) -> None:
    """Prunes the prunable weights of ``net`` in place, keeping each one's norm."""
    if variant.kind == "dense":
        return
    weights = prunable_weights(entry, net)
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    for name, mask in masks(entry, arrays, variant, seed).items():
        weights[name].data.copy_(torch.from_numpy(apply_mask(arrays[name], mask)))


def masks(
    entry: Entry, weights: dict[str, NDArray[np.float32]], variant: Variant, seed: int = 0
) -> dict[str, Mask]:
    """What a pruned variant of ``entry`` keeps of its weights, by name. Raises as `build_torch`."""
    if variant.kind == "dlmc":
        if entry.name != "resnet50":
            raise ValueError(f"DLMC masks are of ResNet-50, not {entry.name}")
        shapes = {name: weight.shape for name, weight in weights.items()}
        return data.dlmc_resnet50_masks(shapes, variant.density)
    if variant.kind == "block":
        return {
            name: magnitude_mask(weight, variant.block, variant.density)
            for name, weight in weights.items()
        }
    shuffle = np.random.default_rng(seed) if variant.kind == "hidden-diag" else None
    return {
        name: block_diagonal_mask(weight.shape, variant.groups, shuffle)
        for name, weight in weights.items()
    }


def _calibrate(entry: Entry, net: nn.Module, seed: int) -> None:
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return
    if entry.trained is not None:
        calibrate_batch_norm(net, data.cifar10("train", _TRAINED_SAMPLES)[0])
        return
    pixels = entry.shape[2] * entry.shape[3]
    count = min(_MOST_SAMPLES, -(-_IMAGENET_SAMPLES * 224 * 224 // pixels))
    generator = torch.Generator().manual_seed(seed)
    calibrate_batch_norm(net, torch.randn(count, *entry.shape[1:], generator=generator))
