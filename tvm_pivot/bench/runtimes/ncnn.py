"""ncnn, with files that its converter pnnx makes straight from ONNX."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import BF16, FP32, Array, Environment, Port, Runtime, UnsupportedModelError, ports

_PARAM, _BIN, _PORTS = "model.ncnn.param", "model.ncnn.bin", "ports.json"
_DTYPES = {
    "float32": "f32",
    "float64": "f64",
    "int32": "i32",
    "int64": "i64",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
}  # as pnnx writes them
_INPUT = re.compile(r'ex\.input\("(in\d+)".*batch_index=(\d+)')
_OUTPUT = re.compile(r"(out\d+)\.numpy\(batch_index=(\d+)\)")


class Ncnn(Runtime):
    """ncnn on the CPU. Its fp16 is off; bf16 is how it stores weights and activations."""

    name = "ncnn"
    title = "ncnn"
    environment = Environment(None, ("ncnn==1.0.20261020", "pnnx==20261020"), ("ncnn", "pnnx"))
    precisions = (FP32, BF16)

    @property
    def version(self) -> str:
        import ncnn  # noqa: F401 (loaded here, its memory is not the model's)

        return version("ncnn")

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Write ``.param`` and ``.bin``, weights in fp32, and which axes are batches."""
        inputs, outputs = ports(model)
        files = [folder / name for name in (_PARAM, _BIN, _PORTS)]
        with tempfile.TemporaryDirectory() as scratch:
            example = _pnnx(model.resolve(), inputs, files, Path(scratch))
        # ncnn has no names of the ONNX file. It numbers inputs and outputs in the file's order.
        written = {
            "inputs": _batches(_INPUT, example, "in", inputs),
            "outputs": _batches(_OUTPUT, example, "out", outputs),
        }
        files[-1].write_text(json.dumps(written, indent=1), encoding="utf-8")
        return files

    def prepare(self, files: Sequence[Path]) -> None:
        import ncnn

        param, weights, described = files
        found = json.loads(described.read_text(encoding="utf-8"))
        self._inputs, self._outputs = found["inputs"], found["outputs"]
        self._net: Any = ncnn.Net()
        options = self._net.opt
        options.num_threads = self.threads
        options.use_vulkan_compute = False
        for name in ("packed", "storage", "arithmetic"):
            setattr(options, f"use_fp16_{name}", False)
        options.use_bf16_storage = options.use_bf16_packed = self.precision == BF16
        if self._net.load_param(str(param)) or self._net.load_model(str(weights)):
            raise UnsupportedModelError("ncnn cannot load what pnnx made of the model")

    def bind(self, inputs: Mapping[str, Array]) -> None:
        import ncnn

        used = set(self._net.input_names())
        # Mat does not copy, and keeps no reference to the array.
        self._bound = [
            (port["key"], ncnn.Mat(inputs[port["name"]], batch_index=port["batch"]).clone())
            for port in self._inputs
            if port["key"] in used
        ]

    def run(self) -> None:
        with self._net.create_extractor() as extractor:
            for key, mat in self._bound:
                extractor.input(key, mat)
            self._results = [extractor.extract(port["key"]) for port in self._outputs]

    def outputs(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for port, (status, mat) in zip(self._outputs, self._results, strict=True):
            if status:
                raise RuntimeError(f"ncnn could not compute {port['name']}: status {status}")
            array = np.array(mat.numpy(batch_index=port["batch"]))
            found[port["name"]] = array.astype(port["dtype"], copy=False)
        return found

    def settings(self) -> dict[str, str]:
        options = self._net.opt
        names = ("num_threads", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")
        return {name: str(getattr(options, name)) for name in names}

    def close(self) -> None:
        self._bound, self._results = [], []
        self._net.clear()


def _pnnx(model: Path, inputs: Sequence[Port], files: Sequence[Path], scratch: Path) -> str:
    """Run pnnx, which is a program, and return the example that it writes of how to feed ncnn."""
    package = importlib.util.find_spec("pnnx")  # importing it would import torch
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'pnnx'")
    program = Path(package.submodule_search_locations[0], "pnnx")
    source = scratch / "model.onnx"  # it writes many files beside it
    source.symlink_to(model)
    shapes = ",".join(_shape(port) for port in inputs)
    options = {"inputshape": shapes, "fp16": "0", "ncnnparam": files[0], "ncnnbin": files[1]}
    command = [str(program), str(source), *(f"{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace")
    example = scratch / "model_ncnn.py"
    if done.returncode or not all(file.exists() for file in (files[0], files[1], example)):
        lines = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        raise UnsupportedModelError(
            f"pnnx cannot convert the model; it ended with {done.returncode}: {lines[-1]}"
        )
    _require_known_operators(files[0])
    return example.read_text(encoding="utf-8")


def _shape(port: Port) -> str:
    if port.dtype not in _DTYPES:
        raise UnsupportedModelError(f"{port.name}: pnnx takes no inputs of type {port.dtype}")
    return f"[{','.join(map(str, port.shape))}]{_DTYPES[port.dtype]}"


def _require_known_operators(param: Path) -> None:
    """Raise UnsupportedModelError where pnnx left operators of its own, which ncnn lacks."""
    layers = [line.split()[0] for line in param.read_text(encoding="utf-8").splitlines()[2:]]
    # pnnx's own operators have a namespace: aten::x, F.x, nn.X, torch.x, ...
    unknown = sorted({layer for layer in layers if "." in layer or "::" in layer})
    if unknown:
        raise UnsupportedModelError(f"ncnn has no {', '.join(unknown)}")


def _batches(
    pattern: re.Pattern[str], example: str, prefix: str, of: Sequence[Port]
) -> list[dict[str, Any]]:
    """What to remember of inputs or outputs: names in both files, type, batch axis."""
    batches = {key: int(batch) for key, batch in pattern.findall(example)}
    keys = [f"{prefix}{i}" for i in range(len(of))]
    if set(keys) != set(batches):
        raise UnsupportedModelError(
            f"pnnx made {len(batches)} of the {len(of)} {prefix}puts: {', '.join(batches)}"
        )
    return [
        {"name": port.name, "key": key, "dtype": port.dtype, "batch": batches[key]}
        for port, key in zip(of, keys, strict=True)
    ]
