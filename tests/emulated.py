"""ARM code run for real on this machine, by qemu: the runtime in C, or a whole Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_pivot
from tvm_pivot import runner

ROOT = Path(__file__).resolve().parents[1]
ARM64 = ROOT / ".cache/arm64"
PYTHON = ARM64 / "python"
CROSS = "aarch64-linux-gnu-gcc"
CROSS_V7 = "arm-linux-gnueabihf-gcc"
CPU_V7 = "cortex-a7"


def _missing(*programs: str) -> list[str]:
    """Those of some programs that tests under emulation lack here."""
    return [name for name in programs if shutil.which(name) is None]


def _skipped_without(*lacking: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(lacking), reason=f"needs {', '.join(lacking)}")


needed = _skipped_without(*_missing("qemu-aarch64", CROSS))
needed_v7 = _skipped_without(*_missing("qemu-arm", CROSS_V7))
needed_python = _skipped_without(*([] if PYTHON.exists() else ["make emulation"]))


@cache
def program(compiler: str = CROSS) -> Path:
    """The runtime's program ``run``; compiled once for each version of its sources."""
    digest = hashlib.sha256(" ".join(runner.compile_command("run", compiler=compiler)).encode())
    for name in (*runner.SOURCES, *runner.HEADERS):
        digest.update((runner.FOLDER / name).read_bytes())
    path = ROOT / f".cache/run-{digest.hexdigest()[:12]}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        subprocess.run(runner.compile_command(partial, compiler=compiler), check=True)
        partial.replace(path)
    return path


def emulator(cpu: str) -> list[str]:
    """The command that runs a program on a processor, by QEMU's name of it."""
    if cpu == CPU_V7:
        return ["qemu-arm", "-cpu", cpu, "-L", "/usr/arm-linux-gnueabihf"]
    return ["qemu-aarch64", "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu"]


def emulate(*words: Any, folder: Path, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    """Run the runtime's program in `folder`, with one thread unless told otherwise."""
    command = [*emulator(cpu), str(program(CROSS_V7 if cpu == CPU_V7 else CROSS))]
    threads = () if "--threads" in words else ("--threads", "1")
    return subprocess.run(
        [*command, *map(str, (*words, *threads))], cwd=folder, capture_output=True, text=True
    )


def run(
    net: tvm_pivot.Session, inputs: Sequence[Any], folder: Path, cpu: str = "max"
) -> list[np.ndarray]:
    """Export a network for ARM and run it: its outputs."""
    exported = net.export(folder / "net")
    for number, array in enumerate(inputs):
        np.save(folder / f"input{number}.npy", array)
    names = [f"input{number}.npy" for number in range(len(inputs))]
    done = emulate(exported / "lib.so", *names, folder=folder, cpu=cpu)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"output{number}.npy") for number in range(len(net.outputs))]
