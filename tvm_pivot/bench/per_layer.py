"""Where the time of a network goes, step by step, beside what the machine's limits allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from statistics import median

from ..compiler import build
from ..errors import PivotError
from ..report import LayerReport, Report
from ..session import Session
from .results import LayerTime, PerLayer, Roofline
from .roofline import measure_roofline
from .watch import Call, Watch

MEMORY_MANAGEMENT = "memory management"
"""The step that stands for all calls of the virtual machine's own: allocating, reshaping, ..."""

# Less than this share of a run is not worth a line.
_NEGLIGIBLE = 0.005
_WARM_TURNS = 3


def profile(
    model: str | PathLike[str] | tuple[Session, Session],
    threads: int = 1,
    runs: int = 30,
    roofline: Roofline | None = None,
    *,
    name: str | None = None,
) -> PerLayer:
    """Time each step of a network, and the layers of its dense build to compare with.

    Steps are timed inside whole runs, so that each finds the caches as the steps before left
    them; see `watch`. The two builds take turns, and every time is a median over these.

    A step's limit is the larger of its operations over the machine's peak and the time to move
    its bytes once: its inputs and outputs at the bandwidth of the smallest cache that holds
    them; its weights and tables at that of the smallest cache that holds the weights of the whole
    network and the inputs and outputs of its largest step, for they must survive from run to run.
    Level-1 caches are left out, so a small step can be a little faster than its limit.

    Args:
        model: an ONNX file, or the sessions of its sparse and its dense build, which are set to
            `threads`.
        threads: of one run.
        runs: how often each build is timed.
        roofline: of this machine with as many threads; measured if None, which takes seconds.
        name: `PerLayer.model`; default: that of the sparse session, which is the file's stem.

    Returns:
        The steps in the order they run, and the median time of runs that nothing watches. A
        layer's step has the layer's name, any other its function's. `MEMORY_MANAGEMENT` comes
        last, if it takes 0.5 % of a run.

    Raises:
        PivotError: the model cannot be built or run, or takes another path each time; or
            `threads` or `runs` is not possible, or `roofline` is of other threads.
    """
    if runs < 1:
        raise PivotError(f"runs must be at least 1, not {runs}")
    if roofline is not None and roofline.threads != threads:
        raise PivotError(f"the roofline is of {roofline.threads} threads, not {threads}")
    sparse, dense = _sessions(model, threads)
    roofline = roofline or measure_roofline(threads)
    ours, other = Watch(sparse), Watch(dense)
    totals = []
    for _ in range(_WARM_TURNS + runs):
        totals.append(ours.run())
        other.run()
    total_ms = median(totals[-runs:]) * 1e3
    dense_ms = {s.layer.name: s.ms for s in _steps(other, dense.report, runs) if s.layer}
    steps = _steps(ours, sparse.report, runs)
    limits = _Limits(roofline, _working_set(ours.calls))
    layers = [_layer_time(step, dense_ms, limits) for step in steps if not step.call.builtin]
    managing = sum(step.ms for step in steps if step.call.builtin)
    if managing >= _NEGLIGIBLE * total_ms:
        layers.append(_other_time(MEMORY_MANAGEMENT, managing, 0, 0.0))
    return PerLayer(name or sparse.manifest.name, threads, roofline, total_ms, tuple(layers))


def _sessions(
    model: str | PathLike[str] | tuple[Session, Session], threads: int
) -> tuple[Session, Session]:
    if not isinstance(model, tuple):
        path = Path(model)
        return build(path, threads=threads), build(path, sparse=False, threads=threads)
    for session in model:
        session.set_threads(threads)
    return model


@dataclass(frozen=True)
class _Step:
    """A call with its time, and the layer that it computes if it is a layer's kernel."""

    call: Call
    ms: float
    layer: LayerReport | None


def _steps(watch: Watch, report: Report, runs: int) -> list[_Step]:
    """Layers that are alike share a kernel: its calls come in the order of the layers."""
    waiting: dict[str, deque[LayerReport]] = {}
    for layer in report.layers:
        if layer.kernel:
            waiting.setdefault(layer.kernel, deque()).append(layer)
    steps = []
    for call, seconds in zip(watch.calls, watch.seconds(runs), strict=True):
        queue = waiting.get(call.function)
        steps.append(_Step(call, seconds * 1e3, queue.popleft() if queue else None))
    missing = [layer.name for queue in waiting.values() for layer in queue]
    if missing:
        raise PivotError(f"the kernels of these layers never ran: {', '.join(missing)}")
    return steps


def _working_set(calls: Sequence[Call]) -> int:
    """Bytes of all constants, and of the inputs and outputs of the largest step."""
    constants: dict[int, int] = {}
    for call in calls:
        constants.update(call.constants)
    return sum(constants.values()) + max((call.activations for call in calls), default=0)


@dataclass(frozen=True)
class _Limits:
    """The machine's limits for a network with so many bytes of weights and activations."""

    roofline: Roofline
    working_set: int

    def compute_ms(self, flops: int) -> float:
        return flops / self.roofline.gflops * 1e-6

    def memory_ms(self, call: Call) -> float:
        moved = call.activations / self._gbs(call.activations)
        return (moved + call.weights / self._gbs(self.working_set)) * 1e-6

    def _gbs(self, size: int) -> float:
        """The bandwidth of the smallest cache that holds `size` bytes."""
        if size <= self.roofline.l2_bytes:
            return self.roofline.l2_gbs
        return self.roofline.l3_gbs if size <= self.roofline.l3_bytes else self.roofline.memory_gbs


def _layer_time(step: _Step, dense_ms: Mapping[str, float], limits: _Limits) -> LayerTime:
    layer, call = step.layer, step.call
    memory = limits.memory_ms(call)
    size = call.weights + call.activations
    if layer is None:
        return _other_time(call.function, step.ms, size, memory)
    compute = limits.compute_ms(layer.flops_kept)
    dense = dense_ms.get(layer.name)
    return LayerTime(
        name=layer.name,
        kind=layer.op,
        pattern=layer.pattern,
        density=layer.density,
        mode=layer.mode,
        ms=step.ms,
        dense_ms=dense,
        flops=layer.flops_kept,
        bytes=size,
        limit_ms=max(compute, memory),
        bound="compute" if compute >= memory else "memory",
        fraction_of_linear=dense / step.ms * layer.density if dense and step.ms else None,
    )


def _other_time(name: str, ms: float, size: int, limit_ms: float) -> LayerTime:
    return LayerTime(
        name=name,
        kind="other",
        pattern="",
        density=1.0,
        mode="",
        ms=ms,
        dense_ms=None,
        flops=0,
        bytes=size,
        limit_ms=limit_ms,
        bound="memory",
        fraction_of_linear=None,
    )
