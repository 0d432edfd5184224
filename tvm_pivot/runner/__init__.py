"""A program in C++ that runs exported networks on machines without Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("run.cc")
_LIBRARIES = ("tvm_runtime", "tvm_runtime_extra", "tvm_ffi")


def compile_command(
    output: Path,
    *,
    libraries: Sequence[Path] = (),
    headers: Path | None = None,
    compiler: str = "g++",
) -> list[str]:
    """The command that compiles the runner.

    Args:
        output: the program to write.
        libraries: folders with TVM's runtime for the machine that the program is for; default:
            those of the installed wheels.
        headers: of `tvm_ffi`; default: those of the installed wheel. They fit every machine.
        compiler: for that machine.
    """
    import importlib.util

    def folder(package: str) -> Path:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed")
        return Path(found.origin).parent

    headers = headers or folder("tvm_ffi") / "include"
    libraries = libraries or (folder("tvm") / "lib", folder("tvm_ffi") / "lib")
    flags = [f"-Wl,-rpath,{one},-rpath-link,{one}" for one in libraries]
    places = [f"-L{one}" for one in libraries]
    named = [f"-l{name}" for name in _LIBRARIES]
    source = ["-std=c++17", "-O2", f"-isystem{headers}", str(SOURCE), "-o", str(output)]
    return [compiler, *source, *places, "-Wl,--no-as-needed", *named, *flags]
