"""How candidates get their arguments; farm workers find these functions by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Argument = tuple[str, tuple[int, ...]]


def tables(artifact: Path, arguments: Sequence[Argument]) -> list[npt.NDArray[Any] | None]:
    """An index table that counts down, and any numbers for the rest."""
    return [
        np.arange(shape[0], dtype=dtype)[::-1] if dtype == "int32" else None
        for dtype, shape in arguments
    ]


def too_few(artifact: Path, arguments: Sequence[Argument]) -> list[None]:
    """One less than there are."""
    return [None for _ in arguments[1:]]


def too_small(artifact: Path, arguments: Sequence[Argument]) -> list[npt.NDArray[Any]]:
    """Arrays of one element."""
    return [np.zeros(1, dtype) for dtype, _ in arguments]
