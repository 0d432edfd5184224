"""The machines that targets are named after, one line each.

Caches and rates are those of the makers' public documents: Arm's technical reference manuals and
software optimization guides, Intel's and AMD's optimization manuals. Where a maker lets the size
of a cache be chosen, it is that of the most common board or phone. A core whose vector unit takes
two cycles for 128 bits counts as one multiply-add per cycle.
"""

from __future__ import annotations

from typing import Any

from .target_record import WARP, Gpu, PivotTarget

_KIB, _MIB = 1 << 10, 1 << 20
# Blocks of 16 rows leave no registers for a second vector of 4 pixels.
_ROWS = (8, 4, 2, 1)


def _x86(name: str, mcpu: str, lanes: int, registers: int, **more: Any) -> PivotTarget:
    caches: dict[str, Any] = {"l1_bytes": 32 * _KIB, "l2_bytes": 1 * _MIB, **more}
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
    float_abi: str = "",
    **more: Any,
) -> PivotTarget:
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": mcpu}
    if attributes:
        spec["mattr"] = list(attributes)
    if float_abi:
        spec["mfloat-abi"] = float_abi
    rates: dict[str, Any] = {"fma_per_cycle": 2.0, "fma_latency": 4.0, "load_cycles": (0.2, 2.0)}
    rates |= more
    caches = (l1_kib * _KIB, l2_kib * _KIB)
    return PivotTarget(name, "arm", spec, 4, registers, *caches, block_rows=_ROWS, **rates)


def _cuda(name: str, gpu: Gpu, l2_bytes: int) -> PivotTarget:
    spec = {
        "kind": "cuda",
        "arch": gpu.arch,
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 48 << 10,
        "thread_warp_size": WARP,
        "registers_per_block": 1 << 16,
        # Code for the host only starts kernels: any x86-64 will do.
        "host": {"kind": "llvm", "mcpu": "x86-64"},
    }
    return PivotTarget(
        name,
        "cuda",
        spec,
        lanes=WARP,
        registers=255,
        l1_bytes=gpu.shared_bytes,
        l2_bytes=l2_bytes,
        block_rows=(16, 32, 8, 4, 2, 1),
        gpu=gpu,
    )


# Cores that issue in order, and an out-of-order one with half the rate of its successors.
_A53: dict[str, Any] = {
    "fma_per_cycle": 1.0,
    "fma_latency": 8.0,
    "load_cycles": (1.0, 6.0),
    "in_order": True,
}
_A55: dict[str, Any] = {**_A53, "fma_latency": 4.0, "load_cycles": (0.8, 5.0)}
_A72: dict[str, Any] = {"fma_per_cycle": 1.0, "fma_latency": 7.0}
_WIDE: dict[str, Any] = {"fma_per_cycle": 4.0, "load_cycles": (0.1, 1.4)}

_TARGETS = (
    _x86("x86-avx2", "haswell", 8, 16, l2_bytes=256 * _KIB),
    _x86("x86-avx512", "skylake-avx512", 16, 32),
    _x86("haswell", "haswell", 8, 16, l2_bytes=256 * _KIB),
    _x86("alder-lake", "alderlake", 8, 16, l1_bytes=48 * _KIB, l2_bytes=1280 * _KIB),
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
        float_abi="hard",
        cores=4,
        **_A53,
    ),
    _cuda("cuda-sm75", Gpu("sm_75", 40, 1.35, 64, 512, 320.0, 1200.0, 64 << 10), 4 << 20),
    _cuda("cuda-sm80", Gpu("sm_80", 108, 1.41, 64, 1024, 1555.0, 4500.0, 164 << 10), 40 << 20),
    _cuda("cuda-sm86", Gpu("sm_86", 72, 1.5, 128, 512, 600.0, 2200.0, 100 << 10), 6 << 20),
    _cuda("cuda-sm89", Gpu("sm_89", 128, 2.3, 128, 512, 1008.0, 5000.0, 100 << 10), 72 << 20),
    _cuda("cuda-sm90", Gpu("sm_90", 132, 1.7, 128, 2048, 3350.0, 5500.0, 228 << 10), 50 << 20),
    _cuda("t4", Gpu("sm_75", 40, 1.35, 64, 512, 320.0, 1200.0, 64 << 10), 4 << 20),
    _cuda("a100", Gpu("sm_80", 108, 1.41, 64, 1024, 1555.0, 4500.0, 164 << 10), 40 << 20),
    _cuda("a10", Gpu("sm_86", 72, 1.5, 128, 512, 600.0, 2200.0, 100 << 10), 6 << 20),
    _cuda("rtx-3090", Gpu("sm_86", 82, 1.7, 128, 256, 936.0, 3000.0, 100 << 10), 6 << 20),
    _cuda("rtx-4090", Gpu("sm_89", 128, 2.5, 128, 256, 1008.0, 5000.0, 100 << 10), 72 << 20),
    _cuda("l4", Gpu("sm_89", 58, 1.7, 128, 512, 300.0, 2200.0, 100 << 10), 48 << 20),
    _cuda("h100", Gpu("sm_90", 132, 1.7, 128, 2048, 3350.0, 5500.0, 228 << 10), 50 << 20),
)

PRESETS: dict[str, PivotTarget] = {target.name: target for target in _TARGETS}
