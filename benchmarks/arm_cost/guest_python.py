"""A Python for aarch64 with the wheels of other runtimes, to run under emulation.

It is made of Debian's packages, unpacked, and of the wheels that PyPI has for the architecture.
Nothing is installed on this machine and nothing runs as root.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from .cores import ArmCostError, Core
from .emulator import FOLDER, Emulator, run_tool

RUNTIMES = ("litert", "mnn", "mnn-sparse", "onnxruntime")
"""Adapters of `tvm_pivot.bench` whose runtimes have wheels for aarch64."""

_PYTHON = "3.11"
# What they need at run time; the rest of what they ask for (protobuf, sympy, ...) is for tools.
_WHEELS = ("ai-edge-litert==2.3.0", "MNN==3.6.1", "onnxruntime==1.31.1", "numpy==2.4.6")
_PLATFORMS = tuple(
    f"{name}_aarch64"
    for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014")
)
_REPOSITORY = Path(__file__).resolve().parents[2]
# Also what the tests under emulation use: ``root`` with Debian's files, ``site`` with TVM's wheels.
_ARM64 = _REPOSITORY / ".cache" / "arm64"
_SCRIPT = _REPOSITORY / "tests" / "arm64_python.sh"
_PROCESSORS = 2


def rivals_folder() -> Path:
    """Where the wheels of the other runtimes are."""
    return FOLDER / "wheels"


def tvm_folder() -> Path:
    """Where TVM's runtime for aarch64 is: folders ``tvm`` and ``tvm_ffi``."""
    return _ARM64 / "site"


def require(folder: Path) -> Path:
    """The folder if it is there.

    Raises:
        ArmCostError: it is not.
    """
    if not folder.exists():
        raise ArmCostError(f"{folder} is not there: run python -m benchmarks.arm_cost setup")
    return folder


def set_up() -> None:
    """Download what is missing, about 170 MB.

    Raises:
        ArmCostError: a download failed.
    """
    run_tool("env", f"PYTHON={sys.executable}", "bash", str(_SCRIPT), str(_ARM64))
    folder = rivals_folder()
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # what an earlier attempt left
        _download(partial)
        partial.rename(folder)


def emulated_python(core: Core) -> tuple[Emulator, Path]:
    """An emulator whose programs see `core` as their processor, and the Python to run in it.

    Raises:
        ArmCostError: `set_up` has not run.
    """
    site = require(rivals_folder())
    root = _root_of(core)
    environment = {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }
    python = root / f"usr/bin/python{_PYTHON}"
    return Emulator(core, root, environment), python


def _root_of(core: Core) -> Path:
    """Debian's files, with a ``/proc/cpuinfo`` that QEMU takes instead of this machine's."""
    debian = require(_ARM64 / "root")
    root = FOLDER / "roots" / core.name
    info = root / "proc" / "cpuinfo"
    if not info.exists():
        info.parent.mkdir(parents=True, exist_ok=True)
        for name in ("usr", "lib", "etc"):
            (root / name).unlink(missing_ok=True)
            (root / name).symlink_to(debian / name)
        info.write_text("".join(cpu_info(core, number) for number in range(_PROCESSORS)))
    return root


def cpu_info(core: Core, number: int) -> str:
    """What Linux says in ``/proc/cpuinfo`` of one processor of a kind."""
    return (
        f"processor\t: {number}\nBogoMIPS\t: 50.00\nFeatures\t: {core.features}\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\n"
        f"CPU part\t: {core.part:#x}\nCPU revision\t: 0\n\n"
    )


def _download(folder: Path) -> None:
    abis = [f"cp{_PYTHON.replace('.', '')}", "abi3", "none"]
    command = ["-m", "pip", "install", "--quiet", "--only-binary=:all:", "--no-deps"]
    command += [f"--python-version={_PYTHON}", "--implementation=cp", f"--target={folder}"]
    command += [f"--abi={abi}" for abi in abis] + [f"--platform={name}" for name in _PLATFORMS]
    run_tool(sys.executable, *command, *_WHEELS)
