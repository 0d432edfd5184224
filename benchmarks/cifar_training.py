"""Training on CIFAR-10 on a few cores: images, augmentation, and one loop for all that prune.

What decides the result, apart from the machine's rounding, is a `Training` and torch's seed.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.zoo import DEFAULT_CACHE
from tvm_pivot.demo import MEAN, STD


@dataclass(frozen=True)
class Training:
    """How a network is trained."""

    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 4.0
    distill: float = 0.7  # weight of the teacher's loss; the labels get the rest
    bf16: bool = True  # autocast in training; evaluation is always float32


@dataclass(frozen=True)
class Split:
    """Decoded images: pixels uint8 [n, 3, 32, 32], labels int64 [n], the class names."""

    pixels: Tensor
    labels: Tensor
    classes: list[str]


def load_split(path: Path, count: int | None = None) -> Split:
    """Decode the first `count` images (all of them for None) of one JPEG archive."""
    with np.load(path, allow_pickle=False) as stored:
        jpeg, offsets, labels = stored["jpeg"], stored["offsets"], stored["labels"]
        classes = [str(name) for name in stored["classes"]]
    count = len(labels) if count is None else min(count, len(labels))
    pixels = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        encoded = io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())
        pixels[i] = np.asarray(Image.open(encoded).convert("RGB"))
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return Split(planes, torch.from_numpy(labels[:count].astype(np.int64)), classes)


def cached_split(data: Path, split: Literal["train", "test"], count: int) -> Split:
    """`load_split` of the archive in `data`, decoded once and kept in the cache folder."""
    cache = DEFAULT_CACHE / f"cifar10_{split}_{count}.npz"
    if not cache.is_file():
        found = load_split(data / f"cifar10_{split}_jpeg.npz", count)
        cache.parent.mkdir(parents=True, exist_ok=True)
        written = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(written, pixels=found.pixels, labels=found.labels, classes=np.array(found.classes))
        written.replace(cache)
    with np.load(cache, allow_pickle=False) as stored:
        classes = [str(name) for name in stored["classes"]]
        return Split(
            torch.from_numpy(stored["pixels"]), torch.from_numpy(stored["labels"]), classes
        )


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, 32, 32] -> normalised float32, channels last (the faster layout here)."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(pixels: Tensor) -> Tensor:
    """Random 32x32 crops out of 40x40 (zero padding of 4) and horizontal flips, per image."""
    n = len(pixels)
    padded = F.pad(pixels, (4, 4, 4, 4))
    span = torch.arange(32)
    rows = torch.randint(9, (n, 1)) + span
    columns = torch.randint(9, (n, 1)) + span
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    image = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(3).view(1, 3, 1, 1)
    return padded[image, channel, rows.view(n, 1, 32, 1), columns.view(n, 1, 1, 32)]


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Percentage of images classified right, in float32 and inference mode."""
    net.eval()
    right = 0
    for pixels, labels in zip(
        torch.split(split.pixels, 500), torch.split(split.labels, 500), strict=True
    ):
        right += int((net(to_input(pixels)).argmax(1) == labels).sum())
    return 100.0 * right / len(split.labels)


def loss_of(net: nn.Module, teacher: nn.Module | None, x: Tensor, y: Tensor, r: Training) -> Tensor:
    """Cross-entropy, mixed with the divergence from the teacher's softened answer if any."""
    with torch.autocast("cpu", torch.bfloat16, enabled=r.bf16):
        logits = net(x).float()
        if teacher is None:
            return F.cross_entropy(logits, y)
        with torch.no_grad():
            target = F.log_softmax(teacher(x).float() / r.temperature, 1)
    soft = F.log_softmax(logits / r.temperature, 1)
    divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
    # T^2 keeps the gradient's size independent of the temperature (Hinton et al. 2015).
    scaled = divergence * r.temperature**2
    return r.distill * scaled + (1 - r.distill) * F.cross_entropy(logits, y)


def train(
    net: nn.Module,
    data: Split,
    how: Training,
    epochs: int,
    lr: float,
    report: Callable[[int, float], None],
    teacher: nn.Module | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Momentum SGD with a cosine learning rate; `after_step`, if any, prunes on the way."""
    optimiser = torch.optim.SGD(
        net.parameters(), lr, how.momentum, weight_decay=how.weight_decay, nesterov=True
    )
    steps_per_epoch = len(data.labels) // how.batch
    total = max(1, epochs * steps_per_epoch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    for epoch in range(epochs):
        net.train()
        order = torch.randperm(len(data.labels))[: steps_per_epoch * how.batch]
        loss_sum = 0.0
        for batch in torch.split(order, how.batch):
            x = to_input(augment(data.pixels[batch]))
            loss = loss_of(net, teacher, x, data.labels[batch], how)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if after_step is not None:
                after_step()
            schedule.step()
            loss_sum += float(loss.detach())
        report(epoch + 1, loss_sum / steps_per_epoch)


def epoch_printer(title: str, net: nn.Module, test: Split) -> Callable[[int, float], None]:
    """A callback that prints loss, time and, on a tenth of the test images, accuracy."""
    start = time.perf_counter()
    sample = Split(test.pixels[:1000], test.labels[:1000], test.classes)

    def report(epoch: int, loss: float) -> None:
        seconds = time.perf_counter() - start
        score = accuracy(net, sample)
        print(
            f"{title} {epoch}: loss {loss:.3f}, {score:.1f} % of 1000, {seconds:.0f} s", flush=True
        )

    return report
