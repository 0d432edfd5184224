"""The standing set: networks that tests and benchmarks share, dense and pruned.

>>> module, x = build_torch("resnet50", "8x1@0.1")
>>> path = load("resnet50", "8x1@0.1")  # the same network as a cached ONNX file

Networks: resnet18, resnet50, vgg16, mobilenet_v1, mobilenet_v2, bert2, mlp, mlp_b1, lstm, gru,
resnet20_cifar, resnet56_cifar, ultraface.  Weights are random except for the CIFAR networks' and
UltraFace's, which are trained; UltraFace is an ONNX file, with no torch module.  In the MobileNets
only 1x1 convolutions are pruned, in the CIFAR networks and UltraFace all convolutions but the stem
(and depthwise ones), elsewhere every layer but the stem.
"""

from .build import build_torch, example_input
from .catalogue import CATALOGUE, Entry, find, prunable_weights
from .data import SHARED_DATA, MissingDataError
from .export import DEFAULT_CACHE, export_onnx, load
from .pruning import Variant

__all__ = [
    "CATALOGUE",
    "DEFAULT_CACHE",
    "SHARED_DATA",
    "Entry",
    "MissingDataError",
    "Variant",
    "build_torch",
    "example_input",
    "export_onnx",
    "find",
    "load",
    "prunable_weights",
]
