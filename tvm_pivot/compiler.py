"""`build` and `inspect`: the whole way from a model to a session, in the order it is walked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.backend.cpu_generic import pipeline as cpu_pipeline
from tvm.relax.backend.cuda import pipeline as cuda_pipeline

from . import cuda_compiler
from .errors import CompileError, PivotError
from .importer import import_model
from .manifest import Manifest
from .memory import Bytes, Memory, pack
from .relay_passes import PHASES, PIVOT_SECONDS, Compilation
from .relay_passes.bind_memory import bind_memory, trust_bound
from .relay_passes.cuda_layers import use_cuda_graphs
from .relay_passes.graph import MAIN
from .report import Report
from .session import Session
from .targets import PivotTarget, resolve
from .threads import check_count
from .tuning.selection import select

Shapes = Mapping[str, int | Sequence[int]]
Progress = Callable[[str], None]


def build(
    model: Any,
    target: str | PivotTarget = "x86",
    *,
    example_inputs: Sequence[Any] | None = None,
    params: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    sparse: bool = True,
    pivot_seconds: float = PIVOT_SECONDS,
    log: str | PathLike[str] | None = None,
    tuned: bool = True,
    threads: int | None = None,
    precision: str = "float32",
    debug_dir: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Session:
    """Compile a pruned network.

    Args:
        model: a path to an ONNX file, an `onnx.ModelProto`, a `torch.nn.Module` (with
            `example_inputs`), a `torch.export.ExportedProgram`, or a Relax `IRModule`.
        target: ``"x86"`` for this host, ``"cuda"`` for GPUs from sm_80 on, a preset's name, or a
            `PivotTarget`. No GPU is needed to compile for one, but NVIDIA's nvcc is.
        example_inputs: inputs to trace a torch module with.
        params: arrays for parameters of a Relax module, by name.
        shapes: sizes of symbolic dimensions by name, or whole input shapes by input name.
        sparse: False compiles the same network with no zero skipped, to compare with.
        pivot_seconds: for a general search for orders of rows that gather the non-zeros into
            blocks, in all layers together. Planted structure is always found.
        log: a tuning log (see `tune`), used besides the logs that come with the package.
        tuned: False leaves all tuning records alone: every kernel is made by the target's rule.
        threads: threads of one run, and the cores that kernels are made for: more, that
            `Session.set_threads` asks for, change little. Default: as many as
            `Session.set_threads` says, and kernels for all cores of the target.
        precision: ``"float32"``; on CUDA targets also ``"float16"`` and, from sm_80 on,
            ``"bfloat16"`` and ``"tf32"``: float32 whose leading 11 bits tensor cores multiply.
            Sums are float32 there. On ARM cores with arithmetic for it also ``"float16"``, with
            short sums in float16. Inputs and outputs keep their dtype.
        debug_dir: write the module after each phase there, as ``NN_phase.py``.
        progress: called with the name of each phase as it begins.

    Raises:
        UnsupportedTargetError: the target is unknown or has no schedules yet, does not have the
            precision, or needs a compiler that is not there.
        ModelImportError: the model could not be read.
        CompileError: the model was read but could not be compiled.
        TuningError: the tuning log cannot be read.
        PivotError: there are not so many threads.
    """
    began = time.perf_counter()
    described = resolve(target).require_schedules().with_precision(precision)
    if described.family == "cuda":
        cuda_compiler.prepare()
    described = _for_threads(described, threads)
    tell = progress or _silent
    tell("import")
    imported = import_model(model, example_inputs=example_inputs, params=params, shapes=shapes)
    records = select(log, described) if tuned else None
    state = Compilation(imported.mod, described, sparse, pivot_seconds, tuned=records)
    done = _run_phases(state, imported.source, debug_dir, tell, PHASES)
    tell("compile")
    executable, memory, weights = _compile(done, imported.source)
    report = replace(_report(done, described), compile_seconds=time.perf_counter() - began)
    name = Path(imported.source).stem if imported.source.endswith(".onnx") else imported.source
    ports = imported.inputs, imported.outputs
    manifest = Manifest.create(name, described, *ports, report, memory)
    return Session(executable, manifest, weights=weights, threads=threads)


def inspect(
    model: Any,
    target: str | PivotTarget = "x86",
    *,
    example_inputs: Sequence[Any] | None = None,
    params: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    pivot_seconds: float = PIVOT_SECONDS,
    log: str | PathLike[str] | None = None,
    tuned: bool = True,
    threads: int | None = None,
    precision: str = "float32",
) -> Report:
    """What `build` would do to each layer of a model, without compiling it.

    Args and errors: see `build`. The target needs no schedules yet for this.
    """
    described = _for_threads(resolve(target).with_precision(precision), threads)
    imported = import_model(model, example_inputs=example_inputs, params=params, shapes=shapes)
    analysis = [phase for phase in PHASES if phase.analysis]
    records = select(log, described) if tuned else None
    state = Compilation(imported.mod, described, pivot_seconds=pivot_seconds, tuned=records)
    return _report(_run_phases(state, imported.source, None, _silent, analysis), described)


def _for_threads(target: PivotTarget, threads: int | None) -> PivotTarget:
    """The target, of as many cores as a CPU's network shall have threads."""
    if threads is None or target.family == "cuda":
        return target
    return replace(target, cores=check_count(threads))


def _silent(_: str) -> None:
    return None


def _run_phases(
    state: Compilation,
    source: str,
    debug_dir: str | PathLike[str] | None,
    tell: Progress,
    phases: Sequence[Any],
) -> Compilation:
    _dump(state.mod, debug_dir, 0, "import")
    for number, phase in enumerate(phases, start=1):
        tell(phase.name)
        try:
            state = phase.run(state)
        except PivotError:
            raise
        except Exception as error:
            raise CompileError(
                f"{source}: phase {phase.name!r} failed: {_first_line(error)}; "
                f"debug_dir= shows the module before it"
            ) from error
        _dump(state.mod, debug_dir, number, phase.name)
    return state


def _dump(mod: IRModule, folder: str | PathLike[str] | None, number: int, name: str) -> None:
    if folder is None:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = mod.script(show_meta=False)
    (path / f"{number:02d}_{name}.py").write_text(text, encoding="utf-8")


def _compile(
    state: Compilation, source: str
) -> tuple[relax.VMExecutable, Memory | None, Bytes | None]:
    """The network, what its function `bind` takes, and its weights."""
    machine = state.target.to_tvm()
    # Not TVM's default pipeline: it would legalise and fuse again what is scheduled already.
    pipeline = cuda_pipeline if state.target.family == "cuda" else cpu_pipeline
    steps = pipeline.dataflow_lower_passes(machine) + pipeline.finalize_passes(machine)
    taken: list[tuple[Memory, Bytes]] = []
    if state.target.family != "cuda":  # what a GPU's graphs record stays as TVM makes it
        steps = _with_binding(steps, len(state.mod[MAIN].params), taken)
    graphs = {"relax.backend.use_cuda_graph": use_cuda_graphs(state.planned, state.target)}
    sequence = tvm.transform.Sequential(steps)
    try:
        with machine, tvm.transform.PassContext(config=graphs):
            executable = relax.build(state.mod, machine, relax_pipeline=sequence)
    except Exception as error:
        raise CompileError(f"{source}: TVM could not compile it: {_first_line(error)}") from error
    return executable, *(taken[0] if taken else (None, None))


def _with_binding(
    steps: Sequence[Any], inputs: int, taken: list[tuple[Memory, Bytes]]
) -> list[Any]:
    """TVM's passes with `bind_memory` among them, which adds what the network needs to `taken`."""

    def bind(mod: IRModule, _: Any) -> IRModule:
        bound = bind_memory(mod)
        if bound is None:
            return mod
        mod, weights, buffers = bound
        specs, data = pack(weights)
        taken.append((Memory(specs, tuple(buffers)), data))
        return mod

    def trust(mod: IRModule, _: Any) -> IRModule:
        return trust_bound(mod, inputs) if taken else mod

    made = {
        "KillAfterLastUse": tvm.transform.module_pass(bind, opt_level=0, name="BindMemory"),
        "VMShapeLower": tvm.transform.module_pass(trust, opt_level=0, name="TrustBound"),
    }
    found = [one for step in steps for one in (step, made.pop(step.info.name, None)) if one]
    assert not made, "TVM's passes are others"
    return found


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1] if text else ''}"


def _report(state: Compilation, target: PivotTarget) -> Report:
    return Report(
        tuple(state.reports),
        target.name,
        (*state.notes, *(() if state.tuned is None else state.tuned.notes)),
        model_moves=state.model_moves,
        compiled_moves=state.compiled_moves,
    )
