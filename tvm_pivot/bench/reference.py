"""What the outputs of every runtime are checked against."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .runtimes import UnsupportedModelError
from .runtimes.protocol import BF16, FP32, Array, Port, ports

TOLERANCES = {
    # Rounding alone gives up to 1e-5 in deep networks. Winograd convolutions, which several
    # runtimes choose, give up to 3e-3 in the deepest (MNN on ResNet-50 and VGG-16): these are as
    # their makers want them. Pruned weights that were dropped wrongly give far more than 5e-3.
    FP32: 5e-3,
    # bf16 keeps 8 bits, 4e-3 per product; errors of layers add up to a few times that.
    BF16: 5e-2,
}
"""Largest relative error that counts as right, per precision."""

_SEED = 20260101


@dataclass(frozen=True)
class Sample:
    """Inputs of a model and what it must make of them, by their names in the ONNX file.

    Attributes:
        file: where the inputs are, written by `numpy.savez` in their order.
    """

    inputs: dict[str, Array]
    expected: dict[str, Array]
    file: Path


@dataclass(frozen=True)
class Reference:
    """Two samples of one model.

    Attributes:
        name: what computed `Sample.expected`, with its version.
    """

    name: str
    samples: tuple[Sample, Sample]

    @classmethod
    def of(cls, model: Path, folder: Path) -> Reference:
        """Compute it, with every optimisation off.

        Args:
            model: an ONNX file with static shapes.
            folder: to write the inputs into.

        Raises:
            InputError: the model's shapes are not static, or it cannot be computed.
        """
        try:
            inputs, outputs = ports(model)
            both = make_inputs(inputs)
            name, results = compute(model, both)
        except UnsupportedModelError as e:
            raise InputError(f"{model}: {e}; export it with fixed sizes to compare runtimes") from e
        except Exception as e:  # onnx and the reference have no common base class
            raise InputError(f"{model}: cannot be computed: {type(e).__name__}: {e}") from e
        samples = []
        for label, arrays, values in zip("ab", both, results, strict=True):
            file = folder / f"inputs_{label}.npz"
            np.savez(file, *arrays.values())
            expected = {port.name: y for port, y in zip(outputs, values, strict=True)}
            if reason := complaint(expected, expected):
                raise InputError(f"{model}: cannot be compared on normal inputs: {reason}")
            samples.append(Sample(arrays, expected, file))
        return cls(name, (samples[0], samples[1]))


def make_inputs(inputs: tuple[Port, ...]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Two samples for some inputs: normal for floats; 0 or 1 for integers, which may be indices.

    No integer of the second sample is that of the first.
    """
    rng = np.random.default_rng(_SEED)
    first, second = {}, {}
    for port in inputs:
        dtype = np.dtype(port.dtype)
        if np.issubdtype(dtype, np.floating):
            both = rng.standard_normal((2, *port.shape))
        else:
            bits = rng.integers(0, 2, port.shape)
            both = np.stack([bits, 1 - bits])
        first[port.name], second[port.name] = both.astype(dtype)
    return first, second


def compute(model: Path, samples: tuple[dict[str, Array], ...]) -> tuple[str, list[list[Array]]]:
    """Who computed a model, and its outputs for each sample."""
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"]
        )
        name = f"ONNX Runtime {onnxruntime.__version__}, graph optimisations off"
        return name, [session.run(None, sample) for sample in samples]
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(model))
    name = f"the reference evaluator of onnx {onnx.__version__}"
    return name, [list(evaluator.run(None, sample)) for sample in samples]


def largest_error(outputs: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest difference over the largest magnitude expected, over all outputs.

    Infinite where `complaint` has something to say.
    """
    if complaint(outputs, expected):
        return float("inf")
    return max((_error(outputs[name], y) for name, y in expected.items()), default=0.0)


def complaint(outputs: Mapping[str, Array], expected: Mapping[str, Array]) -> str:
    """What makes outputs wrong before any value is compared; empty if nothing does."""
    for name, right in expected.items():
        if name not in outputs:
            return f"output {name!r} is missing"
        got = outputs[name]
        if got.shape != right.shape:
            return f"output {name!r} has shape {list(got.shape)}, not {list(right.shape)}"
        if got.dtype.kind not in "fiub":
            return f"output {name!r} holds no numbers: {got.dtype}"
        if not np.isfinite(got).all():
            return f"output {name!r} holds values that are not finite"
    return ""


def _error(got: Array, right: Array) -> float:
    if right.size == 0:
        return 0.0
    exact: np.ndarray[Any, np.dtype[np.float64]] = right.astype(np.float64)
    difference = float(np.abs(got.astype(np.float64) - exact).max())
    magnitude = float(np.abs(exact).max())
    return difference / magnitude if magnitude else (0.0 if difference == 0 else float("inf"))
