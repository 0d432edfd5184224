"""Build one Relax expression with our schedules and compare it with torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, tirx
from tvm.relax.backend.cpu_generic import pipeline as cpu

from tvm_pivot.relay_passes.schedule_functions import schedule_functions
from tvm_pivot.schedules import Rule
from tvm_pivot.targets import PRESETS, PivotTarget, detect_host

HOST = replace(detect_host(), cores=1)
# Threads even for small work: a narrower machine with many cores.
THREADED = replace(PRESETS["x86-avx2"], cores=8)

Shape = tuple[Any, ...]


def module(expression: Callable[..., Any], *shapes: Shape) -> tvm.IRModule:
    """A module whose `main` computes `expression`, legalised and fused.

    A shape may begin with a dtype, as in ("int64", 3, 4); float32 otherwise.
    """
    builder = relax.BlockBuilder()
    inputs = []
    for number, shape in enumerate(shapes):
        dtype, extents = split_dtype(shape)
        inputs.append(relax.Var(f"x{number}", relax.TensorType(extents, dtype)))
    with builder.function("main", inputs):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(expression(*inputs)))
        builder.emit_func_output(result)
    return _fused(builder.get())


def split_dtype(shape: Shape) -> tuple[str, tuple[int, ...]]:
    return (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("float32", shape)


def _fused(mod: tvm.IRModule) -> tvm.IRModule:
    with HOST.to_tvm():
        for step in (relax.backend.DispatchSortScan(), relax.get_pipeline("zero")):
            mod = step(mod)
    return mod


def functions(mod: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    """The TIR functions of a module by name."""
    items = mod.functions_items()
    return {name.name_hint: func for name, func in items if isinstance(func, tirx.PrimFunc)}


def rules(mod: tvm.IRModule) -> list[str]:
    """The rules that scheduled the functions of a module, sorted."""
    return sorted(str(func.attrs["pivot.schedule"]) for func in functions(mod).values())


def run(mod: tvm.IRModule, target: PivotTarget, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compile a scheduled module as it is and run it."""
    described = target.to_tvm()
    passes = [*cpu.dataflow_lower_passes(described), *cpu.finalize_passes(described)]

    @tvm.transform.module_pass(opt_level=0)
    def lower(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        with described:
            return tvm.ir.transform.Sequential(passes)(mod)

    machine = relax.VirtualMachine(relax.build(mod, described, relax_pipeline=lower), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(array) for array in arrays])
    return [result.numpy()] if hasattr(result, "numpy") else [part.numpy() for part in result]


def compare(
    expression: Callable[..., Any],
    reference: Callable[..., Any],
    *shapes: Shape,
    target: PivotTarget = HOST,
    tolerance: float = 1e-5,
    scale: float = 1.0,
    using: Sequence[Rule] | None = None,
) -> tvm.IRModule:
    """Assert that the scheduled expression agrees with torch in float64; returns the module.

    Integers are drawn from 0..6, floats from a normal distribution times `scale`.
    `using` replaces the target's rules.
    """
    rng = np.random.default_rng(0)
    arrays = []
    for shape in shapes:
        dtype, extents = split_dtype(shape)
        whole = dtype.startswith("int")
        drawn = rng.integers(0, 7, extents) if whole else rng.standard_normal(extents) * scale
        arrays.append(np.asarray(drawn).astype(dtype))
    scheduled = schedule_functions(module(expression, *shapes), target, using)
    got = run(scheduled, target, arrays)
    exact = [torch.from_numpy(a.astype("float64") if a.dtype == "float32" else a) for a in arrays]
    expected = reference(*exact)
    parts = expected if isinstance(expected, (list, tuple)) else [expected]
    for ours, theirs in zip(got, parts, strict=True):
        wanted = theirs.numpy()
        assert ours.shape == wanted.shape
        bound = tolerance * max(1.0, float(np.abs(wanted).max(initial=0)))
        np.testing.assert_allclose(ours.astype("float64"), wanted, rtol=0, atol=bound)
    return scheduled
