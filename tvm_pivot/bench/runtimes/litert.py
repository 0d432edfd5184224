"""LiteRT, the name of TensorFlow Lite today, with its default delegate, XNNPACK."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Array, Environment, Runtime, UnsupportedModelError

_MODEL, _PORTS = "model.tflite", "ports.json"


class LiteRt(Runtime):
    """LiteRT's interpreter on a file that onnx2tf and TensorFlow's converter make.

    Image-like inputs are channels last in that file, as LiteRT wants them. They are transposed
    when they are bound and outputs when they are read, which is not timed.
    """

    name = "litert"
    title = "LiteRT (TFLite)"
    environment = Environment(None, ("ai-edge-litert==2.3.0",), ("ai_edge_litert",))
    # onnx2tf pins the versions of all it needs, TensorFlow 2.19.0 among them.
    converter = Environment("tensorflow", ("onnx2tf==1.29.24",), ("onnx2tf", "tensorflow"))

    @property
    def version(self) -> str:
        import ai_edge_litert.interpreter  # noqa: F401 (loaded here, its memory is not the model's)

        return version("ai-edge-litert")

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Write a ``.tflite`` file in fp32 and the order of axes of its inputs and outputs."""
        from .litert_convert import convert

        content, layout = convert(model)
        files = [folder / _MODEL, folder / _PORTS]
        files[0].write_bytes(content)
        files[1].write_text(json.dumps(asdict(layout), indent=1), encoding="utf-8")
        return files

    def prepare(self, files: Sequence[Path]) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._layout = read_layout(files[1])
        self._interpreter: Any = Interpreter(str(files[0]), num_threads=self.threads)
        try:
            self._interpreter.allocate_tensors()
        except RuntimeError as e:
            raise UnsupportedModelError(f"LiteRT cannot prepare the model: {e}") from e
        # The signature has names of tensors; its runner would copy inputs at each call.
        signature = self._interpreter.get_signature_runner()
        self._inputs = signature.get_input_details()
        self._outputs = signature.get_output_details()

    def bind(self, inputs: Mapping[str, Array]) -> None:
        for port in self._layout.inputs:
            tensor = self._inputs.get(port.key)
            if tensor is not None:  # one that no output depends on is not in the file
                array = inputs[port.name].transpose(port.axes)
                array = np.ascontiguousarray(array, tensor["dtype"])
                self._interpreter.set_tensor(tensor["index"], array)

    def run(self) -> None:
        self._interpreter.invoke()

    def outputs(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for port in self._layout.outputs:
            array = self._interpreter.get_tensor(self._outputs[port.key]["index"])
            array = array.transpose(np.argsort(port.axes))
            found[port.name] = np.ascontiguousarray(array, port.dtype)
        return found

    def settings(self) -> dict[str, str]:
        operators = [op["op_name"] for op in self._interpreter._get_ops_details()]
        parts = operators.count("DELEGATE")
        return {"num_threads": str(self.threads), "parts of the graph in XNNPACK": str(parts)}

    def close(self) -> None:
        del self._interpreter


@dataclass(frozen=True)
class TensorLayout:
    """How an input or output lies in the ``.tflite`` file.

    Attributes:
        name: in the ONNX file.
        key: in the signature of the ``.tflite`` file.
        dtype: in the ONNX file.
        axes: order of the ONNX file's axes in the ``.tflite`` file, e.g. (0, 2, 3, 1).
    """

    name: str
    key: str
    dtype: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How all inputs and outputs lie in the ``.tflite`` file."""

    inputs: tuple[TensorLayout, ...]
    outputs: tuple[TensorLayout, ...]


def read_layout(path: Path) -> Layout:
    """Read what `LiteRt.convert` wrote beside the ``.tflite`` file."""
    written = json.loads(path.read_text(encoding="utf-8"))
    return Layout(*(tuple(map(_read_tensor, written[key])) for key in ("inputs", "outputs")))


def _read_tensor(entry: Mapping[str, Any]) -> TensorLayout:
    return TensorLayout(entry["name"], entry["key"], entry["dtype"], tuple(entry["axes"]))
