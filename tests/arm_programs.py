"""C programs for aarch64 whose instructions are known, and what is needed to run them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.arm_cost.emulator import compiled
from benchmarks.arm_cost.mca import VERSION

NEEDED = {
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    f"llvm-mca-{VERSION}": f"llvm-{VERSION}",
}
MISSING = [package for program, package in NEEDED.items() if shutil.which(program) is None]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# `add_up` runs a loop of three instructions, `copy` one of five with a load and a store.
LOOPS = r"""
#include <stdlib.h>
static long words[1 << 18];
__attribute__((noinline)) long add_up(long n)
{
    long sum = 0;
    __asm__ volatile("1: add %0, %0, %1\n subs %1, %1, #1\n b.ne 1b\n"
                     : "+r"(sum), "+r"(n) : : "cc");
    return sum;
}
__attribute__((noinline)) void copy(long *p, long n, long step)
{
    long x;
    __asm__ volatile("1: ldr %0, [%1]\n str %0, [%1]\n add %1, %1, %3\n subs %2, %2, #1\n b.ne 1b\n"
                     : "=&r"(x), "+r"(p), "+r"(n) : "r"(step) : "cc", "memory");
}
int main(int argc, char **argv)
{
    long sum = 0, n = atol(argv[2]), bytes = atol(argv[3]);
    for (int run = atoi(argv[1]); run; run--) {
        sum += add_up(n);
        copy(words, bytes / 64, 64);
    }
    return argc < 4 || !sum;
}
"""


def loops(folder: Path) -> Path:
    """The program ``loops RUNS N BYTES``: each run adds N numbers and goes through BYTES."""
    source = folder / "loops.c"
    source.write_text(LOOPS)
    return compiled(("aarch64-linux-gnu-gcc", "-O2", "-static"), source, "")
