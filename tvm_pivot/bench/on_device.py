"""Times of networks on another machine, over RPC: sparse and dense builds, outputs checked."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..cli import make_inputs
from ..compiler import build
from ..errors import InputError, PivotError
from ..session import Session

# Of the range of ONNX Runtime's output.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class OnDevice:
    """What one build of a network took on the device.

    Attributes:
        model: the network's name.
        sparse: whether zeros were skipped.
        seconds: of each run, by the device's clock.
        error: the largest difference from ONNX Runtime, as a share of the output's range.
    """

    model: str
    sparse: bool
    seconds: tuple[float, ...]
    error: float


def measure(
    path: Path, name: str, target: str, address: str, repeat: int, tell: Callable[[str], None]
) -> list[OnDevice]:
    """Compile a network for `target`, with and without its zeros, and time it at `address`.

    Raises:
        PivotError: it cannot be compiled or run, or gives something else than ONNX Runtime.
    """
    found = []
    for sparse in (True, False):
        tell(f"{name}, {'sparse' if sparse else 'dense'}")
        net = build(path, target, sparse=sparse)
        found.append(_measure(net, path, OnDevice(name, sparse, (), 0.0), address, repeat))
        del net  # with its connection: a server talks to one client at a time
    return found


def _measure(net: Session, path: Path, of: OnDevice, address: str, repeat: int) -> OnDevice:
    inputs = make_inputs(net, seed=0)
    arrays = [inputs[spec.name] for spec in net.inputs]
    there = net.on(address)
    error = 0.0
    for got, want in zip(there.run(arrays), _reference(path, inputs), strict=True):
        scale = max(float(np.ptp(want)), float(np.finfo(np.float32).tiny))
        error = max(error, float(np.max(np.abs(got - want))) / scale)
    if not error <= TOLERANCE:
        raise PivotError(f"{of.model}: {address} gives other outputs than ONNX Runtime ({error:g})")
    return replace(of, seconds=there.times(arrays, repeat), error=error)


def _reference(path: Path, inputs: dict[str, Any]) -> list[Any]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise InputError("outputs are checked by ONNX Runtime: pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def table(found: list[OnDevice]) -> Table:
    """The times as a table."""
    shown = Table("network", "build", "median ms", "shortest ms", "error", "runs")
    for one in found:
        times = (statistics.median(one.seconds), min(one.seconds))
        build_name = "sparse" if one.sparse else "dense"
        figures = [f"{1e3 * seconds:.3f}" for seconds in times]
        shown.add_row(one.model, build_name, *figures, f"{one.error:.1e}", str(len(one.seconds)))
    return shown
