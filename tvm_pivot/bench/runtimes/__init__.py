"""The runtimes that can be compared: name -> the module and class of its adapter.

A new runtime is one file here and one line in `ADAPTERS`.
"""

from __future__ import annotations

from importlib import import_module

from .protocol import Environment, Runtime, UnsupportedModelError

ADAPTERS = {
    "pivot": ("pivot", "Pivot"),
    "pivot-dense": ("pivot", "PivotDense"),
    "onnxruntime": ("onnxruntime", "OnnxRuntime"),
    "openvino": ("openvino", "OpenVino"),
    "openvino-sparse": ("openvino", "OpenVinoSparse"),
    "mnn": ("mnn", "Mnn"),
    "mnn-sparse": ("mnn", "MnnSparse"),
    "litert": ("litert", "LiteRt"),
    "ncnn": ("ncnn", "Ncnn"),
    "torch": ("torch", "Torch"),
    "torch-compile": ("torch", "TorchCompile"),
    "executorch": ("executorch", "ExecuTorch"),
    "deepsparse": ("deepsparse", "DeepSparse"),
    "tvm": ("tvm", "PlainTvm"),
}

__all__ = ["ADAPTERS", "Environment", "Runtime", "UnsupportedModelError", "adapter"]


def adapter(name: str) -> type[Runtime]:
    """The adapter class of a runtime.

    Raises:
        KeyError: there is no such runtime; the argument is the name.
    """
    module, class_name = ADAPTERS[name]
    found: type[Runtime] = getattr(import_module(f".{module}", __package__), class_name)
    return found
