"""What an exported network has beside its library and manifest: how to run it, and a runtime in C.

All of it follows from the manifest, so nobody who loads the network needs to check it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from . import runner
from .targets import PivotTarget

if TYPE_CHECKING:
    from .manifest import Manifest

README = "README.md"
NAMES = frozenset({README, *runner.SOURCES, *runner.HEADERS})
"""What may be there."""


def files(manifest: Manifest) -> dict[str, str]:
    """Names and contents of the files for a network.

    A network for a GPU comes without the runtime in C, which is for CPUs.
    """
    found = {README: _readme(manifest)}
    if manifest.target.gpu is None:
        for name in (*runner.SOURCES, *runner.HEADERS):
            found[name] = (runner.FOLDER / name).read_text()
    return found


def _readme(manifest: Manifest) -> str:
    target = manifest.target
    made = f"Compiled by tvm_pivot {manifest.package_version} with TVM {manifest.tvm_version}"
    lines = [f"# {manifest.name}", "", f"{made} for {target.name}.", ""]
    for title, specs in (("takes", manifest.inputs), ("gives", manifest.outputs)):
        lines += [f"It {title}:", "", *(f"- {spec}" for spec in specs), ""]
    if target.gpu is None:
        lines += _from_c()
    if _has_wheel(target):
        lines += _from_python(manifest)
    return "\n".join(lines)


def _from_c() -> list[str]:
    command = shlex.join(runner.compile_command("run", folder=Path()))
    return [
        "## From C",
        "",
        "On the device, with a C compiler and nothing else:",
        "",
        f"    {command}",
        "    ./run lib.so --repeat 50 input0.npy",
        "",
        "That writes `output0.npy`, ... and prints how long a run takes. `--raw` reads and writes",
        "files of bare numbers, `--threads 1` uses one core. In a program of your own: `pivot.h`.",
        "",
    ]


def _has_wheel(target: PivotTarget) -> bool:
    """Whether PyPI has TVM's runtime for such machines."""
    triple = str(target.tvm.get("mtriple", ""))
    return triple in ("", "x86_64-linux-gnu", "aarch64-linux-gnu")


def _from_python(manifest: Manifest) -> list[str]:
    release = ".".join(manifest.tvm_version.split(".")[:2])
    return [
        "## From Python",
        "",
        f'    pip install "apache-tvm=={release}.*" "apache-tvm-ffi<0.1.15" numpy psutil',
        "",
        "and, with the project's `tvm_pivot`, `relay_passes` and `schedules` beside this folder:",
        "",
        "    import numpy, tvm_pivot",
        '    net = tvm_pivot.load("this folder")',
        '    y = net.run(numpy.load("input0.npy"))',
        "",
    ]
