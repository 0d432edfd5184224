"""Linking compiled networks for machines other than this one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence

from .errors import ArtifactError
from .target_record import PivotTarget
from .targets import machine_name

Linker = Callable[..., None]

# What links for a triple, best first, and the Debian package that has it. A network needs no
# library at link time, so binutils alone will do, and what links for Linux does for Android.
_LINKERS = {
    "aarch64-linux-gnu": (
        "g++-aarch64-linux-gnu",
        ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-ld"),
    ),
    "aarch64-linux-android": ("binutils-aarch64-linux-gnu", ("aarch64-linux-gnu-ld", "ld.lld")),
    # Such code asks for functions of libgcc, which binutils alone have not.
    "armv7a-linux-gnueabihf": ("gcc-arm-linux-gnueabihf", ("arm-linux-gnueabihf-gcc",)),
}


def linker(target: PivotTarget) -> Linker | None:
    """What links libraries for `target`: for TVM's ``export_library(fcompile=...)``.

    Returns:
        None where this machine's own compiler does, which is TVM's default.

    Raises:
        ArtifactError: no program that can is installed; the message names the package.
    """
    triple = target.tvm.get("mtriple")
    if triple is None or triple == f"{machine_name()}-linux-gnu":
        return None
    if triple not in _LINKERS:
        raise ArtifactError(f"no linker is known for {triple}; known: {', '.join(_LINKERS)}")
    package, programs = _LINKERS[triple]
    program = next(filter(None, map(shutil.which, programs)), None)
    if program is None:
        raise ArtifactError(
            f"linking for target {target.name!r} needs {' or '.join(programs)}, "
            f"and none is installed: apt-get install {package}"
        )
    return _linking_with(program)


def _linking_with(program: str) -> Linker:
    def link(output: str, objects: Sequence[str], **_: object) -> None:
        done = subprocess.run(
            [program, "-shared", "-o", output, *objects], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr.strip()}")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link
