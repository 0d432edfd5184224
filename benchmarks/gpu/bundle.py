"""Build a folder that runs on a GPU machine with Python 3.12, torch and NumPy, and no network.

    python -m benchmarks.gpu.bundle FOLDER --target h100
    python FOLDER/check.py          # there

In it: TVM's runtime (no compiler) from PyPI's wheels, this package, the networks and layers of
`cases` and the kernels of `tensor_core_cases`, compiled, and their inputs and expected outputs.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
import numpy as np
import torch

import tvm_pivot
from benchmarks import zoo
from benchmarks.gpu.cases import LAYERS, NETWORKS, Layer, Network
from benchmarks.gpu.tensor_core_cases import CHIPS, build_all

PYTHON = "3.12"
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
MOST_BYTES = 40 << 20
# Of TVM's wheel, all that running needs.
TVM_FILES = ("tvm/__init__.py", "libtvm_runtime.so", "libtvm_runtime_extra.so")
TVM_FILES += ("libtvm_runtime_cuda.so", ".dist-info/METADATA")


def main() -> None:
    """Build the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="h100")
    parser.add_argument("--only", default="", help="part of the names of cases to build")
    parser.add_argument("--wheels", type=Path, help="wheels downloaded before")
    parser.add_argument("--masks", type=Path, help="really pruned matrices (DLMC.npz)")
    given = parser.parse_args()
    folder: Path = given.folder
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    add_runtime(folder, given.wheels)
    add_sources(folder)
    for case in (*NETWORKS, *LAYERS):
        if given.only in case.key:
            add_case(folder / "cases", case, given.target)
            print(case.key, flush=True)
    gpu = tvm_pivot.targets.resolve(given.target).gpu
    if gpu is not None and gpu.arch in CHIPS:
        built = build_all(folder / "tensor_cores", gpu.arch, given.masks, given.only)
        print(*built, sep="\n", flush=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES >> 20} MB")


def add_runtime(folder: Path, wheels: Path | None) -> None:
    """TVM's runtime and its Python binding, for the other machine's Python."""
    site, downloads = folder / "site", wheels or folder / "wheels"
    if wheels is None:
        names = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        command += ["--abi", f"cp{PYTHON.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
        for platform in PLATFORMS:
            command += ["--platform", f"manylinux_{platform}_x86_64"]
        command += ["--platform", "manylinux2014_x86_64", "--dest", str(downloads)]
        subprocess.run([*command, *names, "typing_extensions"], check=True)
    for wheel in sorted(downloads.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not wheel.name.startswith("apache_tvm-") or name.endswith(TVM_FILES):
                    archive.extract(name, site)
    if wheels is None:
        shutil.rmtree(downloads)
    for extra in ("3rdparty", "include", "cython", "src", "share", "testing", "cpp"):
        shutil.rmtree(site / "tvm_ffi" / extra, ignore_errors=True)


def add_sources(folder: Path) -> None:
    """This package, and what `check` needs of the benchmarks."""
    ignore = shutil.ignore_patterns("__pycache__", "*.onnx", "results", "demo")
    for name in ("tvm_pivot", "relay_passes", "schedules"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, dirs_exist_ok=True)
    for name in ("__init__.py", "zoo", "gpu"):
        source, to = ROOT / "benchmarks" / name, folder / "benchmarks" / name
        if source.is_dir():
            shutil.copytree(source, to, ignore=ignore, dirs_exist_ok=True)
        else:
            to.parent.mkdir(exist_ok=True)
            shutil.copy(source, to)
    shutil.copy(ROOT / "benchmarks/gpu/check.py", folder / "check.py")


def add_case(folder: Path, case: Network | Layer, target: str) -> None:
    """A compiled network, and for networks its input and output in float32."""
    if isinstance(case, Layer):
        module, x = case.module(), torch.zeros(case.pixels, case.inputs)
    else:
        module, x = zoo.build_torch(case.name, case.variant)
        x = torch.cat([x.roll(n, -1) for n in range(case.batch)])
    net = tvm_pivot.build(
        module, target=target, precision=case.precision, example_inputs=(x,), pivot_seconds=0
    )
    net.export(folder / f"{case.key}.pivot")
    if isinstance(case, Network):
        # The first image and the last: the ones between are as right as these.
        with torch.no_grad():
            ends = torch.cat([x[:1], x[-1:]])
            expected = module(ends).numpy()
        np.savez_compressed(folder / f"{case.key}.npz", x=ends.numpy(), y=expected)


if __name__ == "__main__":
    main()
