"""What is checked on a GPU: networks of the standing set, and single dense layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray


@dataclass(frozen=True)
class Network:
    """A network of the standing set."""

    name: str
    variant: str
    precision: str
    batch: int = 1

    @property
    def key(self) -> str:
        """A name for its files."""
        return f"{self.name}_{self.variant}_{self.precision}_b{self.batch}"


@dataclass(frozen=True)
class Layer:
    """A dense layer in blocks of `rows` x `columns`, for `pixels` inputs."""

    outputs: int
    inputs: int
    pixels: int
    rows: int
    columns: int
    density: float
    precision: str

    @property
    def key(self) -> str:
        """A name for its files."""
        shape = f"{self.outputs}x{self.inputs}x{self.pixels}"
        return f"dense_{shape}_{self.rows}x{self.columns}@{self.density:g}_{self.precision}"

    def weight(self) -> Array:
        """float32 [outputs, inputs], the same on every machine."""
        rng = np.random.default_rng(1)
        kept = rng.random((self.outputs // self.rows, self.inputs // self.columns)) < self.density
        mask = np.repeat(np.repeat(kept, self.rows, axis=0), self.columns, axis=1)
        weight = rng.standard_normal(mask.shape, dtype=np.float32) * mask
        return np.asarray(weight / np.sqrt(self.density * self.inputs), np.float32)

    def input(self) -> Array:
        """float32 [pixels, inputs]."""
        shape = (self.pixels, self.inputs)
        return np.random.default_rng(2).standard_normal(shape, dtype=np.float32)

    def module(self) -> torch.nn.Module:
        """The layer for torch."""
        module = torch.nn.Linear(self.inputs, self.outputs, bias=False)
        module.weight.data = torch.from_numpy(self.weight())
        return module.eval()


NETWORKS = (
    *(Network("resnet50", v, "float16", b) for v in ("8x1@0.1", "16x1@0.1") for b in (1, 64)),
    Network("resnet50", "16x1@0.1", "float32"),
    Network("resnet18", "8x1@0.1", "float16"),
    Network("mobilenet_v1", "8x1@0.1", "float16"),
    Network("mobilenet_v2", "4x1@0.2", "float32"),
    Network("bert2", "16x1@0.1", "float16"),
    Network("lstm", "8x1@0.1", "float32"),
    Network("mlp_b1", "hidden-diag@0.125", "float32"),
)
BLOCKS = ((8, 1, 0.1), (16, 1, 0.1), (16, 16, 0.1), (32, 32, 0.1), (32, 32, 0.05))
LAYERS = (
    *(Layer(4096, 4096, 4096, r, c, d, "float16") for r, c, d in BLOCKS),
    Layer(4096, 4096, 4096, 16, 1, 0.1, "float32"),
    Layer(4096, 4096, 1, 8, 1, 0.1, "float16"),
    Layer(2048, 512, 4096, 8, 1, 0.1, "float16"),
    Layer(512, 2048, 4096, 8, 1, 0.1, "float16"),
)
