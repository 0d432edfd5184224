"""What the standing set consists of: one :class:`Entry` per network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from . import sequence, vision

Maker = Callable[[tuple[int, ...]], nn.Module]


def _every_layer(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or _every_convolution(layer)


def _every_convolution(layer: nn.Module) -> bool:
    """No depthwise convolution and no stem: few weights that matter more than their number."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels > 3


def _pointwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.kernel_size == (1, 1)


def _recurrent(layer: nn.Module) -> bool:
    return isinstance(layer, nn.RNNBase)


@dataclass(frozen=True)
class Entry:
    """One network: how to make it, its input, what is pruned in it.

    ``make`` takes the input's ``shape``, on which only VGG-16's classifier depends.
    ``resizable`` names what a caller may change of it: "image" (both sides of [N, 3, H, W]),
    "length" (axis 1 of [N, T, C]) or nothing.  ``trained`` is the name of trained weights, None
    for random ones.  ``file`` is the name of an ONNX file that is the network; `make` and
    `is_pruned` do not apply then.
    """

    name: str
    make: Maker
    shape: tuple[int, ...]
    is_pruned: Callable[[nn.Module], bool]
    resizable: str | None = None
    trained: str | None = None
    file: str | None = None

    def resized(self, image: int | None = None, length: int | None = None) -> Entry:
        """The same network for another image side or sequence length; None keeps the standing one.

        Raises ValueError if this network's input has no such size.
        """
        for option, value in (("image", image), ("length", length)):
            if value is not None and self.resizable != option:
                raise ValueError(f"{self.name} has no {option} to set: its input is {self.shape}")
        if image is not None:
            return replace(self, shape=(*self.shape[:2], image, image))
        if length is not None:
            return replace(self, shape=(self.shape[0], length, *self.shape[2:]))
        return self


def prunable_weights(entry: Entry, net: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of ``net`` that a variant of ``entry`` prunes, by state-dict name, in order."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, layer in net.named_modules()
        if entry.is_pruned(layer)
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.ndim > 1
    }


def _imagenet(name: str, make: Maker, is_pruned: Callable[[nn.Module], bool]) -> Entry:
    side = vision.IMAGENET_SIDE
    return Entry(name, make, (1, 3, side, side), is_pruned, resizable="image")


def _cifar(name: str, depth: int) -> Entry:
    side = vision.CIFAR_SIDE
    shape = (1, 3, side, side)
    return Entry(
        name, lambda _: vision.CifarResNet(depth), shape, _every_convolution, trained=f"{name}10"
    )


def _dense(name: str, make: Maker, *shape: int) -> Entry:
    return Entry(name, make, shape, _every_layer, resizable="length" if len(shape) == 3 else None)


def _recurrence(name: str, cell: type[nn.LSTM] | type[nn.GRU]) -> Entry:
    shape = (1, sequence.RECURRENT_LENGTH, sequence.RECURRENT_WIDTH)
    return Entry(
        name,
        lambda _: sequence.Recurrent(cell),
        shape,
        _recurrent,
        resizable="length",
    )


def _file(name: str, file: str, *shape: int) -> Entry:
    def make(_: tuple[int, ...]) -> nn.Module:
        raise TypeError(f"{name} is an ONNX file")

    return Entry(name, make, shape, _every_convolution, file=file)


_ENTRIES = (
    _imagenet("resnet18", lambda _: vision.ResNet(vision.BasicBlock, (2, 2, 2, 2)), _every_layer),
    _imagenet("resnet50", lambda _: vision.ResNet(vision.Bottleneck, (3, 4, 6, 3)), _every_layer),
    _imagenet("vgg16", lambda shape: vision.VGG16(shape[-1]), _every_layer),
    _imagenet("mobilenet_v1", lambda _: vision.MobileNetV1(), _pointwise),
    _imagenet("mobilenet_v2", lambda _: vision.MobileNetV2(), _pointwise),
    _dense("bert2", lambda _: sequence.Encoder(2), 1, sequence.BERT_LENGTH, sequence.MODEL_WIDTH),
    _dense("mlp", lambda _: sequence.MLP(), 128, sequence.MODEL_WIDTH),
    _dense("mlp_b1", lambda _: sequence.MLP(), 1, sequence.MODEL_WIDTH),
    _recurrence("lstm", nn.LSTM),
    _recurrence("gru", nn.GRU),
    _cifar("resnet20_cifar", 3),
    _cifar("resnet56_cifar", 9),
    _file("ultraface", "ultraface_rfb320.onnx", 1, 3, 240, 320),
)
CATALOGUE = {entry.name: entry for entry in _ENTRIES}


def find(name: str) -> Entry:
    """The entry of that name; raises ValueError listing the names there are."""
    if name not in CATALOGUE:
        raise ValueError(f"no network {name!r} in the standing set: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]
