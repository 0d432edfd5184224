"""The models of a comparison: which they are, and where their zeros are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from ..errors import InputError, ModelImportError
from ..report import Report
from .results import ModelFacts


@dataclass(frozen=True)
class ModelInput:
    """An ONNX file to compare runtimes on. The names are those of `ModelFacts`."""

    name: str
    network: str
    variant: str
    path: Path

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file when it was first asked for, in hexadecimal."""
        with self.path.open("rb") as file:
            found = hashlib.sha256()
            while chunk := file.read(1 << 20):
                found.update(chunk)
        return found.hexdigest()


def name_models(models: Iterable[Path | ModelInput]) -> tuple[ModelInput, ...]:
    """All as `ModelInput`, with absolute paths; plain paths are named by their stems.

    Raises:
        InputError: a file is not there, or two models were given one name.
    """
    found: dict[str, ModelInput] = {}
    for given in models:
        model = given
        if not isinstance(model, ModelInput):
            name = _unused(model.stem, found)
            model = ModelInput(name, name, "", model)
        if not model.path.is_file():
            raise InputError(f"there is no file {model.path}")
        if model.name in found:
            raise InputError(f"two models are called {model.name!r}")
        found[model.name] = replace(model, path=model.path.resolve())
    return tuple(found.values())


def _unused(stem: str, taken: dict[str, ModelInput]) -> str:
    """`stem`, or ``stem-2``, ... where that is taken."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def describe_model(model: ModelInput, report: Report | None = None) -> ModelFacts:
    """What is to know about a model before it runs.

    A model that tvm_pivot cannot import can still be compared on other runtimes: then `pattern`
    is ``"unknown"``, there are no operations, and `density` is that of all its larger weights.

    Args:
        report: what tvm_pivot found when it built the model; None means it has to look.
    """
    report = report or _inspect(model.path)
    if report is None:
        facts = ("unknown", _density(model.path), 0, 0)
    else:
        pattern = _most_weights([(layer.pattern, prod(layer.shape)) for layer in report.layers])
        # Not `Report.flops_kept`, which counts zeros too in layers that we run dense.
        kept = round(sum(layer.flops_dense * layer.density for layer in report.layers))
        facts = (pattern, report.density, report.flops_dense, kept)
    return ModelFacts(model.name, model.network, model.variant, model.sha256, *facts)


def _inspect(path: Path) -> Report | None:
    """What tvm_pivot finds in a model; None if it cannot import it."""
    import tvm_pivot

    try:
        return tvm_pivot.inspect(str(path))
    except ModelImportError:
        return None


def _most_weights(patterns: Sequence[tuple[str, int]]) -> str:
    """The pattern with the most weights; ``"dense"`` for a model without layers."""
    totals: Counter[str] = Counter()
    for pattern, weights in patterns:
        totals[pattern] += weights
    return totals.most_common(1)[0][0] if totals else "dense"


def _density(path: Path) -> float:
    """Non-zero weights over all weights of the tensors with two dimensions or more."""
    import onnx

    kept = total = 0
    for tensor in onnx.load(str(path)).graph.initializer:
        if len(tensor.dims) >= 2:
            weights = onnx.numpy_helper.to_array(tensor)
            kept += int(np.count_nonzero(weights))
            total += weights.size
    return kept / total if total else 1.0
