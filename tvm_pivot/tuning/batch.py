"""Tuning without a GPU at hand: a batch of candidates is built here, and measured elsewhere.

`write_batch` makes a folder to copy to the machine with the GPU; `read_batch` (see
`batch_results`) turns the results that come back into records, which the next batch learns from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.builder import BuilderInput, BuilderResult, PyBuilder
from tvm.support.popen_pool import PopenPoolExecutor

from .. import cuda_compiler
from ..errors import TuningError
from ..relay_passes import PIVOT_SECONDS
from ..runtime import tvm_version
from ..schedules.choices import Choice
from ..schedules.cuda_code import BYTES
from ..targets import PivotTarget, resolve
from . import on_gpu
from .batch_results import FORMAT
from .explore import explore, known_times
from .log_files import read
from .machine import workers
from .on_gpu.device import CUDA_LIBRARY, LIBRARIES
from .on_gpu.measure import FINALISTS
from .records import TuningRecord, canonical
from .search import Job, Search
from .selection import shipped_records
from .space import choice_of
from .tasks import LayerTask
from .trials import ignore_interrupts
from .tuner import model_tasks
from .wanted import wanted_outputs

TRIALS_PER_TASK = 16
# Whatever a task's share of the time is, so many of its candidates are in a batch.
_LEAST = 4
# Candidates of one library: nvcc reads its headers once for all of them.
_PER_LIBRARY = 4
_BUILD_S = 600.0
# Of the norm of what a kernel should compute.
_TOLERANCE, _TOLERANCE_OF_HALVES = 1e-4, 2e-2
START = """import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from on_gpu.measure import main

main(FOLDER)
"""


@dataclass(frozen=True)
class BatchReport:
    """What is in a batch.

    Attributes:
        folder: where it is.
        layers: the layers of each task.
        candidates: how many there are of each task; the first of them is the rule's.
        failed: how many of all could not be built.
        megabytes: the folder's size.
    """

    folder: Path
    layers: tuple[tuple[str, ...], ...]
    candidates: tuple[int, ...]
    failed: int
    megabytes: float

    def __str__(self) -> str:
        failed = f", {self.failed} of which nvcc refused" if self.failed else ""
        return (
            f"{sum(self.candidates)} candidates of {len(self.layers)} kinds of layers{failed}, "
            f"{self.megabytes:.1f} MB in {self.folder}"
        )


def write_batch(
    model: Any,
    target: str | PivotTarget,
    folder: str | PathLike[str],
    *,
    log: str | PathLike[str],
    trials: int | None = None,
    precision: str = "float32",
    example_inputs: Sequence[Any] | None = None,
    params: Mapping[str, Any] | None = None,
    shapes: Mapping[str, int | Sequence[int]] | None = None,
    pivot_seconds: float = PIVOT_SECONDS,
    seed: int = 0,
) -> BatchReport:
    """Build candidates for a network's layers, to be measured on a machine with a GPU.

    The folder holds all that is needed there but Python 3.9 with NumPy and the NVIDIA driver:
    ``python FOLDER/measure.py`` writes results.json.

    Args:
        model: as for `build`.
        target: a GPU.
        folder: where to; made if it is not there, and must be empty.
        log: what is known from earlier batches; need not exist yet.
        trials: candidates of all layers together; default: 16 per kind of layer.
        precision: as for `build`.
        example_inputs, params, shapes, pivot_seconds: as for `build`.
        seed: of the search.

    Raises:
        TuningError: the log or the folder cannot be used, the target is no GPU, or nothing of the
            network can be tuned.
        UnsupportedTargetError, ModelImportError, CompileError: as for `build`.
    """
    described = resolve(target).require_schedules().with_precision(precision)
    if described.gpu is None:
        raise TuningError(f"batches are for GPUs; target {described.name!r} is measured directly")
    path, out = Path(log), Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TuningError(f"{out} is not an empty folder")
    known = [*(read(path).fresh if path.exists() else ()), *shipped_records(described)]
    more = {"example_inputs": example_inputs, "params": params, "shapes": shapes}
    tasks = model_tasks(model, described, pivot_seconds=pivot_seconds, **more)
    if not tasks:
        raise TuningError("the network has no layer with a kernel that can be tuned")
    jobs = sorted(map(Job, tasks), key=_share, reverse=True)
    total = TRIALS_PER_TASK * len(jobs) if trials is None else trials
    counts = zip(jobs, _counts(jobs, total), strict=True)
    chosen = [(job.task, propose(job, known, count, seed)) for job, count in counts]
    cuda_compiler.prepare()
    for name in ("lib", "tables", "site"):
        (out / name).mkdir(parents=True)
    _add_runtime(out)
    stated = _built(chosen, out)
    _write(out, described, jobs, stated)
    failed = sum(bool(one["failed"]) for some in stated for one in some)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    layers = tuple(job.task.names for job in jobs)
    return BatchReport(out, layers, tuple(map(len, stated)), failed, size / 1e6)


def _share(job: Job) -> float:
    """About how much of the network's time a task takes."""
    return job.weight * job.task.choices[job.task.rule]


def _counts(jobs: Sequence[Job], total: int) -> list[int]:
    """Candidates of each task: more where more of the time is."""
    shares, left = [_share(job) for job in jobs], max(0, total - _LEAST * len(jobs))
    return [_LEAST + round(left * share / sum(shares)) for share in shares]


def propose(job: Job, records: Sequence[TuningRecord], count: int, seed: int) -> list[Choice]:
    """What to measure next of a task, `count` choices or all that are left.

    The rule's comes first, then the best that are known, to be compared once more, then new ones:
    at first those of similar tasks and the best predicted of each sort, and then what the cost
    model, taught by all records, expects to be fast.
    """
    times = known_times(job, records)
    best = sorted(times, key=times.__getitem__)[:FINALISTS]
    chosen = list(dict.fromkeys([job.task.rule, *best]))
    new = [choice for choice in job.seeds(records) if choice not in times]
    chosen = list(dict.fromkeys([*chosen, *new]))[:count]
    predicted = job.task.choices
    left = [c for c in predicted if c not in times and c not in chosen]
    left.sort(key=predicted.__getitem__)
    wanted = min(count - len(chosen), len(left))
    if wanted == len(left):
        return chosen + left
    if wanted > 0:
        collector = _Collector()
        search = Search([job], collector, None, lambda *_: None, later=True)
        with _repeatable(seed):
            explore(search, records, 2 * wanted, seed)
        found = [choice for choice in collector.choices if choice in set(left)]
        chosen += list(dict.fromkeys([*found, *left]))[:wanted]
    return chosen


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Until it has learned something, MetaSchedule's model uses NumPy's global generator."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


@derived_object
class _Collector(PyBuilder):  # type: ignore[misc]
    """Builds nothing, and notes what a search would have measured."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Choice] = []

    def build(self, build_inputs: Sequence[BuilderInput]) -> list[BuilderResult]:
        """Note candidates."""
        self.choices += [choice_of(item.mod) for item in build_inputs]
        return [BuilderResult(None, "to be measured later") for _ in build_inputs]


def _built(
    chosen: Sequence[tuple[LayerTask, Sequence[Choice]]], folder: Path
) -> list[list[dict[str, Any]]]:
    """Each task's candidates as the batch states them."""
    calls = [
        (number, task, choices[i : i + _PER_LIBRARY], str(folder), f"{number}_{i}")
        for number, (task, choices) in enumerate(chosen)
        for i in range(0, len(choices), _PER_LIBRARY)
    ]
    found: list[list[dict[str, Any]]] = [[] for _ in chosen]
    for (number, *_), some in zip(calls, _results([call[1:] for call in calls]), strict=True):
        found[number] += some
    return found


def _results(calls: Sequence[tuple[Any, ...]]) -> Iterator[list[dict[str, Any]]]:
    count = workers()
    if count == 1:
        yield from (build_library(*call) for call in calls)
        return
    pool = PopenPoolExecutor(max_workers=count, timeout=_BUILD_S, initializer=ignore_interrupts)
    try:
        waiting = [pool.submit(build_library, *call) for call in calls]
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(wait=False)


def build_library(
    task: LayerTask, choices: Sequence[Choice], folder: str, name: str
) -> list[dict[str, Any]]:
    """Compile candidates of one task into one library; what the batch states of each.

    Where the library cannot be compiled, its candidates are compiled one by one.
    """
    cuda_compiler.prepare()
    out, path = Path(folder), f"lib/{name}.so"
    try:
        functions, stated = {}, []
        for i, choice in enumerate(choices):
            kernel = task.kernel(choice)
            symbol = f"candidate_{i}"
            function = kernel.make().with_attr("global_symbol", symbol)
            functions[symbol] = function
            stated.append(
                {
                    "decisions": choice.decisions(),
                    "library": path,
                    "function": symbol,
                    "arguments": _arguments(task, function, kernel.tables(_bias(task)), out),
                    "turned": choice.form == "cuda_rows" and task.op == "dense",
                    "failed": "",
                }
            )
        library = tvm.compile(tvm.IRModule(functions), target=task.target.to_tvm())
        library.export_library(str(out / path))
    except Exception as e:
        if len(choices) == 1:
            why = f"{type(e).__name__}: {str(e).strip().splitlines()[-1:]}"[:300]
            return [{"decisions": choices[0].decisions(), "failed": f"not built: {why}"}]
        parts = [[choice] for choice in choices]
        singly = (build_library(task, c, folder, f"{name}_{i}") for i, c in enumerate(parts))
        return [one for some in singly for one in some]
    return stated


def _bias(task: LayerTask) -> Any:
    return np.random.default_rng(0).standard_normal(task.geometry.outputs).astype(np.float32)


def _arguments(task: LayerTask, function: Any, tables: Sequence[Any], folder: Path) -> list[Any]:
    """Dtype, shape and content of each argument; tables of equal content share a file."""
    names = ["X", *(None for _ in tables), *(["residual"] if task.epilogue.residual else ()), "Y"]
    waiting, found = list(tables), []
    for param, name in zip(function.params, names, strict=True):
        shape = param.ty.shape
        if name is None:
            table = np.ascontiguousarray(waiting.pop(0))
            content, shape = table.tobytes(), table.shape
            name = f"tables/{hashlib.sha256(content).hexdigest()[:16]}.bin"
            if not (folder / name).exists():
                (folder / name).write_bytes(content)
        found.append([str(param.ty.dtype), [int(extent) for extent in shape], name])
    return found


def _write(
    out: Path, target: PivotTarget, jobs: Sequence[Job], stated: Sequence[list[dict[str, Any]]]
) -> None:
    """Write the description of a batch."""
    from .. import __version__

    tolerance = _TOLERANCE if target.precision == "float32" else _TOLERANCE_OF_HALVES
    tasks = []
    for number, (job, candidates) in enumerate(zip(jobs, stated, strict=True)):
        pixels, wanted = wanted_outputs(job.task, _bias(job.task))
        name = f"tables/wanted_{number}.bin"
        wanted.astype("<f4").tofile(out / name)
        g = job.task.geometry
        shape = [g.batch, g.outputs, g.y.output * g.x.output]
        check = {"y_shape": shape, "pixels": pixels, "expected": name, "tolerance": tolerance}
        key = json.loads(canonical(asdict(job.task.key)))
        layers = list(job.task.names)
        tasks.append({"task": key, "layers": layers, "check": check, "candidates": candidates})
    weights = sum(
        job.weight * job.task.plan.entries * (job.task.plan.block_rows * BYTES[target.storage] + 4)
        for job in jobs
    )
    content = {
        "format": FORMAT,
        "target": target.name,
        "tvm": tvm_version(),
        "package": __version__,
        "spacing": int(weights),
        "tasks": tasks,
    }
    identity = hashlib.sha256(canonical(content)).hexdigest()[:16]
    (out / "batch.json").write_text(json.dumps({"batch": identity, **content}))


def _add_runtime(folder: Path) -> None:
    """What measures, and the libraries that it needs there."""
    (folder / "measure.py").write_text(START)
    shutil.copytree(
        Path(on_gpu.__file__).parent,
        folder / "on_gpu",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    homes = (Path(tvm_ffi.__file__).parent / "lib", Path(tvm.__file__).parent / "lib")
    for name in LIBRARIES:
        source = next(home / name for home in homes if (home / name).is_file())
        shutil.copy(source, folder / "site")
    toolkit = cuda_compiler.find_nvcc().resolve().parent.parent
    for source in sorted(toolkit.glob(f"**/lib*/{CUDA_LIBRARY}"))[:1]:
        shutil.copy(source, folder / "site")
