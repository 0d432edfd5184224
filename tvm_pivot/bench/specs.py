"""From what users write after ``--runtimes`` to the class that drives the runtime."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .runtimes import ADAPTERS, Runtime, adapter

_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")


@dataclass(frozen=True)
class RuntimeSpec:
    """A runtime to compare.

    Attributes:
        text: what a worker is told: a name in `ADAPTERS`, or ``/absolute/file.py:Class``.
        adapter: the class that drives it.
        file: where that class is defined.
    """

    text: str
    adapter: type[Runtime]
    file: Path

    @property
    def name(self) -> str:
        """The name in results."""
        return self.adapter.name


def resolve(texts: Sequence[str]) -> tuple[RuntimeSpec, ...]:
    """The runtimes of some names; each may also be ``file.py:Class`` with a user's own adapter.

    A user's adapter imports `Runtime` from ``tvm_pivot.bench.runtimes.protocol`` and runs beside
    tvm_pivot. The same text twice counts once.

    Raises:
        InputError: there is no such runtime, file or class; the class is no adapter that can run
            beside tvm_pivot; two of them have one name.
    """
    found: dict[str, RuntimeSpec] = {}
    for text in dict.fromkeys(texts):
        spec = _known(text) if text in ADAPTERS else _from_file(text)
        if spec.name in found:
            raise InputError(f"{text}: there is a runtime {spec.name!r} already")
        found[spec.name] = spec
    return tuple(found.values())


def _known(name: str) -> RuntimeSpec:
    cls = adapter(name)
    return RuntimeSpec(name, cls, Path(str(sys.modules[cls.__module__].__file__)))


def _from_file(text: str) -> RuntimeSpec:
    match = _FILE.fullmatch(text)
    if match is None:
        raise InputError(
            f"there is no runtime {text!r}; there are {', '.join(ADAPTERS)}, or write "
            f"file.py:Class for an adapter of your own"
        )
    file, name = Path(match["file"]).resolve(), match["name"]
    cls = _load_class(file, name)
    if not (isinstance(cls, type) and issubclass(cls, Runtime)):
        raise InputError(f"{text}: not a class made from tvm_pivot.bench.runtimes.protocol.Runtime")
    missing = [field for field in ("name", "title", "environment") if not hasattr(cls, field)]
    if missing or cls.__abstractmethods__:
        wanted = ", ".join([*missing, *sorted(cls.__abstractmethods__)])
        raise InputError(f"{text}: the class must define {wanted}")
    if any(env is not None and env.name for env in (cls.environment, cls.converter)):
        raise InputError(f"{text}: its environments must be Environment(None, ...)")
    return RuntimeSpec(f"{file}:{name}", cls, file)


def _load_class(file: Path, name: str) -> object:
    module_name = f"tvm_pivot_user_runtime_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file")
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found: object = getattr(module, name)
    except Exception as e:  # whatever is wrong with a user's file
        raise InputError(f"cannot load {name} from {file}: {type(e).__name__}: {e}") from e
    return found
