"""Convolutional networks of the standing set, in plain ``torch.nn``.

Parameter names of the ResNets and of VGG-16 follow torchvision's, those of the CIFAR ResNets follow
the trained files they are loaded from, so a state dict of either can be loaded directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_CLASSES = 1000
IMAGENET_SIDE = 224
CIFAR_SIDE = 32


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution without bias ("same" padding), batch norm and, unless None, an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(inputs, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (carrying the stride), 1x1 expand around a shortcut (ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = _conv(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _conv(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return conv_bn(inputs, outputs, 1, stride, activation=None)


class ResNet(nn.Module):
    """ImageNet ResNet: [N, 3, H, W] -> [N, 1000], four groups of ``depths`` blocks."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width = 64
        groups = []
        for index, depth in enumerate(depths):
            planes = 64 << index
            blocks = []
            for position in range(depth):
                blocks.append(block(width, planes, 2 if index and not position else 1))
                width = planes * block.expansion
            groups.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.fc = nn.Linear(width, IMAGENET_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pool


class VGG16(nn.Module):
    """VGG-16 with batch norm: [N, 3, side, side] -> [N, 1000].

    The classifier's first layer grows with the image (512 * (side / 32)^2 inputs), as there is no
    adaptive pooling; ``side`` must be a multiple of 32.
    """

    def __init__(self, side: int = IMAGENET_SIDE) -> None:
        super().__init__()
        if side % 32:
            raise ValueError(
                f"VGG-16 halves the image five times; side {side} is no multiple of 32"
            )
        layers: list[nn.Module] = []
        width = 3
        for planes in _VGG16:
            if planes == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(width, planes, 3, 1, 1), nn.BatchNorm2d(planes), nn.ReLU()]
            width = planes
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(width * (side // 32) ** 2, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, IMAGENET_CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


_MOBILENET_V1 = (  # (output channels, stride) of each depthwise-separable block
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """MobileNetV1, width 1.0: [N, 3, H, W] -> [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        width = 32
        layers = [conv_bn(3, width, 3, 2)]
        for planes, stride in _MOBILENET_V1:
            layers.append(conv_bn(width, width, 3, stride, groups=width))
            layers.append(conv_bn(width, planes, 1))
            width = planes
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, IMAGENET_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class InvertedResidual(nn.Module):
    """1x1 expand, depthwise 3x3, linear 1x1 project; shortcut where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [
            conv_bn(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            conv_bn(hidden, outputs, 1, activation=None),
        ]
        if expansion != 1:
            layers.insert(0, conv_bn(inputs, hidden, 1, activation=nn.ReLU6))
        self.body = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


_MOBILENET_V2 = (  # (expansion, output channels, blocks, stride of the first)
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


class MobileNetV2(nn.Module):
    """MobileNetV2, width 1.0: [N, 3, H, W] -> [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        width = 32
        layers: list[nn.Module] = [conv_bn(3, width, 3, 2, activation=nn.ReLU6)]
        for expansion, planes, depth, stride in _MOBILENET_V2:
            for position in range(depth):
                layers.append(InvertedResidual(width, planes, 1 if position else stride, expansion))
                width = planes
        layers.append(conv_bn(width, 1280, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, IMAGENET_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


class CifarBlock(nn.Module):
    """Basic block whose shortcut has no weights: subsampling plus zero channels (option A)."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.padding = (planes - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        if self.padding:
            x = F.max_pool2d(x, 1, 2)  # a strided slice, which some converters do not know
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(y)) + x)


class CifarResNet(nn.Module):
    """CIFAR-10 ResNet of 6 * ``depth`` + 2 layers: [N, 3, 32, 32] -> [N, 10]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, depth)
        self.layer2 = self._group(16, 32, depth)
        self.layer3 = self._group(32, 64, depth)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _group(inputs: int, planes: int, depth: int) -> nn.Sequential:
        first = CifarBlock(inputs, planes, 1 if inputs == planes else 2)
        return nn.Sequential(first, *(CifarBlock(planes, planes, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.mean(x, (2, 3)))
        return logits
