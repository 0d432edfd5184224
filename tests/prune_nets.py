"""Small torch networks of many kinds, for the tests of pruning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """[n, 24] -> [n, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(24, 48)
        self.fc2 = nn.Linear(48, 32)
        self.fc3 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return y


class Residual(nn.Module):
    """A stem, two tied blocks, a depthwise and a grouped convolution: [n, 3, 8, 8] -> [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(self.grouped(self.depthwise(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Encoder(nn.Module):
    """An encoder layer over embedded words: int64 [n, 6] -> [n, 6, 20]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.out = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.layer(self.words(x)))
        return y


class Recurrent(nn.Module):
    """Two LSTM layers: [n, 5, 12] -> [n, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, 2, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.lstm(x)[0].mean(1))
        return y


NETS = (Mlp, Residual, Encoder, Recurrent)


def make(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return kind()


def example(kind: type[nn.Module]) -> Tensor:
    """An input of four samples."""
    generator = torch.Generator().manual_seed(1)
    if kind is Encoder:
        return torch.randint(11, (4, 6), generator=generator)
    shape = {Mlp: (4, 24), Residual: (4, 3, 8, 8), Recurrent: (4, 5, 12)}[kind]
    return torch.randn(shape, generator=generator)


def train_steps(net: nn.Module, x: Tensor, steps: int, after: object = None) -> None:
    """A few steps of plain SGD with momentum, starting with none."""
    optimiser = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    net.train()
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(net(x).square().mean())
        optimiser.step()
        if callable(after):
            after()
