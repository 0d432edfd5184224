"""What a runtime must offer to be compared: one small class per runtime, one file each.

Adapters are loaded in worker processes, some of which run in environments of their own where
tvm_pivot is not installed. So this folder imports nothing at the top but the standard library,
NumPy and itself; an adapter imports its runtime inside its methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FP32, BF16 = "fp32", "bf16"


@dataclass(frozen=True)
class Environment:
    """Where a runtime's packages are installed.

    Attributes:
        name: of a virtual environment made for it; None means beside tvm_pivot.
        requirements: what pip installs there, with versions.
        modules: what must be importable for the runtime to count as installed.
        torch: install torch first and by itself, so that its CPU build is chosen.
    """

    name: str | None
    requirements: tuple[str, ...]
    modules: tuple[str, ...]
    torch: bool = False


class UnsupportedModelError(Exception):
    """The runtime, or its converter, cannot take this model; the message says why."""


class Runtime(ABC):
    """One runtime in one configuration.

    A runtime converts the ONNX file once (`convert`), in a process that only does that. Then, in a
    process per number of threads: `prepare`, `bind`, `run` many times (the only part that is
    timed), `outputs`, `close`.

    Attributes:
        name: what users write after ``--runtimes``, e.g. ``"mnn-sparse"``.
        title: what tables show, e.g. ``"MNN, sparse"``.
        environment: where it runs.
        converter: where `convert` runs; None means in `environment`.
        precisions: what it can compute in: ``"fp32"``, ``"bf16"``.
        skips_zeros: whether it claims to be faster for zeros, so that each density matters.
        threads: how many threads it was asked to use.
        precision: what it was asked to compute in.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    environment: ClassVar[Environment]
    converter: ClassVar[Environment | None] = None
    precisions: ClassVar[tuple[str, ...]] = (FP32,)
    skips_zeros: ClassVar[bool] = False

    def __init__(self, threads: int = 1, precision: str = FP32) -> None:
        if precision not in self.precisions:
            raise ValueError(f"{self.name} computes in {', '.join(self.precisions)}: {precision}?")
        self.threads = threads
        self.precision = precision

    @property
    @abstractmethod
    def version(self) -> str:
        """The runtime's own version, e.g. ``"1.31.1"``. Called where it is installed."""

    def convert(self, model: Path, folder: Path) -> list[Path]:
        """Write what a user would deploy into `folder`; nothing for runtimes that read ONNX.

        Args:
            model: an ONNX file with static shapes.
            folder: empty, of this runtime and precision alone; `threads` plays no part.

        Returns:
            The files to deploy, in the order `prepare` takes them.

        Raises:
            UnsupportedModelError: the model cannot be converted.
        """
        return [model]

    @abstractmethod
    def prepare(self, files: Sequence[Path]) -> None:
        """Load what `convert` returned, ready to run on `threads` threads in `precision`.

        Raises:
            UnsupportedModelError: the runtime refuses the model.
        """

    @abstractmethod
    def bind(self, inputs: Mapping[str, Array]) -> None:
        """Give the inputs of the runs to come, by their names in the ONNX file. Not timed."""

    @abstractmethod
    def run(self) -> None:
        """Compute the outputs for the bound inputs, all of them, before it returns."""

    @abstractmethod
    def outputs(self) -> dict[str, Array]:
        """What the last `run` computed, by names and in shapes of the ONNX file. Not timed.

        It stays what it is whatever is bound or run later.
        """

    def settings(self) -> dict[str, str]:
        """What the runtime itself says about its threads, precision and options, to be shown."""
        return {}

    def close(self) -> None:  # noqa: B027 (most runtimes need nothing)
        """Free what `prepare` took."""


@dataclass(frozen=True)
class Port:
    """An input or output of an ONNX file."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def ports(model: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs of an ONNX file. Needs the package onnx where it is called.

    Raises:
        UnsupportedModelError: a shape is not static.
    """
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(port(value) for value in graph.input if value.name not in weights)
    return inputs, tuple(map(port, graph.output))


def is_static(value: Any) -> bool:
    """Whether all sizes of an `onnx.ValueInfoProto` are given."""
    tensor = value.type.tensor_type
    dims = tensor.shape.dim
    return tensor.HasField("shape") and all(
        d.HasField("dim_value") and d.dim_value > 0 for d in dims
    )


def port(value: Any) -> Port:
    """An `onnx.ValueInfoProto` as `Port`.

    Raises:
        UnsupportedModelError: its shape is not static.
    """
    import onnx

    if not is_static(value):
        raise UnsupportedModelError(f"{value.name}: the shape is not static")
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return Port(value.name, tuple(d.dim_value for d in tensor.shape.dim), str(dtype))
