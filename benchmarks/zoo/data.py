"""Readers for the real data that tests and benchmarks use when it is there.

The data lies beside the repository (``../shared/data``) and is never part of it.
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
_DLMC_STEM = "initial_conv"


class MissingDataError(FileNotFoundError):
    """A file of real data is not on this machine; the message names it."""


def data_file(name: str, folder: Path = SHARED_DATA) -> Path:
    """Path of a data file; raises :class:`MissingDataError` if it is absent."""
    path = folder / name
    if not path.is_file():
        raise MissingDataError(f"{name} is not in {folder}: real data, kept beside the project")
    return path


def dlmc_layer_name(torch_name: str) -> str:
    """DLMC's name for a ResNet-50 weight ("layer2.0.conv1.weight", "fc.weight").

    The first block of each group is DLMC's "projection" block, its shortcut a convolution of its
    own.  Raises KeyError for a weight DLMC does not have.
    """
    fixed = {"conv1.weight": _DLMC_STEM, "fc.weight": "final_dense"}
    if torch_name in fixed:
        return fixed[torch_name]
    parts = torch_name.removesuffix(".weight").split(".")
    if len(parts) < 3 or not parts[0].startswith("layer"):
        raise KeyError(f"DLMC's ResNet-50 has no counterpart of {torch_name!r}")
    group, block, layer = parts[0].removeprefix("layer"), parts[1], parts[2]
    first = f"block_group_projection_block_group{group}"
    if layer == "downsample":
        return f"bottleneck_projection_{first}"
    conv = layer.removeprefix("conv")
    return f"bottleneck_{conv}_" + (first if block == "0" else f"block_group{group}_{block}_1")


def dlmc_resnet50_masks(
    shapes: dict[str, tuple[int, ...]], density: float, folder: Path = SHARED_DATA
) -> dict[str, NDArray[np.bool_]]:
    """Masks of DLMC's magnitude-pruned ResNet-50 for weights given by torch name and shape.

    Returns one bool array per name, in the weight's own layout (OI or OIHW), True where kept.
    Raises :class:`MissingDataError` without a file of that density, KeyError for an unknown name
    and ValueError where a shape does not agree with the file.
    """
    path = data_file(f"dlmc_rn50_magnitude_{1 - density:g}.npz", folder)
    masks = {}
    with np.load(path, allow_pickle=False) as archive:
        for name, shape in shapes.items():
            layer = dlmc_layer_name(name)
            rows, columns = (int(extent) for extent in archive[f"{layer}.shape"])
            if (rows, columns) != (shape[0], int(np.prod(shape[1:]))):
                raise ValueError(f"{path.name}: {layer} is {rows}x{columns}, {name} is {shape}")
            bits = np.unpackbits(archive[layer], axis=1)[:, :columns].astype(np.bool_)
            if len(shape) == 4:  # stored (O, kh, kw, I)
                bits = bits.reshape(rows, *shape[2:], shape[1]).transpose(0, 3, 1, 2)
            masks[name] = np.ascontiguousarray(bits)
    return masks


def cifar10(
    split: Literal["train", "test"], count: int, folder: Path = SHARED_DATA
) -> tuple[Tensor, NDArray[np.int64]]:
    """First ``count`` images, class-balanced: float32 [count, 3, 32, 32] normalised, and labels.

    Raises :class:`MissingDataError` if the file is absent.
    """
    from PIL import Image  # only the CIFAR networks need it

    with np.load(data_file(f"cifar10_{split}_jpeg.npz", folder), allow_pickle=False) as archive:
        stream = archive["jpeg"].tobytes()
        offsets, labels = archive["offsets"].tolist(), archive["labels"][:count].astype(np.int64)
    images = []
    for start, stop in pairwise(offsets[: count + 1]):
        decoded = Image.open(io.BytesIO(stream[start:stop])).convert("RGB")
        images.append(np.asarray(decoded, np.float32).transpose(2, 0, 1) / 255.0)
    return torch.from_numpy((np.stack(images) - _MEAN) / _DEVIATION), labels


def cifar_resnet_state(name: str, folder: Path = SHARED_DATA) -> dict[str, Tensor]:
    """Trained state dict of "resnet20_cifar10" or "resnet56_cifar10"."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(data_file(f"{name}.safetensors", folder))
    return state
