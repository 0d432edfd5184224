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
_DEBIAN = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libssl3", "libuuid1"),
    *(f"python{_PYTHON}-minimal", f"libpython{_PYTHON}-minimal", f"libpython{_PYTHON}-stdlib"),
)
# What they need at run time; the rest of what they ask for (protobuf, sympy, ...) is for tools.
_WHEELS = ("ai-edge-litert==2.3.0", "MNN==3.6.1", "onnxruntime==1.31.1", "numpy==2.4.6")
_TVM_WHEELS = ("apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1")
_PLATFORMS = tuple(
    f"{name}_aarch64"
    for name in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014")
)
# Of the wheel of TVM: its compiler is 240 MB and of no use to a device.
_UNUSED = ("tvm/lib/libtvm_compiler.so", "tvm/3rdparty", "tvm/lib/libtvm_runtime_cuda.so")
_MARK = "complete"
_PROCESSORS = 2


def rivals_folder() -> Path:
    """Where the other runtimes are: ``root`` with Debian's files, ``site`` with the wheels."""
    return FOLDER / "rivals"


def tvm_folder() -> Path:
    """Where TVM's runtime for aarch64 is: folders ``tvm`` and ``tvm_ffi``."""
    return FOLDER / "tvm"


def require(folder: Path) -> Path:
    """The folder if `set_up` has finished it.

    Raises:
        ArmCostError: it has not.
    """
    if not (folder / _MARK).exists():
        raise ArmCostError(f"{folder} is not there: run python -m benchmarks.arm_cost setup")
    return folder


def set_up() -> None:
    """Download what is missing, about 150 MB.

    Raises:
        ArmCostError: a download failed.
    """
    folder = tvm_folder()
    if not (folder / _MARK).exists():
        _fresh(folder)
        _wheels(folder, _TVM_WHEELS)
        for name in _UNUSED:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / _MARK).touch()
    folder = rivals_folder()
    if not (folder / _MARK).exists():
        _fresh(folder)
        _debian(folder)
        _wheels(folder / "site", _WHEELS)
        (folder / _MARK).touch()


def _fresh(folder: Path) -> None:
    """An empty folder, whatever an earlier attempt left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def emulated_python(core: Core) -> tuple[Emulator, Path]:
    """An emulator whose programs see `core` as their processor, and the Python to run in it.

    Raises:
        ArmCostError: `set_up` has not run.
    """
    folder = require(rivals_folder())
    root = _root_of(core, folder)
    environment = {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": str(folder / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }
    python = root / f"usr/bin/python{_PYTHON}"
    return Emulator(core, root, environment), python


def _root_of(core: Core, folder: Path) -> Path:
    """Debian's files, with a ``/proc/cpuinfo`` that hides this machine's: they are found by it."""
    root = folder / core.name
    info = root / "proc" / "cpuinfo"
    if not info.exists():
        info.parent.mkdir(parents=True, exist_ok=True)
        for name in ("usr", "lib", "etc"):
            (root / name).unlink(missing_ok=True)
            (root / name).symlink_to(folder / "root" / name)
        info.write_text("".join(cpu_info(core, n) for n in range(_PROCESSORS)))
    return root


def cpu_info(core: Core, number: int) -> str:
    """What Linux says in ``/proc/cpuinfo`` of one processor of a kind."""
    return (
        f"processor\t: {number}\nBogoMIPS\t: 50.00\nFeatures\t: {core.features}\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\n"
        f"CPU part\t: {core.part:#x}\nCPU revision\t: 0\n\n"
    )


def _debian(folder: Path) -> None:
    apt, debs = folder / "apt", folder / "debs"
    for path in (apt / "lists/partial", apt / "cache/archives/partial", debs, folder / "root"):
        path.mkdir(parents=True)
    # Of its own, so that no root is needed and the lists of this machine stay as they are.
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State::Lists": str(apt / "lists"),
        "Dir::Cache": str(apt / "cache"),
        "Dir::State::Status": "/dev/null",
        "Debug::NoLocking": "1",
    }
    get = ["-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run_tool("apt-get", *get, "update")
    run_tool("apt-get", *get, "download", *_DEBIAN, cwd=debs)
    for package in sorted(debs.iterdir()):
        run_tool("dpkg", "-x", str(package), str(folder / "root"))
    shutil.rmtree(apt)
    shutil.rmtree(debs)


def _wheels(folder: Path, requirements: tuple[str, ...]) -> None:
    abis = [f"cp{_PYTHON.replace('.', '')}", "abi3", "none"]
    command = ["-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    command += ["--no-deps", f"--python-version={_PYTHON}", "--implementation=cp"]
    command += [f"--abi={abi}" for abi in abis] + [f"--platform={name}" for name in _PLATFORMS]
    run_tool(sys.executable, *command, f"--target={folder}", "--upgrade", *requirements)
