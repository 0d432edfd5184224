"""tvm_pivot: a compilation backend on Apache TVM for pruned neural networks."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Installed, relay_passes and schedules lie inside this package; in the source tree they lie
# beside it, and whoever starts Python in its top folder imports the package from there.
_folder = Path(__file__).resolve().parent
if not (Path(__file__).parent / "relay_passes").is_dir():
    __path__.append(str(_folder.parent))

if TYPE_CHECKING:
    from .artifact import load
    from .compiler import build, inspect
    from .errors import (
        ArtifactError,
        CompileError,
        InputError,
        ModelImportError,
        PivotError,
        PruneError,
        TuningError,
        UnsupportedTargetError,
    )
    from .prune.api import prune, pruner
    from .prune.report import PruneReport
    from .report import LayerReport, Report
    from .session import Session
    from .targets import PivotTarget
    from .tuning.tuner import TuneReport, tune

try:
    __version__ = version("tvm-pivot")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "unknown"

# Where each public name lives. They are imported on first use: TVM takes seconds to import,
# which `tvm-pivot --help` and a process that only reads reports should not wait for.
_HOMES = {
    "ArtifactError": "errors",
    "CompileError": "errors",
    "InputError": "errors",
    "LayerReport": "report",
    "ModelImportError": "errors",
    "PivotError": "errors",
    "PivotTarget": "targets",
    "PruneError": "errors",
    "PruneReport": "prune.report",
    "Report": "report",
    "Session": "session",
    "TuneReport": "tuning.tuner",
    "TuningError": "errors",
    "UnsupportedTargetError": "errors",
    "build": "compiler",
    "inspect": "compiler",
    "load": "artifact",
    "prune": "prune.api",
    "pruner": "prune.api",
    "tune": "tuning.tuner",
}

__all__ = [
    "ArtifactError",
    "CompileError",
    "InputError",
    "LayerReport",
    "ModelImportError",
    "PivotError",
    "PivotTarget",
    "PruneError",
    "PruneReport",
    "Report",
    "Session",
    "TuneReport",
    "TuningError",
    "UnsupportedTargetError",
    "__version__",
    "build",
    "inspect",
    "load",
    "prune",
    "pruner",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
