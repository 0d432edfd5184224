"""ExecuTorch: PyTorch's runtime for devices, with its XNNPACK backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Array, Environment, Runtime, UnsupportedModelError


class ExecuTorch(Runtime):
    """ExecuTorch; what XNNPACK cannot take runs in ExecuTorch's own kernels."""

    name = "executorch"
    title = "ExecuTorch"
    environment = Environment(
        "executorch", ("executorch==1.5.1", "onnx"), ("executorch", "onnx"), torch=True
    )

    @property
    def version(self) -> str:
        import executorch.runtime  # noqa: F401 (loading the library is not loading the model)

        return version("executorch")

    def convert(self, model: Path, folder: Path) -> list[Path]:
        import torch
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        from .onnx_to_torch import network_from_onnx

        network = network_from_onnx(model)
        examples = tuple(
            torch.zeros(port.shape, dtype=getattr(torch, port.dtype)) for port in network.inputs
        )
        try:
            exported = torch.export.export(network.module, examples)
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            program = lowered.to_executorch()
        except Exception as error:  # every stage has errors of its own
            message = f"{type(error).__name__}: {error}".split("\n")[0]
            raise UnsupportedModelError(f"export to ExecuTorch: {message}") from error
        file, names = folder / "model.pte", folder / "names.json"
        with file.open("wb") as stream:
            program.write_to_file(stream)
        names.write_text(
            json.dumps(
                {
                    "inputs": [port.name for port in network.inputs],
                    "outputs": [port.name for port in network.outputs],
                }
            )
        )
        return [file, names]

    def prepare(self, files: Sequence[Path]) -> None:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime as Library
        from executorch.runtime import Verification

        portable_lib._unsafe_reset_threadpool(self.threads)
        self._threads_used = portable_lib._threadpool_get_thread_count()
        if self._threads_used != self.threads:
            raise RuntimeError(f"asked for {self.threads} threads, got {self._threads_used}")
        self._names = json.loads(files[1].read_text())
        # The program is kept: methods do not hold on to what they were loaded from.
        self._program: Any = Library.get().load_program(files[0], verification=Verification.Minimal)
        self._method: Any = self._program.load_method("forward")

    def bind(self, inputs: Mapping[str, Array]) -> None:
        import torch

        self._inputs = tuple(torch.tensor(inputs[name]) for name in self._names["inputs"])

    def run(self) -> None:
        self._results = self._method.execute(self._inputs)

    def outputs(self) -> dict[str, Array]:
        arrays = (np.array(result.numpy()) for result in self._results)
        return dict(zip(self._names["outputs"], arrays, strict=True))

    def settings(self) -> dict[str, str]:
        return {"threads": str(self._threads_used), "backend": "XNNPACK"}
