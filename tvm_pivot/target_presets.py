"""The machines that targets are named after, one line each.

Caches and rates are those of the makers' public documents: Arm's technical reference manuals and
software optimization guides, Intel's and AMD's optimization manuals. Where a maker lets the size
of a cache be chosen, it is that of the most common board or phone. A core whose vector unit takes
two cycles for 128 bits counts as one multiply-add per cycle.
"""

from __future__ import annotations

from typing import Any

from .target_record import PivotTarget

_KIB, _MIB = 1 << 10, 1 << 20


def _x86(name: str, mcpu: str, lanes: int, registers: int, **more: Any) -> PivotTarget:
    caches = {"l1_bytes": 32 * _KIB, "l2_bytes": 1 * _MIB, **more}
    return PivotTarget(name, "x86", {"kind": "llvm", "mcpu": mcpu}, lanes, registers, **caches)


def _arm(
    name: str,
    mcpu: str,
    l1_kib: int,
    l2_kib: int,
    *,
    triple: str = "aarch64-linux-gnu",
    registers: int = 32,
    attributes: tuple[str, ...] = (),
    **more: Any,
) -> PivotTarget:
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": mcpu}
    if attributes:
        spec["mattr"] = list(attributes)
    caches = {"l1_bytes": l1_kib * _KIB, "l2_bytes": l2_kib * _KIB}
    rates = {"fma_per_cycle": 2.0, "fma_latency": 4.0, "load_cycles": (0.2, 2.0), **more}
    blocks = {"block_rows": (8, 4, 2, 1)}
    return PivotTarget(name, "arm", spec, 4, registers, **caches, **rates, **blocks)


# Cores that issue in order, and an out-of-order one with half the rate of its successors.
_A53 = {"fma_per_cycle": 1.0, "fma_latency": 8.0, "load_cycles": (1.0, 6.0), "in_order": True}
_A55 = {**_A53, "fma_latency": 4.0, "load_cycles": (0.8, 5.0)}
_A72 = {"fma_per_cycle": 1.0, "fma_latency": 7.0}
_WIDE = {"fma_per_cycle": 4.0, "load_cycles": (0.1, 1.4)}

_TARGETS = (
    _x86("x86-avx2", "haswell", 8, 16, l2_bytes=256 * _KIB),
    _x86("x86-avx512", "skylake-avx512", 16, 32),
    _x86("haswell", "haswell", 8, 16, l2_bytes=256 * _KIB),
    _x86("skylake-avx512", "skylake-avx512", 16, 32),
    _x86("sapphire-rapids", "sapphirerapids", 16, 32, l1_bytes=48 * _KIB, l2_bytes=2 * _MIB),
    _x86("zen2", "znver2", 8, 16, l2_bytes=512 * _KIB),
    _x86("zen4", "znver4", 16, 32),
    # Every 64-bit Arm processor runs code for the Cortex-A72.
    _arm("arm", "cortex-a72", 32, 512, cores=4),
    _arm("cortex-a53", "cortex-a53", 32, 512, **_A53),
    _arm("cortex-a55", "cortex-a55", 32, 128, **_A55),
    _arm("cortex-a72", "cortex-a72", 32, 1024, **_A72),
    _arm("cortex-a76", "cortex-a76", 64, 512),
    _arm("cortex-x1", "cortex-x1", 64, 1024, **_WIDE),
    _arm("neoverse-n1", "neoverse-n1", 64, 1024),
    _arm("neoverse-v1", "neoverse-v1", 64, 1024, **_WIDE),
    _arm("apple-m1", "apple-m1", 128, 12 * 1024, **_WIDE),  # of Linux on such a machine
    _arm("raspberry-pi-3", "cortex-a53", 32, 512, cores=4, **_A53),
    _arm("raspberry-pi-4", "cortex-a72", 32, 1024, cores=4, **_A72),
    _arm("raspberry-pi-5", "cortex-a76", 64, 512, cores=4),
    _arm("android-arm64", "cortex-a72", 32, 256, triple="aarch64-linux-android", cores=4),
    _arm(
        "armv7-neon",
        "cortex-a7",
        32,
        512,
        triple="armv7a-linux-gnueabihf",
        registers=16,
        attributes=("+neon", "+vfp4"),
        cores=4,
        **_A53,
    ),
    PivotTarget(
        "cuda",
        "cuda",
        {"tag": "nvidia/nvidia-h100"},
        lanes=32,
        registers=255,
        l1_bytes=228 * _KIB,
        l2_bytes=50 * _MIB,
        block_rows=(16, 32, 8),
        has_schedules=False,
    ),
)

PRESETS: dict[str, PivotTarget] = {target.name: target for target in _TARGETS}
