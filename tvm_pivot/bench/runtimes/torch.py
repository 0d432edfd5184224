"""PyTorch: eager, as a user runs a module, and compiled with torch.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import BF16, FP32, Array, Environment, Port, Runtime, UnsupportedModelError

_ENVIRONMENT = Environment(None, ("torch==2.13.0",), ("torch",), torch=True)


class Torch(Runtime):
    """PyTorch's eager mode, images as channels last.

    What is deployed is the pickled module, so that reading ONNX counts as conversion.
    """

    name = "torch"
    title = "PyTorch"
    environment = _ENVIRONMENT
    precisions = (FP32, BF16)

    @property
    def version(self) -> str:
        import torch

        return str(torch.__version__)

    def convert(self, model: Path, folder: Path) -> list[Path]:
        import torch

        from .onnx_to_torch import network_from_onnx, to_bfloat16

        network = network_from_onnx(model)
        module = network.module
        if self.precision == BF16:
            to_bfloat16(module)
        if any(len(port.shape) == 4 for port in network.inputs):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        path = folder / "module.pt"
        # No class of ours, so that nothing of the conversion is loaded again to run it.
        ports = {
            key: [(port.name, port.shape, port.dtype) for port in found]
            for key, found in (("inputs", network.inputs), ("outputs", network.outputs))
        }
        torch.save({"module": module, **ports}, path)
        return [path]

    def prepare(self, files: Sequence[Path]) -> None:
        import torch

        torch.set_num_threads(self.threads)
        if torch.get_num_interop_threads() != 1:
            torch.set_num_interop_threads(1)
        deployed = torch.load(files[0], weights_only=False)
        self._takes = [Port(*port) for port in deployed["inputs"]]
        self._gives = [Port(*port) for port in deployed["outputs"]]
        self._module: Any = deployed["module"]

    def bind(self, inputs: Mapping[str, Array]) -> None:
        self._inputs = [self._tensor(inputs[port.name]) for port in self._takes]

    def _tensor(self, array: Array) -> Any:
        """An array as the module takes it: its precision, and the channels last in images."""
        import torch

        tensor = torch.tensor(array)
        if self.precision == BF16 and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        if tensor.ndim == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        return tensor

    def run(self) -> None:
        import torch

        with torch.inference_mode():
            self._results = self._module(*self._inputs)

    def outputs(self) -> dict[str, Array]:
        import torch

        results = self._results if isinstance(self._results, tuple) else (self._results,)
        arrays = (r.float() if r.dtype is torch.bfloat16 else r for r in results)
        return {
            port.name: np.array(array.numpy(), order="C")
            for port, array in zip(self._gives, arrays, strict=True)
        }

    def settings(self) -> dict[str, str]:
        import torch

        return {"threads": str(torch.get_num_threads())}


class TorchCompile(Torch):
    """PyTorch compiled by TorchInductor with its weights as constants."""

    name = "torch-compile"
    title = "PyTorch, compiled"

    def prepare(self, files: Sequence[Path]) -> None:
        import torch
        import torch._inductor.config as inductor

        inductor.freezing = True
        inductor.compile_threads = 1  # or worker processes stay, and take time from others
        super().prepare(files)
        # It has a kernel for LSTMs, but unrolls GRUs, which is slower than to leave them alone.
        kinds = {type(module) for module in self._module.modules()}
        torch._dynamo.config.allow_rnn = torch.nn.GRU not in kinds
        self._module = torch.compile(self._module)
        self.bind({p.name: np.zeros(p.shape, p.dtype) for p in self._takes})
        try:
            self.run()
        except Exception as error:  # most often there is no C++ compiler
            message = " ".join(str(error).strip().split("\n")[:2])
            raise UnsupportedModelError(f"torch.compile: {message}") from error
