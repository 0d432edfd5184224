"""The cores whose cost can be told, as data."""

from __future__ import annotations

from dataclasses import dataclass


class ArmCostError(Exception):
    """A tool is missing, or a program failed under emulation; the message says which and why."""


@dataclass(frozen=True)
class Cache:
    """A data cache: bytes, ways, and bytes of a line."""

    size: int
    ways: int
    line: int = 64

    def __str__(self) -> str:
        return f"{self.size}:{self.ways}:{self.line}"


@dataclass(frozen=True)
class Core:
    """A core.

    Attributes:
        name: as in ``tvm_pivot.build(target=...)``.
        model: the LLVM processor whose scheduling model counts the cycles. LLVM 19 has none of
            its own for some cores and lends them that of the Cortex-A57, which fits them badly:
            there it is the relative with the same pipelines.
        emulated: the QEMU processor with the same instructions, or the same but for some that
            code for single precision does not use.
        part: the number in ``/proc/cpuinfo`` by which runtimes choose their kernels.
        features: what ``/proc/cpuinfo`` lists.
        l1: level-1 data cache of a common implementation.
        l2: level-2 cache of the same.
    """

    name: str
    model: str
    emulated: str
    part: int
    features: str
    l1: Cache
    l2: Cache


_V8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_V8_2 = f"{_V8_0} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"

CORES = {
    core.name: core
    for core in (
        Core(
            "cortex-a53",
            "cortex-a53",
            "cortex-a53",
            0xD03,
            _V8_0,
            Cache(32 << 10, 4),
            Cache(512 << 10, 16),
        ),
        Core(
            "cortex-a55",
            "cortex-a55",
            "cortex-a76",
            0xD05,
            _V8_2,
            Cache(32 << 10, 4),
            Cache(128 << 10, 4),
        ),
        Core(
            "cortex-a72",
            "cortex-a72",
            "cortex-a72",
            0xD08,
            _V8_0,
            Cache(32 << 10, 2),
            Cache(1 << 20, 16),
        ),
        Core(
            "cortex-a76",
            "neoverse-n1",
            "cortex-a76",
            0xD0B,
            _V8_2,
            Cache(64 << 10, 4),
            Cache(512 << 10, 8),
        ),
        Core(
            "cortex-x1",
            "neoverse-v1",
            "cortex-a76",
            0xD44,
            _V8_2,
            Cache(64 << 10, 4),
            Cache(1 << 20, 8),
        ),
    )
}


def core_of(name: str) -> Core:
    """The core of a name.

    Raises:
        ArmCostError: there is none; the message lists them.
    """
    if name not in CORES:
        raise ArmCostError(f"unknown core {name!r}; known: {', '.join(CORES)}")
    return CORES[name]
