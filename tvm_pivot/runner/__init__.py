"""A runtime in C that runs exported networks on machines without Python and without TVM."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("run.c", "pivot.c", "tables.c", "threads.c")
HEADERS = ("pivot.h", "internal.h")
# Kernels call functions of the program that loads them, so it has to export its own, and bring the
# mathematical ones, which it does not call itself.
_FLAGS = ("-O2", "-rdynamic")
_LIBRARIES = ("-Wl,--no-as-needed", "-lm", "-ldl", "-lpthread")


def compile_command(
    output: str | Path, *, folder: Path | None = None, compiler: str = "cc"
) -> list[str]:
    """The command that compiles the program ``run``.

    Args:
        output: the program to write.
        folder: where the sources are; default: here.
        compiler: for the machine that the program is for.
    """
    sources = [str((folder or FOLDER) / name) for name in SOURCES]
    return [compiler, *_FLAGS, "-o", str(output), *sources, *_LIBRARIES]
