"""What a network takes and gives: names, shapes and dtypes of its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import PivotError


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model: the user's name for it, its static shape and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name!r} {self.form}"

    @property
    def form(self) -> str:
        """Dtype and shape."""
        return f"{self.dtype} {list(self.shape)}"

    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as NumPy knows it.

        Raises:
            PivotError: NumPy has none, or none that it can share.
        """
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            dtype = None
        if dtype is None or dtype.isbuiltin != 1:  # bfloat16 & co. of ml_dtypes have no DLPack
            raise PivotError(f"{self.name!r}: NumPy has no dtype {self.dtype!r}")
        return dtype
