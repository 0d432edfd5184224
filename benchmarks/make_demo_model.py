"""Make the demo's network: fine-tune a dense ResNet-20, prune it to 8x1 blocks, export it.

    python -m benchmarks.make_demo_model --data ../shared/data

Reads `resnet20_cifar10.safetensors` (akamaster/pytorch_resnet_cifar10, BSD-2) and CIFAR-10 as
JPEG; writes `resnet20_8x1.onnx`, `resnet20_8x1.json` and `images.npz` into `tvm_pivot/demo`.

Pruning is gradual magnitude pruning (Zhu & Gupta 2017) of blocks: 8 consecutive output channels
of one (input channel, kh, kw) tap live or die together, those of smallest L2 norm first. Every
convolution but the 3-channel stem ends at the same density. The fine-tuned dense network teaches
the pruned one (knowledge distillation).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.onnx import symbolic_helper
from torch.onnx.utils import register_custom_op_symbolic

REPOSITORY = Path(__file__).resolve().parents[1]
from benchmarks.cifar_training import (
    Split,
    Training,
    accuracy,
    epoch_printer,
    load_split,
    train,
)
from tvm_pivot.demo import FOLDER, load_images, normalise

BLOCK = 8  # output channels kept or dropped together
DEMO_IMAGES = 64
OPSET = 17


@dataclass(frozen=True)
class Recipe(Training):
    """Everything that decides the result, apart from the machine's rounding."""

    seed: int = 0
    train_images: int = 50_000
    dense_epochs: int = 3
    dense_lr: float = 0.02
    prune_epochs: int = 15
    prune_lr: float = 0.05
    ramp: float = 0.4  # share of the pruning steps over which the sparsity rises
    remask_every: int = 50  # steps between two choices of blocks while it rises
    sparsity: float = 0.85


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the parameter-free "option A" shortcut of He et al. 2015."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.pad = (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images, float32 [n, 3, 32, 32] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(width_in: int, width: int, stride: int) -> nn.Sequential:
        rest = (BasicBlock(width, width, 1) for _ in range(2))
        return nn.Sequential(BasicBlock(width_in, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


class BlockPruner:
    """Keeps the strongest 8x1 blocks of each convolution, and the others at exactly zero.

    Args:
        net: the network.
        sparsity: the share of blocks dropped in the end.
        ramp_steps: training steps over which it rises to that.
        every: steps between two choices of blocks while it rises.
    """

    def __init__(
        self, net: nn.Module, sparsity: float = 0.0, ramp_steps: float = 1.0, every: int = 1
    ) -> None:
        self._sparsity, self._ramp_steps, self._every = sparsity, ramp_steps, every
        self._step = 0
        self.weights = {
            name: m.weight
            for name, m in net.named_modules()
            if isinstance(m, nn.Conv2d) and m.in_channels != 3
        }
        self.masks = {name: torch.ones_like(w) for name, w in self.weights.items()}

    @torch.no_grad()
    def choose(self, sparsity: float) -> None:
        """Choose each layer's blocks anew. A dropped block has norm 0, so it stays dropped."""
        for name, weight in self.weights.items():
            norms = weight.reshape(weight.shape[0] // BLOCK, BLOCK, -1).norm(dim=1)
            keep = max(1, round(norms.numel() * (1 - sparsity)))
            mask = torch.zeros(norms.numel())
            mask[norms.flatten().topk(keep).indices] = 1
            rows = mask.view_as(norms).repeat_interleave(BLOCK, dim=0)
            self.masks[name].copy_(rows.view(weight.shape))
        self.apply()

    def step(self) -> None:
        """After each step of the optimiser: choose anew if it is time, and zero what is dropped."""
        self._step += 1
        self.apply()
        ramping = self._step <= self._ramp_steps + self._every
        if ramping and self._step % self._every == 0:
            self.choose(cubic(self._step / self._ramp_steps, self._sparsity))

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what is dropped; momentum moves it again with every step."""
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])


def cubic(progress: float, final: float) -> float:
    """Zhu & Gupta's schedule: fast while there is much to drop, slow near the end."""
    return final * (1 - (1 - min(progress, 1.0)) ** 3)


@symbolic_helper.parse_args("v", "is", "s", "v")
def constant_pad(g: Any, x: Any, widths: list[int], mode: str, value: Any) -> Any:
    """Export F.pad(x, (w0, w0', h0, h0', c0, c0')) as one Pad node with constant widths.

    The exporter's own translation computes them at run time, and leaves shapes behind it open.
    """
    left, right = widths[-2::-2], widths[::-2]  # torch starts at the last axis, ONNX at the first
    batch = [0] * (4 - len(left))
    pads = g.op("Constant", value_t=torch.tensor([*batch, *left, *batch, *right]))
    return g.op("Pad", x, pads, mode_s=mode)


def export(net: nn.Module, path: Path) -> None:
    """Fold the batch norms (which keeps zeros exact) and write ONNX for batch 1."""
    folded = copy.deepcopy(net).eval()
    for owner in list(folded.modules()):
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(owner, bn):
                setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, bn)))
                setattr(owner, bn, nn.Identity())
    folded.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    register_custom_op_symbolic("aten::pad", constant_pad, OPSET)
    torch.onnx.export(
        folded,
        (torch.zeros(1, 3, 32, 32),),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        input_names=["x"],
        output_names=["logits"],
    )


def write_images(test: Split, path: Path) -> None:
    """The first test images; the test set is interleaved by class, so they are balanced."""
    pixels = test.pixels[:DEMO_IMAGES].permute(0, 2, 3, 1).contiguous().numpy()
    labels = test.labels[:DEMO_IMAGES].numpy().astype(np.uint8)
    np.savez_compressed(path, images=pixels, labels=labels, classes=np.array(test.classes))


def accuracy_on_demo_images(model: Path, images: Path) -> float:
    """Percentage onnxruntime gets right on the shipped images with the shipped file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    shipped = load_images(images)
    answers = [session.run(None, {"x": x[None]})[0].argmax() for x in normalise(shipped.pixels)]
    return 100.0 * float(np.mean(np.array(answers) == shipped.labels))


def densities(net: nn.Module) -> dict[str, float]:
    """Non-zeros over all weights, for each convolution and linear layer."""
    return {
        f"{name}.weight": m.weight.count_nonzero().item() / m.weight.numel()
        for name, m in net.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }


def make(data: Path, out: Path, recipe: Recipe) -> None:
    """Train, prune, export, and record what came out."""
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    train_set = load_split(data / "cifar10_train_jpeg.npz", recipe.train_images)
    test = load_split(data / "cifar10_test_jpeg.npz")
    net = ResNet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # strict=False: the file has no `num_batches_tracked`; every other key must be there.
    missing = net.load_state_dict(load_file(data / "resnet20_cifar10.safetensors"), strict=False)
    assert all(k.endswith("num_batches_tracked") for k in missing.missing_keys), missing
    scores = {"dense_as_given": accuracy(net, test)}
    print(f"dense as given: {scores['dense_as_given']:.2f} %", flush=True)

    report = epoch_printer("dense epoch", net, test)
    train(net, train_set, recipe, recipe.dense_epochs, recipe.dense_lr, report)
    scores["dense_fine_tuned"] = accuracy(net, test)
    print(f"dense fine-tuned: {scores['dense_fine_tuned']:.2f} %", flush=True)

    teacher = copy.deepcopy(net).eval()
    ramp = recipe.ramp * recipe.prune_epochs * (len(train_set.labels) // recipe.batch)
    pruner = BlockPruner(net, recipe.sparsity, ramp, recipe.remask_every)
    report = epoch_printer("prune epoch", net, test)
    train(
        net, train_set, recipe, recipe.prune_epochs, recipe.prune_lr, report, teacher, pruner.step
    )
    scores["pruned"] = accuracy(net, test)
    print(f"pruned: {scores['pruned']:.2f} %", flush=True)

    model, images = out / "resnet20_8x1.onnx", out / "images.npz"
    export(net, model)
    write_images(test, images)
    scores["pruned_on_demo_images"] = accuracy_on_demo_images(model, images)
    write_facts(net, scores, recipe, time.perf_counter() - start, out / "resnet20_8x1.json")


def write_facts(
    net: nn.Module, scores: dict[str, float], recipe: Recipe, seconds: float, path: Path
) -> None:
    """Write the record that ships beside the model, and print it."""
    pruned = BlockPruner(net).weights.values()
    kept, total = sum(int(w.count_nonzero()) for w in pruned), sum(w.numel() for w in pruned)
    facts = {
        "origin": "resnet20 of akamaster/pytorch_resnet_cifar10 (BSD-2), fine-tuned and pruned",
        "block": f"{BLOCK}x1",
        "accuracy_percent": {name: round(score, 4) for name, score in scores.items()},
        "density_of_pruned_layers": kept / total,
        "density": densities(net),
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "minutes": round(seconds / 60, 1),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"), flush=True)


def main() -> None:
    """Command line: where the data lies, where to write, and what of the recipe to change."""
    parser = argparse.ArgumentParser(description="Make the demo's block-pruned ResNet-20.")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--threads", type=int, default=1)
    for name, default in asdict(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, default=default, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag, default=default, type=type(default))
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    make(options.pop("data"), options.pop("out"), Recipe(**options))


if __name__ == "__main__":
    main()
