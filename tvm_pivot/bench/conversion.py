"""Turning ONNX files into what each runtime deploys, once, in processes that do only that."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import schema
from ..errors import ArtifactError
from ..report import Report
from .environments import install_command, is_ready
from .models import ModelInput
from .results import Status
from .runtimes import Runtime
from .runtimes.pivot import Pivot
from .specs import RuntimeSpec
from .workers import Worker, WorkerError

_RECORD = "converted.json"
# Converters of an environment of its own take 20 times a file's size, 11 GB for VGG-16: no two
# of them convert files larger than this side by side.
_LARGE_BYTES = 200_000_000


@dataclass(frozen=True)
class Converted:
    """One model as one runtime deploys it in one precision.

    Attributes:
        status: as in `Result`; there are files only where it is ``"ok"``.
        version: the runtime's; empty where it is missing or does not start.
        files: what `Runtime.prepare` takes.
        seconds: what the conversion took when it was made.
        detail: why the status is not ok.
    """

    status: Status
    version: str = ""
    files: tuple[Path, ...] = ()
    seconds: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class _Record:
    """What lies beside converted files. Paths are relative to the record where they can be."""

    files: tuple[str, ...]
    seconds: float


Key = tuple[str, str, str]
"""The names of a model, a runtime and a precision."""

_Kind = tuple[str, str]
"""The names of a runtime and a precision: what one process converts for."""


def convert_all(
    wanted: Iterable[tuple[ModelInput, RuntimeSpec]],
    precisions: Sequence[str],
    folder: Path,
    *,
    jobs: int = 1,
    cores: int = 1,
    timeout: float = 600.0,
    progress: Callable[[str], None] | None = None,
) -> dict[Key, Converted]:
    """Convert models for runtimes, in each precision that the runtime has.

    What `folder` holds already is used again, unless the model, the runtime's version, or the
    code that converts it has changed. What fails is tried again the next time.

    Args:
        wanted: which models for which runtimes.
        folder: keeps what is converted.
        jobs: how many run side by side, each on ``cores // jobs`` threads.
        timeout: of one conversion, in seconds.
        progress: called with a line as each conversion begins.
    """
    work = [
        (model, spec, precision)
        for model, spec in wanted
        for precision in precisions
        if precision in spec.adapter.precisions
    ]
    kinds = Counter((spec.name, precision) for _, spec, precision in work)
    converter = _Converter(folder.resolve(), max(1, cores // jobs), timeout, progress, kinds)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            results = list(pool.map(lambda item: converter.convert(*item), work))
        except BaseException:  # Ctrl-C above all: do not wait for what is under way
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            converter.stop()
    keys = ((model.name, spec.name, precision) for model, spec, precision in work)
    return dict(zip(keys, results, strict=True))


def report_of(model: ModelInput, converted: Mapping[Key, Converted]) -> Report | None:
    """What tvm_pivot found in a model, if that is among what was converted and was built."""
    from ..artifact import read_manifest  # which imports TVM

    for (name, runtime, _), made in converted.items():
        if (name, runtime) == (model.name, Pivot.name) and made.files:
            try:
                return read_manifest(made.files[0]).report
            except ArtifactError:  # an adapter of the user's has the name
                return None
    return None


class _Converter:
    """Converts from several threads at once; `stop` kills what they started.

    A process that is done with one model takes the next, as some import for seconds. It ends
    when there is no other, as some hold gigabytes.
    """

    def __init__(
        self,
        folder: Path,
        threads: int,
        timeout: float,
        progress: Callable[[str], None] | None,
        left: Counter[_Kind],
    ) -> None:
        """Args: `left` says how many conversions of each kind there will be."""
        self._folder, self._threads, self._timeout = folder, threads, timeout
        self._progress, self._left = progress, left
        self._lock = threading.Lock()
        self._busy: set[Worker] = set()
        self._idle: dict[_Kind, list[Worker]] = {}
        self._stopped = False
        self._alone = threading.Lock()

    def stop(self) -> None:
        """Kill all processes, and let no more start."""
        with self._lock:
            self._stopped = True
            for worker in self._busy:
                worker.abort()
            for workers in self._idle.values():
                while workers:
                    workers.pop().kill()

    def convert(self, model: ModelInput, spec: RuntimeSpec, precision: str) -> Converted:
        """Convert, or find what was converted before. Never raises `WorkerError`."""
        try:
            return self._convert(model, spec, precision)
        finally:
            self._count_down((spec.name, precision))

    def _convert(self, model: ModelInput, spec: RuntimeSpec, precision: str) -> Converted:
        if not is_ready(spec.adapter):
            return Converted("missing", detail=install_command(spec.text))
        version = ""
        try:
            version = _version(spec)
            if spec.adapter.convert is Runtime.convert:
                return Converted("ok", version, (model.path,), 0.0)
            record = self._record(model, spec, precision, version)
            made = _read(record) or self._make(model, spec, precision, record)
        except WorkerError as e:
            status: Status = "unsupported" if e.unsupported else "failed"
            return Converted(status, version, detail=str(e))
        files = tuple(record.parent / file for file in made.files)
        return Converted("ok", version, files, made.seconds)

    def _record(self, model: ModelInput, spec: RuntimeSpec, precision: str, version: str) -> Path:
        """Where the record of a conversion is: a place that changes with all it depends on."""
        environments = (spec.adapter.environment, spec.adapter.converter)
        parts = (model.sha256, version, repr(environments), _code(spec.file))
        key = hashlib.sha256("\n".join((spec.name, precision, *parts)).encode()).hexdigest()[:16]
        names = [re.sub(r"[^\w.@-]", "_", part) for part in (model.name, spec.name)]
        return self._folder / names[0] / f"{names[1]}-{precision}-{key}" / _RECORD

    def _make(self, model: ModelInput, spec: RuntimeSpec, precision: str, record: Path) -> _Record:
        if self._progress is not None:
            self._progress(f"{model.name}: converting for {spec.adapter.title}")
        home = record.parent
        shutil.rmtree(home, ignore_errors=True)  # an attempt that was not finished
        target = home / "files"
        target.mkdir(parents=True)
        try:
            reply = self._ask(spec, precision, model.path, target)
        except WorkerError:
            shutil.rmtree(home, ignore_errors=True)
            raise
        files = [Path(file) for file in reply.files]
        relative = tuple(
            str(file.relative_to(home) if file.is_relative_to(home) else file) for file in files
        )
        made = _Record(relative, reply.seconds)
        record.write_text(schema.dumps(made), encoding="utf-8")  # last: now it counts
        return made

    def _ask(self, spec: RuntimeSpec, precision: str, model: Path, target: Path) -> _Record:
        large = spec.adapter.converter is not None and model.stat().st_size > _LARGE_BYTES
        with self._alone if large else nullcontext():
            worker = self._take(spec, precision)
            try:
                reply = worker.request(
                    "convert", timeout=self._timeout, model=str(model), folder=str(target)
                )
            except BaseException:
                self._put_back(worker, None)
                raise
            self._put_back(worker, (spec.name, precision))
        return _Record(tuple(reply["files"]), float(reply["seconds"]))

    def _take(self, spec: RuntimeSpec, precision: str) -> Worker:
        """A process that has nothing to do, or a new one."""
        with self._lock:
            if self._stopped:
                raise WorkerError("convert: stopped")
            idle = self._idle.get((spec.name, precision))
            worker = (
                idle.pop()
                if idle
                else Worker(
                    spec,
                    threads=self._threads,
                    precision=precision,
                    environment=spec.adapter.converter,
                )
            )
            self._busy.add(worker)
            return worker

    def _put_back(self, worker: Worker, kind: _Kind | None) -> None:
        """Keep a process for the next model; None ends it, as nobody knows what it is up to."""
        with self._lock:
            self._busy.discard(worker)
            if kind is None or self._stopped:
                worker.kill()
            else:
                self._idle.setdefault(kind, []).append(worker)

    def _count_down(self, kind: _Kind) -> None:
        """One conversion of a kind is over; after the last, end the processes kept for more."""
        with self._lock:
            self._left[kind] -= 1
            if not self._left[kind]:
                for worker in self._idle.pop(kind, []):
                    worker.kill()


def _read(record: Path) -> _Record | None:
    """An earlier conversion, if it is there and whole."""
    try:
        made = schema.loads(_Record, record.read_bytes())
    except (OSError, ArtifactError):
        return None
    return made if all((record.parent / file).exists() for file in made.files) else None


@cache
def _version(spec: RuntimeSpec) -> str:
    """What a runtime says its version is, where it runs.

    Raises:
        WorkerError: it does not start.
    """
    precision = spec.adapter.precisions[0]
    with Worker(spec, threads=1, precision=precision) as worker:
        return str(worker.request("version", timeout=120.0)["version"])


@cache
def _code(file: Path) -> str:
    """A digest of the code that converts: an adapter's file and what it imports of this project.

    A version says nothing of a change in an adapter, or in tvm_pivot while it is worked on.
    """
    waiting, sources = [file], set[Path]()
    while waiting:
        path = waiting.pop()
        sources.add(path)
        for name in _imports(path):
            neighbour = path.with_name(f"{name[1:]}.py")
            if name.startswith(".") and neighbour.is_file() and neighbour not in sources:
                waiting.append(neighbour)
            if _is_compiler(name):
                sources.update(_compiler())
    found = hashlib.sha256()
    for path in sorted(sources):
        found.update(path.read_bytes())
    return found.hexdigest()


def _imports(path: Path) -> Iterator[str]:
    """The modules a file imports anywhere; ``".x"`` is one that lies beside it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (dots + name for name in names)


def _is_compiler(name: str) -> bool:
    return f"{name}.".startswith("tvm_pivot.") and not name.startswith("tvm_pivot.bench")


def _compiler() -> Iterator[Path]:
    """The sources of tvm_pivot but for this folder."""
    import tvm_pivot

    yield from Path(str(tvm_pivot.__file__)).parent.glob("*.py")
    for base in map(Path, tvm_pivot.__path__):
        for folder in ("relay_passes", "schedules"):
            yield from (base / folder).glob("**/*.py")
