"""What a comparison gives: plain records, written as JSON and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .. import schema

Status = Literal["ok", "wrong", "failed", "unsupported", "missing"]


@dataclass(frozen=True)
class Setting:
    """One thing a runtime says about itself: its threads, its precision, an option."""

    name: str
    value: str


@dataclass(frozen=True)
class Result:
    """One runtime on one model with one number of threads in one precision.

    Times are of one inference, inputs bound before, in milliseconds. They are None unless
    `status` is ``"ok"``: a time of a wrong answer does not count.

    Attributes:
        model: name of the `ModelFacts` it ran.
        runtime: e.g. ``"mnn-sparse"``.
        title: e.g. ``"MNN, sparse"``.
        status: ``"ok"``; ``"wrong"``: its outputs differ from the reference, or it used more
            cores than allowed; ``"failed"``: it crashed; ``"unsupported"``: it, or its converter,
            cannot take the model; ``"missing"``: it is not installed.
        detail: why the status is not ok; for missing ones, the command that installs it.
        version: the runtime's own; empty where it is missing.
        threads: asked for.
        precision: ``"fp32"`` or ``"bf16"``.
        median_ms: of all timed calls.
        min_ms: of all timed calls.
        spread: distance between the quartiles of the turns' medians, over `median_ms`.
        calls: how many calls were timed.
        max_error: largest difference from the reference over the reference's largest magnitude;
            over all outputs, before and after timing.
        cores_used: CPU time over wall time of the timed calls.
        convert_s: converting and compiling the ONNX file, once, in seconds.
        load_s: loading what was deployed, in seconds.
        first_run_ms: the first inference after loading.
        peak_memory_mb: largest resident size of the process, in 10^6 bytes.
        model_memory_mb: the same less the resident size before the model was loaded.
        file_mb: size of the deployed files, in 10^6 bytes.
        settings: what the runtime says about itself.
    """

    model: str
    runtime: str
    title: str
    status: Status
    version: str
    threads: int
    precision: str
    detail: str = ""
    median_ms: float | None = None
    min_ms: float | None = None
    spread: float | None = None
    calls: int = 0
    max_error: float | None = None
    cores_used: float | None = None
    convert_s: float | None = None
    load_s: float | None = None
    first_run_ms: float | None = None
    peak_memory_mb: float | None = None
    model_memory_mb: float | None = None
    file_mb: float | None = None
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True)
class Noise:
    """The same runtime measured twice in the same run: how far ratios can be trusted.

    Attributes:
        ratio: median of the second over median of the first; 1.0 on a quiet machine.
    """

    model: str
    runtime: str
    threads: int
    precision: str
    ratio: float


@dataclass(frozen=True)
class ModelFacts:
    """A model that was measured.

    Attributes:
        name: unique in the comparison; the file's stem unless told otherwise.
        network: what variants of one network share, e.g. ``"resnet50"``; `name` if unknown.
        variant: e.g. ``"8x1@0.1"``; empty if unknown.
        sha256: of the ONNX file.
        pattern: the most frequent pattern of its layers, by weights, e.g. ``"8x1 blocks"``.
        density: kept weights / all weights of its dense and convolution layers.
        flops_dense: operations of these layers with no zero skipped.
        flops_kept: operations that non-zero weights ask for.
    """

    name: str
    network: str
    variant: str
    sha256: str
    pattern: str
    density: float
    flops_dense: int
    flops_kept: int


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    cpu: str
    cores: int
    features: tuple[str, ...]
    memory_gb: float
    system: str
    python: str


@dataclass(frozen=True)
class LayerTime:
    """One step of a network in our build, beside the limit of the machine. See `per_layer`.

    Attributes:
        name: the layer's name, or the function's for a step that is no dense or conv layer.
        kind: ``"conv2d"``, ``"dense"``, or ``"other"``.
        pattern: as in `LayerReport`; empty for ``"other"``.
        density: kept weights / all weights; 1 for ``"other"``.
        mode: ``"sparse"`` or ``"dense"``; empty for ``"other"``.
        ms: median time inside whole runs of the network.
        dense_ms: the same layer's in our dense build of the same file; None where none matches.
        flops: operations of the non-zero weights; 0 for ``"other"``.
        bytes: that must be moved at least: kept weights, inputs and outputs once each.
        limit_ms: the larger of flops over peak and bytes over bandwidth.
        bound: what sets the limit: ``"compute"`` or ``"memory"``.
        fraction_of_linear: dense_ms / ms * density; None where there is no dense_ms.
    """

    name: str
    kind: str
    pattern: str
    density: float
    mode: str
    ms: float
    dense_ms: float | None
    flops: int
    bytes: int
    limit_ms: float
    bound: str
    fraction_of_linear: float | None


@dataclass(frozen=True)
class Roofline:
    """What this machine can do, measured.

    Attributes:
        threads: used for it.
        gflops: fp32 multiply-adds on registers, in 10^9 operations per second.
        l2_gbs, l3_gbs, memory_gbs: reading arrays that fit in there, in 10^9 bytes per second.
        l2_bytes, l3_bytes: sizes up to which the bandwidths are used.
    """

    threads: int
    gflops: float
    l2_gbs: float
    l3_gbs: float
    memory_gbs: float
    l2_bytes: int
    l3_bytes: int


@dataclass(frozen=True)
class PerLayer:
    """Time of each step of one model in our build."""

    model: str
    threads: int
    roofline: Roofline
    total_ms: float
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything one run of the benchmark measured.

    Attributes:
        date: when it began, ISO 8601, UTC.
        command: what repeats it.
        reference: what the outputs were checked against, e.g. ``"ONNX Runtime 1.31.1, ..."``.
        tolerances: largest `Result.max_error` that counts as right, per precision, as settings.
    """

    date: str
    command: str
    machine: Machine
    reference: str
    tolerances: tuple[Setting, ...]
    models: tuple[ModelFacts, ...]
    results: tuple[Result, ...]
    noise: tuple[Noise, ...] = ()
    per_layer: tuple[PerLayer, ...] = field(default=())

    def to_json(self, *, indent: int | None = 1) -> str:
        """The comparison as JSON text; `from_json` reads it back to an equal one."""
        return schema.dumps(self, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """The comparison `to_json` wrote.

        Raises:
            ArtifactError: the text is not such JSON; the message names the place.
        """
        return schema.loads(cls, text)

    def save(self, path: Path) -> None:
        """Write the JSON to `path`."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")
