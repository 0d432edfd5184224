"""MNN, without and with its sparse kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .mnn_compression import choose_block_rows, compression_file
from .protocol import Array, Environment, Runtime, UnsupportedModelError

# What the wheel's `mnnconvert` script runs, without what that script does before: it installs a
# package with pip and contacts a server.
_CONVERTER = "import sys, _tools; _tools.mnnconvert(sys.argv)"


class Mnn(Runtime):
    """MNN's CPU backend through its Module interface.

    Only in fp32: on x86 the wheel gives the same bits in its "low" precisions as in "high".
    """

    name = "mnn"
    title = "MNN"
    environment = Environment(None, ("MNN==3.6.1",), ("MNN", "_tools"))

    @property
    def version(self) -> str:
        import MNN

        return str(MNN.version())

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Write one ``.mnn`` file, weights in fp32."""
        return [_convert(model, folder / "model.mnn", "--bizCode", "dense")]

    def prepare(self, files: Sequence[Path]) -> None:
        from MNN import nn

        config = {"backend": "CPU", "numThread": self.threads, "precision": "high"}
        self._manager: Any = nn.create_runtime_manager((config,))
        # No names of inputs and outputs: then it takes all, in the order `get_info` tells.
        self._module: Any = nn.load_module_from_file(
            str(files[0]), [], [], runtime_manager=self._manager, dynamic=False, shape_mutable=False
        )
        self._info: dict[str, Any] = self._module.get_info()

    def bind(self, inputs: Mapping[str, Array]) -> None:
        self._inputs = [_variable(inputs[name]) for name in self._info["inputNames"]]

    def run(self) -> None:
        # Reading an output, which is free, makes MNN compute it if it has put that off.
        self._results = [result.read() for result in self._module.forward(self._inputs)]

    def outputs(self) -> dict[str, Array]:
        # They are views of memory that the next run writes to.
        copies = [np.array(result) for result in self._results]
        return dict(zip(self._info["outputNames"], copies, strict=True))

    def settings(self) -> dict[str, str]:
        """What was asked for: MNN does not tell how many threads it uses."""
        return {"numThread": str(self.threads), "weights": str(self._info["bizCode"])}

    def close(self) -> None:
        del self._module, self._manager


class MnnSparse(Mnn):
    """MNN told to store pruned layers sparse, in the block shape that fits the weights best."""

    name = "mnn-sparse"
    title = "MNN, sparse"
    skips_zeros = True

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Write one ``.mnn`` file, the weights of pruned layers stored sparse."""
        rows = choose_block_rows(model)
        parameters = folder / "compression.bin"
        parameters.write_bytes(compression_file(rows))
        # MNN keeps the bizCode for users' notes: `settings` shows it.
        note = f"sparse, {rows}x1 blocks" if rows > 1 else "sparse, single weights"
        options = ("--detectSparseSpeedUp", "--compressionParamsFile", str(parameters))
        return [_convert(model, folder / "model.mnn", "--bizCode", note, *options)]


def _convert(model: Path, to: Path, *options: str) -> Path:
    """Run MNN's converter in a process of its own: it may print, exit or crash.

    Raises:
        UnsupportedModelError: it wrote no file; the message is the end of what it printed.
    """
    files = ("--modelFile", str(model), "--MNNModel", str(to))
    # Its default form of LSTM and GRU gives wrong outputs.
    recurrent = "--useOriginRNNImpl"
    command = [sys.executable, "-c", _CONVERTER, "-f", "ONNX", *files, recurrent, *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    # It returns success whatever happens.
    if done.returncode != 0 or not to.exists() or to.stat().st_size == 0:
        said = " ".join((done.stdout + done.stderr).split())
        raise UnsupportedModelError(
            f"MNN's converter failed (exit {done.returncode}): {said[-500:]}"
        )
    return to


def _variable(array: Array) -> Any:
    """An input for MNN, which knows no 64-bit types."""
    from MNN import expr

    if array.dtype == np.float32:
        kind = expr.float
    elif array.dtype == np.uint8:
        kind = expr.uint8
    elif np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
        kind, array = expr.int, array.astype(np.int32)
    else:
        raise UnsupportedModelError(f"MNN has no input type {array.dtype}")
    variable = expr.placeholder(list(array.shape), expr.NCHW, kind)
    variable.write(np.ascontiguousarray(array))
    return variable
