"""Tuning records: what was measured, for which task, on which machine. One JSON line each.

A line says everything about its record, so lines may be copied between logs, sorted or deleted.
This file knows the format; `log_files` knows files. Neither needs TVM.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from statistics import median
from typing import Any

from ..errors import ArtifactError, TuningError
from ..runtime import tvm_version
from ..schema import decode, parse
from ..targets import PivotTarget

FORMAT = 1
MAX_LINE = 1 << 20
_LARGEST = 1 << 53  # beyond it JSON readers disagree about numbers
_CHECKSUM = "checksum"
# Keys are written in order, so every line starts like this. Inside a string it cannot occur.
LINE_START = b'{"checksum":'


@dataclass(frozen=True)
class TargetKey:
    """The machine of a record.

    Attributes:
        name: what the user called it; not compared.
        family: the schedule family, e.g. ``"x86"``.
        mcpu: LLVM's name of the CPU; of a GPU, its compute capability.
        features: what is switched on or off beside it, as in ``"+avx512bf16"``; of a GPU, how many
            multiprocessors it has.
        lanes: fp32 elements in one vector register.
        cores: cores that the candidate ran on.
    """

    name: str = field(compare=False)
    family: str
    mcpu: str
    features: tuple[str, ...]
    lanes: int
    cores: int

    def __post_init__(self) -> None:
        for name in ("lanes", "cores"):
            if not 1 <= getattr(self, name) <= 1 << 16:
                raise ValueError(f"{name} is {getattr(self, name)}")

    @classmethod
    def of(cls, target: PivotTarget) -> TargetKey:
        """The key of a target to compile for."""
        spec = target.tvm
        mcpu, features = str(spec.get("mcpu", spec.get("arch", ""))), spec.get("mattr", ())
        if target.gpu is not None:
            features = (f"{target.gpu.multiprocessors} multiprocessors",)
        return cls(target.name, target.family, mcpu, tuple(features), target.lanes, target.cores)


@dataclass(frozen=True)
class TaskKey:
    """What was tuned. Equal keys ask for the same kernel on the same machine.

    Attributes:
        kernel: the kernel's form, e.g. ``"planes"`` or ``"rows"``, or ``"function"``.
        problem: the fields of the kernel's problem record (`PlanesProblem`, `RowsProblem`), the
            epilogue among them as an object. Numbers, strings, booleans and None. Of a function
            its hash, and what it is made of.
        entries: blocks kept, over all row blocks.
        target: the machine.
    """

    kernel: str
    problem: dict[str, Any] = field(hash=False)
    entries: int
    target: TargetKey

    def __post_init__(self) -> None:
        if not 0 <= self.entries <= _LARGEST:
            raise ValueError(f"entries is {self.entries}")
        for name, value in self.problem.items():
            inner = value.values() if isinstance(value, dict) else (value,)
            if not all(map(_is_plain, inner)):
                raise ValueError(f"problem.{name} is {value!r:.60}")

    @classmethod
    def of(cls, kernel: str, problem: Any, entries: int, target: PivotTarget) -> TaskKey:
        """The key of a problem, which is a frozen dataclass."""
        return cls(kernel, asdict(problem), entries, TargetKey.of(target))

    @property
    def density(self) -> float | None:
        """Kept blocks / all blocks; None where the problem does not say how many there are."""
        sizes = [self.problem.get(name) for name in ("row_blocks", "columns")]
        if not all(type(size) is int and size > 0 for size in sizes):
            return None
        return self.entries / math.prod(sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TuningRecord:
    """One candidate and its times.

    Attributes:
        task: what it is a candidate for.
        decisions: what it is, as JSON: ``{"tile": ...}``, ``{"trace": ...}``; the tuner's to read.
        seconds: the measured times of one run.
        tvm: the version of TVM it was built with.
        package: the version of tvm_pivot.
        date: when it was measured, UTC, as ``2026-11-21T13:05:00Z``.
    """

    task: TaskKey
    decisions: dict[str, Any] = field(hash=False)
    seconds: tuple[float, ...]
    tvm: str
    package: str
    date: str

    def __post_init__(self) -> None:
        if not self.seconds or not all(0 < s < 1e9 for s in self.seconds):
            raise ValueError(f"seconds is {self.seconds!r:.60}")

    @classmethod
    def now(
        cls, task: TaskKey, decisions: Mapping[str, Any], seconds: Iterable[float]
    ) -> TuningRecord:
        """A record measured just now, with the versions that are installed.

        Raises:
            ValueError: no times, or one that is not a positive number.
        """
        from .. import __version__

        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        times = tuple(map(float, seconds))
        return cls(task, dict(decisions), times, tvm_version(), __version__, date)

    @property
    def cost(self) -> float:
        """Seconds of one run: the median of the times."""
        return median(self.seconds)

    @property
    def is_stale(self) -> bool:
        """Measured with another release of TVM than the installed one (0.27 is one release)."""
        return _release(self.tvm) != _release(tvm_version())


def encode(record: TuningRecord) -> bytes:
    """The record's line, with its line end.

    Raises:
        TuningError: the decisions are no JSON, or the line is longer than `MAX_LINE`.
    """
    try:
        content = json.loads(canonical({"format": FORMAT, **asdict(record)}))
        line = canonical({**content, _CHECKSUM: _checksum(content)}) + b"\n"
    except (TypeError, ValueError, RecursionError) as e:
        raise TuningError(f"a tuning record cannot be written as JSON: {e}") from e
    if len(line) > MAX_LINE:
        raise TuningError(f"a tuning record takes {len(line)} bytes; {MAX_LINE} is the limit")
    return line


def decode_line(line: bytes) -> tuple[str, TuningRecord]:
    """The checksum and the record of one line.

    Raises:
        ValueError: it is torn, damaged or something else; the message says which.
    """
    try:
        content = parse(line)
    except ArtifactError as e:
        raise ValueError(str(e)) from e
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError("not a tuning record")
    found = content.pop("format")
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"format {found!r:.20}; this version reads format {FORMAT}")
    stated = content.pop(_CHECKSUM, None)
    try:
        checksum = _checksum({"format": FORMAT, **content})
    except (ValueError, RecursionError) as e:  # 1e999 is valid JSON and no number
        raise ValueError(f"not a tuning record: {e}") from e
    if stated != checksum:
        raise ValueError("the checksum is wrong: damaged, or edited by hand")
    try:
        return checksum, decode(TuningRecord, content)
    except ArtifactError as e:
        raise ValueError(str(e)) from e


def canonical(content: Any) -> bytes:
    """JSON that is the same for the same content."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def _checksum(content: Any) -> str:
    """Against damage, not against malice: 64 bits of SHA-256 over the canonical JSON."""
    return hashlib.sha256(canonical(content)).hexdigest()[:16]


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, bool | str):
        return True
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
