"""Where runtimes are installed: beside tvm_pivot, or in virtual environments of their own."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from ..errors import PivotError
from .runtimes import Environment, Runtime
from .specs import resolve

TORCH = "torch==2.13.0"
"""The torch of environments that have one; which build of it, pip's own settings decide."""

_ERROR_LINES = 15
_FIND = (
    "import sys; from importlib.util import find_spec; "
    "sys.exit(not all(map(find_spec, sys.argv[1:])))"
)


def folder_of(name: str) -> Path:
    """The folder of the virtual environment of some name, there or not."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_folder, "tvm_pivot", "envs", name)


def python_of(environment: Environment) -> Path:
    """The Python of an environment, there or not."""
    if environment.name is None:
        return Path(sys.executable)
    return folder_of(environment.name) / "bin" / "python"


def is_installed(environment: Environment) -> bool:
    """Whether all modules of an environment can be found. None of them is imported."""
    # The folder is an argument as it depends on variables that may change between calls.
    return _is_installed(environment, python_of(environment))


@cache
def _is_installed(environment: Environment, python: Path) -> bool:
    if environment.name is None:
        importlib.invalidate_caches()
        return all(map(_can_find, environment.modules))
    if not python.exists() or _mark(environment.name).exists():
        return False
    command = [str(python), "-I", "-c", _FIND, *environment.modules]
    return subprocess.run(command, capture_output=True).returncode == 0


def _can_find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # what should hold it is missing or no package
        return False


def environments_of(runtime: type[Runtime]) -> tuple[Environment, ...]:
    """What a runtime needs: its own environment, and its converter's if that is another."""
    own, converter = runtime.environment, runtime.converter
    return (own,) if converter is None or converter == own else (own, converter)


def is_ready(runtime: type[Runtime]) -> bool:
    """Whether all that a runtime needs is installed."""
    return all(map(is_installed, environments_of(runtime)))


def install_command(name: str) -> str:
    """What a user types to install all that a runtime needs.

    Raises:
        InputError: there is no such runtime.
    """
    (spec,) = resolve([name])
    environments = environments_of(spec.adapter)
    if any(environment.name for environment in environments):
        return f"tvm-pivot bench --install {spec.name}"
    return f"pip install {shlex.join(r for env in environments for r in env.requirements)}"


def install(names: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Install what some runtimes need and have not yet. Needs the network.

    Args:
        names: of runtimes.
        say: called with a line before each step; some take minutes.

    Raises:
        InputError: there is no such runtime.
        PivotError: a step failed; the message has the end of its output.
    """
    wanted = dict.fromkeys(env for spec in resolve(names) for env in environments_of(spec.adapter))
    for environment in wanted:
        if is_installed(environment):
            say(f"there already: {_describe(environment)}")
        elif environment.name is None:
            _pip_install(Path(sys.executable), environment, say)
        else:
            _make(environment, environment.name, say)
        _is_installed.cache_clear()
        if not is_installed(environment):
            raise PivotError(
                f"installed {' '.join(environment.requirements)}, but not all of "
                f"{', '.join(environment.modules)} can be found"
            )


def _make(environment: Environment, name: str, say: Callable[[str], None]) -> None:
    """Make a virtual environment. It does not count as installed while its mark is there."""
    folder, mark = folder_of(name), _mark(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if mark.exists():
        shutil.rmtree(folder, ignore_errors=True)  # what is left of an earlier attempt
    mark.touch()
    say(f"making {folder}")
    _run([sys.executable, "-m", "venv", str(folder)])
    _pip_install(python_of(environment), environment, say)
    mark.unlink()


def _mark(name: str) -> Path:
    """The file that is there while an environment is being made, or after that failed."""
    return folder_of(name).with_name(f"{name}.unfinished")


def _pip_install(python: Path, environment: Environment, say: Callable[[str], None]) -> None:
    # torch by itself, so that nothing else decides which build of it is installed.
    first = [TORCH] if environment.torch else []
    rest = [requirement for requirement in environment.requirements if requirement not in first]
    for requirements in filter(None, (first, rest)):
        say(f"pip install {shlex.join(requirements)}")
        _run([str(python), "-m", "pip", "install", "--quiet", *requirements])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-_ERROR_LINES:])
        raise PivotError(f"{shlex.join(command)} failed:\n{tail}")


def _describe(environment: Environment) -> str:
    where = "beside tvm_pivot" if environment.name is None else str(folder_of(environment.name))
    return f"{' '.join(environment.requirements)} ({where})"
