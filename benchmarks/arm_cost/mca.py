"""Cycles of blocks of code on LLVM's model of a core, by llvm-mca.

A block is modelled as if it ran again and again, with all data in the level-1 cache, no branch
mispredicted and instructions always there in time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache

from .cores import ArmCostError

VERSION = "19"
"""Models change between LLVM's versions: numbers of two of them cannot be compared."""

_TRIPLE = "-triple=aarch64-linux-gnu"
_BLOCKS_PER_CALL = 256
# Blocks up to so many instructions, and how often they run: long ones are slow to simulate, and
# the filling of the pipeline counts little there.
_ITERATIONS = ((16, 400), (64, 100), (1 << 30, 30))
_known: dict[tuple[str, str], float] = {}


def cycles(codes: Iterable[str], model: str) -> dict[str, float]:
    """Cycles of one run of each block.

    Args:
        codes: blocks as in `Block.code`.
        model: an LLVM processor.

    Raises:
        ArmCostError: llvm-mca is not installed, or there is an instruction it does not know.
    """
    codes = list(dict.fromkeys(codes))
    missing = [code for code in codes if (model, code) not in _known]
    least = 0
    for most, iterations in _ITERATIONS:
        group = [code for code in missing if least < len(code) // 8 <= most]
        least = most
        for i in range(0, len(group), _BLOCKS_PER_CALL):
            some = group[i : i + _BLOCKS_PER_CALL]
            for code, found in zip(some, _simulate(some, model, iterations), strict=True):
                _known[model, code] = found
    return {code: _known[model, code] for code in codes}


@cache
def multiply_adds_per_cycle(model: str) -> float:
    """Vector multiply-adds of four floats that a core's model starts per cycle.

    The limit of kernels: 24 of them that do not wait for each other, in a loop.
    """
    fmla = [
        f"{0x4F9F13C0 + register:08x}" for register in range(24)
    ]  # fmla vN.4s, v30.4s, v31.s[0]
    return len(fmla) / cycles(["".join(fmla)], model)["".join(fmla)]


def disassemble(codes: Sequence[str]) -> list[list[str]]:
    """The assembly lines of some blocks."""
    words = [code[i : i + 8] for code in codes for i in range(0, len(code), 8)]
    little_endian = (" ".join(f"0x{word[i : i + 2]}" for i in (6, 4, 2, 0)) for word in words)
    out = _run(["llvm-mc", "--disassemble", _TRIPLE, "-mattr=+all"], "\n".join(little_endian))
    lines = [line.strip() for line in out.splitlines() if line.startswith("\t")]
    lines = [line for line in lines if not line.startswith(".")]
    if len(lines) != len(words):
        raise ArmCostError(f"llvm-mc knows {len(lines)} of {len(words)} instructions")
    left = iter(lines)
    return [[next(left) for _ in range(len(code) // 8)] for code in codes]


def _simulate(codes: Sequence[str], model: str, iterations: int) -> list[float]:
    regions = []
    for number, lines in enumerate(disassemble(codes)):
        regions += [f"# LLVM-MCA-BEGIN {number}", *lines, f"# LLVM-MCA-END {number}"]
    command = ["llvm-mca", f"-m{_TRIPLE[1:]}", f"-mcpu={model}", "-mattr=+all", "--json"]
    # Calls are blocks of their own here, not the opaque 100 cycles that llvm-mca assumes.
    command += ["-call-latency=1", "-skip-unsupported-instructions=any", "-instruction-info=false"]
    command += ["-resource-pressure=false", f"-iterations={iterations}"]
    return parse(_run(command, "\n".join(regions) + "\n"), len(codes))


def parse(text: str, count: int) -> list[float]:
    """Cycles per iteration of each region, from llvm-mca's JSON.

    Raises:
        ArmCostError: the regions ``0 ... count-1`` are not all there.
    """
    try:
        regions = {int(r["Name"]): r["SummaryView"] for r in json.loads(text)["CodeRegions"]}
        return [regions[i]["TotalCycles"] / regions[i]["Iterations"] for i in range(count)]
    except (ValueError, KeyError, TypeError) as e:
        raise ArmCostError(f"llvm-mca answered something else: {e!r}: {text[:200]!r}") from e


def _run(command: Sequence[str], text: str) -> str:
    program = shutil.which(f"{command[0]}-{VERSION}")
    if program is None:
        raise ArmCostError(f"{command[0]}-{VERSION} is missing: apt-get install llvm-{VERSION}")
    done = subprocess.run([program, *command[1:]], input=text, capture_output=True, text=True)
    if done.returncode:
        raise ArmCostError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout
