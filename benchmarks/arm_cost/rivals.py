"""What other runtimes execute for a network: their wheels for aarch64, under emulation.

They are driven by the adapters and the worker of ``tvm-pivot bench``: the same settings, the same
converted files, one thread, single precision.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvm_pivot.bench import worker
from tvm_pivot.bench.conversion import convert_all
from tvm_pivot.bench.models import ModelInput
from tvm_pivot.bench.reference import Reference, largest_error
from tvm_pivot.bench.runtimes.protocol import FP32
from tvm_pivot.bench.specs import resolve

from .cores import ArmCostError, Core
from .cost import Cost, grouped
from .emulator import FOLDER
from .guest_python import emulated_python


@dataclass(frozen=True)
class Executed:
    """What one inference executes, and whether it is right.

    Attributes:
        version: of the runtime.
        functions: the cost of one run, by functions.
        error: the largest error over the largest value expected, over all outputs.
    """

    version: str
    functions: dict[str, Cost]
    error: float


def converted(model: ModelInput, runtime: str) -> tuple[Path, ...]:
    """The files that a runtime deploys for a model, converted on this machine.

    Raises:
        ArmCostError: it cannot be converted, or the converter is missing.
    """
    made = convert_all([(model, resolve([runtime])[0])], [FP32], FOLDER / "converted")
    (result,) = made.values()
    if result.status != "ok":
        raise ArmCostError(f"{model.name} for {runtime}: {result.status}: {result.detail}")
    return result.files


def execute(
    model: ModelInput, runtime: str, reference: Reference, core: Core, *, caches: bool = False
) -> Executed:
    """Run a model on a runtime under emulation.

    Args:
        model: an ONNX file.
        runtime: one of `guest_python.RUNTIMES`.
        reference: the model's inputs and right outputs.
        core: what runs it.
        caches: count misses too.

    Raises:
        ArmCostError: it cannot be converted or fails.
    """
    files = converted(model, runtime)
    emulator, python = emulated_python(core)
    program: list[str | Path] = [python, str(worker.__file__), "--runtime", runtime]
    program += ["--threads", "1", "--precision", FP32, "--controller", str(os.getpid())]
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        outputs = Path(scratch, "outputs.npz")
        profile, said = emulator.per_run(
            lambda _: program,
            stdin=lambda runs: _requests(files, reference, outputs, runs),
            caches=caches,
        )
        prepared, checked = _replies(said, f"{model.name} on {runtime}")[:2]
        with np.load(outputs, allow_pickle=False) as arrays:
            found = {name: arrays[f"arr_{i}"] for i, name in enumerate(checked["names"])}
    error = largest_error(found, reference.samples[0].expected)
    return Executed(str(prepared["version"]), grouped(profile, core), error)


def _requests(files: tuple[Path, ...], reference: Reference, outputs: Path, runs: int) -> str:
    """What the worker reads: it runs the network once to check it, the other times to time it."""
    first, second = reference.samples
    requests: list[dict[str, Any]] = [
        {"do": "prepare", "files": list(map(str, files))},
        {
            "do": "check",
            "inputs": str(first.file),
            "other": str(second.file),
            "names": list(first.inputs),
            "outputs": str(outputs),
        },
        {"do": "time", "warm": 0, "calls": runs - 1},
        {"do": "close"},
    ]
    return "".join(json.dumps(request) + "\n" for request in requests)


def _replies(text: str, what: str) -> list[dict[str, Any]]:
    replies = [json.loads(line) for line in text.splitlines()]
    for reply in replies:
        if "error" in reply:
            raise ArmCostError(f"{what}: {reply['error']}")
    return replies
