"""Pruning in PyTorch: blocks, and which rows share them, chosen together."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from .api import prune, pruner
from .report import PruneReport

__all__ = ["PruneReport", "prune", "pruner"]


class _CallableModule(ModuleType):
    """`tvm_pivot.prune` is this module once it is imported, and a call of it must still prune."""

    def __call__(self, *args: Any, **kwargs: Any) -> PruneReport:
        return prune(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
