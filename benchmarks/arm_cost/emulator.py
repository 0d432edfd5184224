"""Running aarch64 programs under QEMU, counted or not."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .blocks import Profile, per_run, read
from .cores import ArmCostError, Core

FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "arm_cost"
"""What is built or downloaded is kept here."""

CROSS = Path("/usr/aarch64-linux-gnu")
"""Where Debian's cross compiler has the libraries of aarch64."""

_PLUGIN = Path(__file__).with_name("plugin.c")
_PACKAGES = {
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "gcc": "gcc",
    "setarch": "util-linux",
}
FEW, MANY = 1, 3
"""Runs of the two programs whose difference is the cost of a run."""


@dataclass(frozen=True)
class Emulator:
    """A core with a file system of its own in front of this machine's.

    Attributes:
        core: what runs.
        root: files of aarch64: libraries, and what else shall hide this machine's files.
        environment: variables of the guest, which sees no others.
        timeout: seconds until a program counts as hanging.
    """

    core: Core
    root: Path = CROSS
    environment: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 7200.0

    def run(self, program: Sequence[str | Path], *, stdin: str = "") -> str:
        """Run a program and return what it prints.

        Raises:
            ArmCostError: it fails or hangs; the message is the end of its errors.
        """
        return self._run(program, stdin, ())

    def profile(
        self, program: Sequence[str | Path], *, stdin: str = "", caches: bool = False
    ) -> tuple[Profile, str]:
        """Run a program and return what it executed, and what it printed.

        Args:
            program: an aarch64 executable and its arguments.
            stdin: what it reads.
            caches: count misses of the core's caches too, which takes several times as long.

        Raises:
            ArmCostError: it fails or hangs, or there is no compiler for the plugin.
        """
        with tempfile.TemporaryDirectory(prefix="arm-cost-") as scratch:
            out = Path(scratch, "blocks")
            plugin = f"{plugin_library()},out={out}"
            if caches:
                plugin += f",l1={self.core.l1},l2={self.core.l2}"
            said = self._run(program, stdin, ("-plugin", plugin))
            return read(out), said

    def per_run(
        self,
        program: Callable[[int], Sequence[str | Path]],
        *,
        stdin: Callable[[int], str] = lambda _: "",
        caches: bool = False,
    ) -> tuple[Profile, str]:
        """What one run executes of a program that makes as many runs as it is told.

        Args:
            program: from a number of runs to the command.
            stdin: from a number of runs to what the program reads.
            caches: as in `profile`.

        Returns:
            What a run executes, and what the program with the most runs printed.
        """
        few, _ = self.profile(program(FEW), stdin=stdin(FEW), caches=caches)
        many, said = self.profile(program(MANY), stdin=stdin(MANY), caches=caches)
        return per_run(few, many, MANY - FEW), said

    def _run(self, program: Sequence[str | Path], stdin: str, options: Sequence[str]) -> str:
        # Fixed addresses: else alignment, and with it the ways that code takes, would vary.
        command = [tool("setarch"), "-R", tool("qemu-aarch64"), "-cpu", self.core.emulated]
        variables = {"LC_ALL": "C", **self.environment}
        for name, value in variables.items():
            command += ["-E", f"{name}={value}"]
        command += ["-L", str(self.root), *options, *map(str, program)]
        try:
            done = subprocess.run(
                command,
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                env={"PATH": os.defpath},
            )
        except subprocess.TimeoutExpired as e:
            raise ArmCostError(f"{program[0]} takes more than {self.timeout:.0f} s") from e
        if done.returncode:
            said = (done.stderr or done.stdout).strip()[-1000:]
            raise ArmCostError(f"{program[0]} failed with exit code {done.returncode}: {said}")
        return done.stdout


def tool(name: str) -> str:
    """The path of a program.

    Raises:
        ArmCostError: it is not installed; the message has the Debian package.
    """
    found = shutil.which(name)
    if found is None:
        raise ArmCostError(f"{name} is missing: apt-get install {_PACKAGES.get(name, name)}")
    return found


@cache
def plugin_library() -> Path:
    """The plugin, compiled once for this version of it."""
    return compiled(("gcc", "-O2", "-shared", "-fPIC"), _PLUGIN, ".so")


def run_tool(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run a program of this machine and return what it prints.

    Raises:
        ArmCostError: it is not installed or fails; the message is the end of its errors.
    """
    done = subprocess.run(
        [tool(name), *arguments], cwd=cwd, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        raise ArmCostError(f"{name} failed: {done.stderr.strip()[-1000:]}")
    return done.stdout


def compiled(
    command: Sequence[str], source: Path, suffix: str, *more: str, beside: Sequence[Path] = ()
) -> Path:
    """What a compiler makes of a source file, unless that is there already.

    Args:
        command: the compiler and its options.
        source: the file.
        suffix: of what is made.
        more: options behind the source files.
        beside: more source files, and headers.

    Raises:
        ArmCostError: the compiler is missing, or refuses the file.
    """
    text = b"".join(path.read_bytes() for path in (source, *beside))
    text += "\0".join((*command, *more)).encode()
    sources = [str(path) for path in (source, *beside) if path.suffix != ".h"]
    target = FOLDER / "built" / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        run_tool(*command, *sources, "-o", str(partial), *more)
        partial.replace(target)
    return target
