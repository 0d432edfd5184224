"""The demo: a block-pruned ResNet-20 for CIFAR-10 and 64 test images, shipped with the package.

`python -m tvm_pivot.demo` compiles the network, checks its answers and times it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "resnet20_8x1.onnx"
FACTS = FOLDER / "resnet20_8x1.json"
IMAGES = FOLDER / "images.npz"

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DemoImages:
    """The shipped test images.

    Attributes:
        pixels: uint8 [n, 32, 32, 3], RGB.
        labels: uint8 [n], indices into `classes`.
        classes: the ten class names.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    classes: tuple[str, ...]


def load_images(path: Path = IMAGES) -> DemoImages:
    """Read the shipped images (or a file of the same form)."""
    with np.load(path, allow_pickle=False) as stored:
        names = tuple(str(name) for name in stored["classes"])
        return DemoImages(stored["images"], stored["labels"], names)


def load_facts(path: Path = FACTS) -> dict[str, Any]:
    """What `benchmarks/make_demo_model.py` recorded about the network when it made it."""
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Turn uint8 [n, 32, 32, 3] into the network's input, float32 [n, 3, 32, 32], contiguous."""
    mean = np.asarray(MEAN, dtype=np.float32)
    std = np.asarray(STD, dtype=np.float32)
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
