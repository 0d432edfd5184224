"""ARM code run for real on this machine, by qemu: the runner in C++, or a whole Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
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
CROSS = "aarch64-linux-gnu-g++"


def missing() -> list[str]:
    """What tests under emulation lack here."""
    lacking = [name for name in ("qemu-aarch64", CROSS) if shutil.which(name) is None]
    return lacking if PYTHON.exists() else [*lacking, "make emulation"]


needed = pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}")


@cache
def program() -> Path:
    """The runner, compiled for ARM; once for each version of its source."""
    digest = hashlib.sha256(runner.SOURCE.read_bytes()).hexdigest()[:12]
    path = ARM64 / f"run-{digest}"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        libraries = [ARM64 / "site/tvm/lib", ARM64 / "site/tvm_ffi/lib"]
        command = runner.compile_command(partial, libraries=libraries, compiler=CROSS)
        subprocess.run(command, check=True)
        partial.replace(path)
    return path


def emulate(*words: Any, folder: Path, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    """Run the runner in `folder`."""
    command = ["qemu-aarch64", "-cpu", cpu, "-L", str(ARM64 / "root"), str(program())]
    env = {**os.environ, "TVM_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True
    )


def run(
    net: tvm_pivot.Session, inputs: Sequence[Any], folder: Path, cpu: str = "max"
) -> list[np.ndarray]:
    """Export a network for ARM and run it: its outputs."""
    archive = net.export(folder / "net.pivot")
    with zipfile.ZipFile(archive) as opened:
        opened.extract("lib.so", folder)
    for number, array in enumerate(inputs):
        np.save(folder / f"input{number}.npy", array)
    names = [f"input{number}.npy" for number in range(len(inputs))]
    done = emulate("lib.so", *names, folder=folder, cpu=cpu)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"output{number}.npy") for number in range(len(net.outputs))]
