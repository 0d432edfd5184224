"""ONNX Runtime: what most users of ONNX files run them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .protocol import Array, Environment, Runtime


class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider with all graph optimisations."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    environment = Environment(None, ("onnxruntime>=1.20",), ("onnxruntime",))

    @property
    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def prepare(self, files: Sequence[Path]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self._session: Any = onnxruntime.InferenceSession(
            str(files[0]), options, providers=["CPUExecutionProvider"]
        )
        self._names = [output.name for output in self._session.get_outputs()]

    def bind(self, inputs: Mapping[str, Array]) -> None:
        self._inputs = dict(inputs)

    def run(self) -> None:
        self._results = self._session.run(None, self._inputs)

    def outputs(self) -> dict[str, Array]:
        return dict(zip(self._names, self._results, strict=True))

    def settings(self) -> dict[str, str]:
        options = self._session.get_session_options()
        return {"intra_op_num_threads": str(options.intra_op_num_threads)}
