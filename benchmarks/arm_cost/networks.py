"""The cost of whole networks: ours and that of other runtimes, on the same files."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm_pivot
from benchmarks import zoo
from tvm_pivot.bench.models import ModelInput
from tvm_pivot.bench.reference import TOLERANCES, Reference, largest_error
from tvm_pivot.bench.runtimes.protocol import FP32
from tvm_pivot.report import Report

from . import compiled, rivals
from .cores import ArmCostError, Core
from .cost import Cost
from .results import OURS, NetworkCost, Step
from .rivals import Executed

_NEGLIGIBLE = 0.005
_LIBRARY = "lib.so"  # in an exported directory
# What TVM calls the functions that it makes of one.
_PREFIX, _SUFFIX = "__tvm_ffi_", "_compute_"


def model_of(network: str, variant: str) -> ModelInput:
    """A network of the standing set as a file.

    Raises:
        ArmCostError: there is no such network.
    """
    try:
        path = Path(zoo.load(network, variant))
    except (KeyError, ValueError) as e:
        raise ArmCostError(f"no network {network} {variant}: {e}") from e
    return ModelInput(f"{network}-{variant}", network, variant, path)


def measure(
    models: Sequence[ModelInput],
    runtimes: Sequence[str],
    cores: Sequence[Core],
    done: Callable[[NetworkCost], None],
    *,
    known: Sequence[NetworkCost] = (),
    caches: bool = False,
) -> None:
    """Measure models on runtimes and cores.

    Args:
        models: what runs.
        runtimes: `OURS` and names of `guest_python.RUNTIMES`.
        cores: what it runs on.
        done: called with each cost as it is known.
        known: costs of other runtimes in here are not measured again.
        caches: count misses too.

    Raises:
        ArmCostError: a runtime fails, or computes something else than ONNX Runtime on this machine.
    """
    there = {(entry.key, entry.sha256) for entry in known if entry.runtime != OURS}
    for model in models:
        with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
            reference = Reference.of(model.path, Path(scratch))
            for core in cores:
                for runtime in runtimes:
                    key = (model.network, model.variant, runtime, core.name)
                    if (key, model.sha256) not in there:
                        done(_measure(model, runtime, reference, core, caches))


def _measure(
    model: ModelInput, runtime: str, reference: Reference, core: Core, caches: bool
) -> NetworkCost:
    if runtime == OURS:
        ran, _ = execute_ours(model, reference, core, caches=caches)
    else:
        ran = rivals.execute(model, runtime, reference, core, caches=caches)
    if not ran.error <= TOLERANCES[FP32]:
        raise ArmCostError(f"{model.name}: {runtime} is wrong on {core.name}: {ran.error:.1e}")
    cost = sum(ran.functions.values(), Cost())
    steps = tuple(
        Step(name, of.instructions, of.cycles)
        for name, of in ran.functions.items()
        if of.cycles >= _NEGLIGIBLE * cost.cycles
    )
    return NetworkCost(
        network=model.network,
        variant=model.variant,
        sha256=model.sha256,
        runtime=runtime,
        version=ran.version,
        core=core.name,
        cost=cost,
        error=ran.error,
        steps=steps,
    )


def run_ours(model: ModelInput, core: Core, **how: Any) -> tuple[Executed, Report]:
    """As `execute_ours`, on inputs and outputs computed now."""
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        return execute_ours(model, Reference.of(model.path, Path(scratch)), core, **how)


def execute_ours(
    model: ModelInput,
    reference: Reference,
    core: Core,
    *,
    caches: bool = False,
    tuned: bool = True,
    log: Path | None = None,
) -> tuple[Executed, Report]:
    """Build a model for a core and run it under emulation.

    Args:
        model: what runs.
        reference: its inputs and outputs.
        core: what it runs on.
        caches: count misses too.
        tuned, log: as for `tvm_pivot.build`.

    Returns:
        What one inference executes, and the report of the build.

    Raises:
        PivotError: it cannot be built.
        ArmCostError: it fails.
    """
    session = tvm_pivot.build(model.path, target=core.name, tuned=tuned, log=log)
    sample = reference.samples[0]
    with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
        library = session.export(Path(scratch, "network")) / _LIBRARY
        inputs = [sample.inputs[spec.name] for spec in session.inputs]
        functions, outputs = compiled.execute_network(library, inputs, core, caches=caches)
    named = {spec.name: y for spec, y in zip(session.outputs, outputs, strict=True)}
    error = largest_error(named, sample.expected)
    return Executed(tvm_pivot.__version__, functions, error), session.report


def layer_costs(functions: Mapping[str, Cost], report: Report) -> dict[str, Cost]:
    """The cost of each layer's kernel, with the names of all layers that run it, and of the rest.

    Layers of the same shape and number of blocks share a kernel; its cost is that of all of them.
    """
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for layer in report.layers:
        if layer.kernel:
            layers[layer.kernel].append(layer.name)
    found: defaultdict[str, Cost] = defaultdict(Cost)
    for name, cost in functions.items():
        kernel = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        found[", ".join(layers.get(kernel, [kernel]))] += cost
    return dict(sorted(found.items(), key=lambda item: -item[1].cycles))
