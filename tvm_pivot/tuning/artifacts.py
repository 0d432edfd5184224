"""What lies beside a candidate's library: its tables, and the arguments it takes.

Processes that talk to devices read it without TVM's compiler.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .rpc_worker import Argument


def arguments_of(artifact: str | Path) -> list[Argument]:
    """Dtype and shape of each argument of a candidate."""
    stored = json.loads(Path(artifact).with_suffix(".json").read_text())
    return [(dtype, tuple(shape)) for dtype, shape, _ in stored]


def contents_of(artifact: Path, arguments: Sequence[Argument]) -> list[npt.NDArray[Any] | None]:
    """The tables of a candidate; None for its other arguments. For `rpc(allocate=...)`."""
    stored = json.loads(artifact.with_suffix(".json").read_text())
    with np.load(artifact.with_suffix(".npz"), allow_pickle=False) as tables:
        return [None if name is None else tables[name] for _, _, name in stored]
