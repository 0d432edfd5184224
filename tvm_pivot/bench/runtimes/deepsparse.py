"""DeepSparse, which makes use of zeros in the weights of an ONNX file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Array, Environment, Runtime, UnsupportedModelError, ports

_IR_VERSION = 8  # the newest that it was made for
_OPSET = 17


class DeepSparse(Runtime):
    """DeepSparse's engine, on physical cores chosen by itself. It never leaves the machine."""

    name = "deepsparse"
    title = "DeepSparse"
    environment = Environment(
        "deepsparse", ("deepsparse==1.8.0", "numpy<2", "onnx==1.14.*"), ("deepsparse",)
    )
    skips_zeros = True

    @property
    def version(self) -> str:
        return str(_deepsparse().__version__)

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Nothing, or a copy of the ONNX file that says it is as old as DeepSparse knows them."""
        import onnx

        ports(model)  # shapes must be static
        proto = onnx.load(str(model))
        opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        if opset > _OPSET:
            raise UnsupportedModelError(
                f"the file has version {opset} of ONNX's operators; DeepSparse takes up to {_OPSET}"
            )
        if proto.ir_version <= _IR_VERSION:
            return [model]
        proto.ir_version = _IR_VERSION
        path = folder / "model.onnx"
        onnx.save(proto, str(path))
        return [path]

    def prepare(self, files: Sequence[Path]) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise UnsupportedModelError("DeepSparse needs an x86 CPU with AVX2")
        engine = _deepsparse().Engine
        try:
            # A batch size would replace the first axis of every input.
            self._engine: Any = engine(str(files[0]), batch_size=None, num_cores=self.threads)
        except (RuntimeError, ValueError) as e:
            raise UnsupportedModelError(f"DeepSparse refuses the model: {e}") from e

    def bind(self, inputs: Mapping[str, Array]) -> None:
        self._inputs = [np.ascontiguousarray(inputs[name]) for name in self._engine.input_names]

    def run(self) -> None:
        self._results = self._engine.run(self._inputs, val_inp=False)

    def outputs(self) -> dict[str, Array]:
        return dict(zip(self._engine.output_names, map(np.array, self._results), strict=True))

    def settings(self) -> dict[str, str]:
        cpu = _deepsparse().cpu.cpu_architecture()
        return {
            "num_cores": str(self._engine.num_cores),
            "fraction_of_supported_ops": f"{self._engine.fraction_of_supported_ops:.3f}",
            "instruction set": str(cpu.isa),
        }

    def close(self) -> None:
        del self._engine


def _deepsparse() -> Any:
    """The package, told before it is imported to send nothing to anyone."""
    os.environ["NM_DISABLE_ANALYTICS"] = "True"
    import deepsparse

    return deepsparse
