"""TVM as it comes: the Relax front end for ONNX and the default pipeline, without tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Array, Environment, Runtime, UnsupportedModelError, ports

_LIBRARY, _PORTS = "model.so", "ports.json"


class PlainTvm(Runtime):
    """Relax's default pipeline, for the same CPU and instruction sets as tvm_pivot's builds."""

    name = "tvm"
    title = "TVM 0.27, default pipeline"
    environment = Environment(None, ("apache-tvm==0.27.*", "onnx>=1.16"), ("tvm", "onnx"))

    @property
    def version(self) -> str:
        import tvm

        return str(tvm.__version__)

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Compile to a shared library; beside it lie the names of inputs and outputs."""
        import onnx
        from tvm import relax
        from tvm.relax.frontend.onnx import from_onnx

        from tvm_pivot.targets import resolve

        inputs, outputs = ports(model)
        try:
            mod = from_onnx(
                onnx.load(str(model)),
                shape_dict={port.name: list(port.shape) for port in inputs},
                dtype_dict={port.name: port.dtype for port in inputs},
            )
        except Exception as e:  # it raises all sorts, tvm.error.OpNotImplemented among them
            raise UnsupportedModelError(f"TVM's front end: {_first_line(e)}") from e
        executable = relax.build(mod, resolve("x86").to_tvm())
        files = [folder / _LIBRARY, folder / _PORTS]
        executable.export_library(str(files[0]))
        names = [[port.name for port in side] for side in (inputs, outputs)]
        files[1].write_text(json.dumps(names), encoding="utf-8")
        return files

    def prepare(self, files: Sequence[Path]) -> None:
        import tvm
        from tvm import relax

        from tvm_pivot.threads import configure

        configure(self.threads, required=True)
        self._names = json.loads(files[1].read_text(encoding="utf-8"))
        module = tvm.runtime.load_module(str(files[0]))
        self._main: Any = relax.VirtualMachine(module, tvm.cpu())["main"]

    def bind(self, inputs: Mapping[str, Array]) -> None:
        import tvm

        self._inputs = [tvm.runtime.tensor(inputs[name]) for name in self._names[0]]

    def run(self) -> None:
        self._results = self._main(*self._inputs)

    def outputs(self) -> dict[str, Array]:
        names = self._names[1]
        results = self._results if len(names) > 1 else (self._results,)
        return {name: np.array(y.numpy()) for name, y in zip(names, results, strict=True)}

    def settings(self) -> dict[str, str]:
        import tvm

        return {"threads": str(tvm.get_global_func("runtime.NumThreads")())}

    def close(self) -> None:
        del self._main


def _first_line(error: Exception) -> str:
    # Some messages hold whole tensors.
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
