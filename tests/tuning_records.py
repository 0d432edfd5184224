"""Made-up tuning records for tests."""

from __future__ import annotations

from typing import Any

from tvm_pivot.runtime import tvm_version
from tvm_pivot.targets import PRESETS
from tvm_pivot.tuning.records import TargetKey, TaskKey, TuningRecord

TARGET = TargetKey.of(PRESETS["x86-avx512"])
PROBLEM: dict[str, Any] = {
    "batch": 1,
    "columns": 576,
    "rows": 64,
    "row_blocks": 8,
    "block_rows": 8,
    "height": 56,
    "width": 56,
    "pitch": 58,
    "taps": 9,
    "epilogue": {"residual": False, "low": 0.0, "high": None},
}


def task(entries: int = 460, target: TargetKey = TARGET, **changes: Any) -> TaskKey:
    """A convolution of ResNet-18, 10 % dense, with some fields changed."""
    return TaskKey("planes", {**PROBLEM, **changes}, entries, target)


def record(number: int = 0, key: TaskKey | None = None, **changes: Any) -> TuningRecord:
    """Record `number`: its decisions say so."""
    fields: dict[str, Any] = {
        "task": key or task(),
        "decisions": {"tile": {"vectors": 3, "number": number}},
        "seconds": (1e-3, 1.25e-3, 1.5e-3),
        "tvm": tvm_version(),
        "package": "0.1.0",
        "date": "2026-11-21T13:05:00Z",
    }
    return TuningRecord(**{**fields, **changes})


def numbers(records: Any) -> list[int]:
    """Which records these are."""
    return [r.decisions["tile"]["number"] for r in records]
