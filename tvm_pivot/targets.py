"""Targets as data: what a user names, this machine as one, and what machines can run."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import replace

from .errors import UnsupportedTargetError
from .target_presets import PRESETS
from .target_record import PRECISIONS, WARP, Gpu, PivotTarget

__all__ = [
    "PRECISIONS",
    "PRESETS",
    "WARP",
    "Gpu",
    "PivotTarget",
    "cannot_run",
    "detect_host",
    "missing_features",
    "needed_features",
    "resolve",
]

_CACHES = "/sys/devices/system/cpu/cpu0/cache"


def _cache_bytes(level: int, default: int) -> int:
    """Data cache of one core as Linux reports it; `default` where it does not."""
    for entry in sorted(os.listdir(_CACHES)) if os.path.isdir(_CACHES) else []:
        try:
            with open(f"{_CACHES}/{entry}/level") as f, open(f"{_CACHES}/{entry}/type") as g:
                if int(f.read()) != level or g.read().strip() == "Instruction":
                    continue
            with open(f"{_CACHES}/{entry}/size") as f:
                size = f.read().strip()
            unit = {"K": 10, "M": 20}[size[-1]]
            return int(size[:-1]) << unit
        except (OSError, ValueError, LookupError):
            continue
    return default


# Instruction sets LLVM uses by itself for arithmetic. CPU descriptions list others too (sgx, pku,
# clzero, ...) which code like ours never contains and which virtual machines often hide.
_USED_BY_CODE = ("sse", "ssse", "avx", "fma", "f16c", "bmi", "lzcnt", "movbe", "popcnt", "gfni")
# What Linux calls them, apart from dots and underscores.
_LINUX_NAMES = {"sse3": "pni", "bmi": "bmi1", "lzcnt": "abm"}


# Those of 64-bit Arm, and the bits by which Linux tells them: of AT_HWCAP, from 64 on of AT_HWCAP2.
_ARM_BITS = {
    "neon": 1,
    "lse": 8,
    "fullfp16": 10,
    "rdm": 12,
    "jsconv": 13,
    "complxnum": 14,
    "rcpc": 15,
    "dotprod": 20,
    "sve": 22,
    "fp16fml": 23,
    "sve2": 64 + 1,
    "i8mm": 64 + 13,
    "bf16": 64 + 14,
}
_AT_HWCAP, _AT_HWCAP2 = 16, 26


def needed_features(target: PivotTarget) -> tuple[str, ...]:
    """Instruction sets that code for `target` may contain, by LLVM's names."""
    import tvm

    if target.family == "cuda":
        return ()
    spec = {key: target.tvm[key] for key in ("kind", "mcpu", "mtriple") if key in target.tvm}
    listed = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(spec))
    needed = {str(name) for name in listed}
    if target.family == "x86":
        needed &= set(map(str, tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()))
    for change in target.tvm.get("mattr", ()):
        (needed.add if change[0] == "+" else needed.discard)(change[1:])
    if target.family == "arm":
        return tuple(sorted(needed & _ARM_BITS.keys()))
    return tuple(sorted(f for f in needed if f.startswith(_USED_BY_CODE)))


def missing_features(needed: Iterable[str]) -> tuple[str, ...]:
    """Those instruction sets that this machine cannot run, x86 or Arm as they are.

    What a CPU model has and what the machine offers differ: a virtual machine may hide
    AVX-512 and still report the model's name.
    """
    if machine_name() == "aarch64":
        return tuple(sorted(set(needed) - _arm_features()))
    offered = _linux_features()
    doubtful = [f for f in needed if _LINUX_NAMES.get(f, _plain(f)) not in offered]
    if not doubtful:
        return ()  # without TVM's compiler, which takes a second to load
    import tvm

    host = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    return tuple(sorted(f for f in doubtful if not host.get(f, False)))


def machine_name() -> str:
    """The kind of this machine's processor, by one name each: ``x86_64``, ``aarch64``, ..."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def cannot_run(target: PivotTarget) -> str | None:
    """Why no code for `target` runs on this kind of machine; None if some does."""
    needs = {"x86": "x86_64", "arm": "aarch64", "cuda": "x86_64"}[target.family]
    if target.tvm.get("mtriple", "").startswith("armv7"):
        needs = "armv7l"
    if machine_name() == needs:
        return None
    kind = f"target {target.name!r} ({target.family}, {needs})"
    return f"made for {kind}, which this {machine_name()} machine cannot run"


def _arm_features() -> frozenset[str]:
    """What Linux says this 64-bit Arm processor offers."""
    try:
        ask = ctypes.CDLL(None).getauxval
    except AttributeError:  # not Linux: every machine with another system has these
        return frozenset(_ARM_BITS) - {"sve", "sve2", "i8mm", "bf16"}
    ask.restype, ask.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    bits = int(ask(_AT_HWCAP)) | int(ask(_AT_HWCAP2)) << 64
    return frozenset(name for name, bit in _ARM_BITS.items() if bits >> bit & 1)


def _plain(name: str) -> str:
    return name.replace(".", "").replace("_", "")


def _linux_features() -> frozenset[str]:
    """The flags of this machine's CPU as Linux reports them; none elsewhere."""
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(map(_plain, flags.partition(":")[2].split()))


def _lacks(target: PivotTarget) -> bool:
    return bool(missing_features(needed_features(target)))


def detect_host() -> PivotTarget:
    """This machine as a target.

    Raises:
        UnsupportedTargetError: the host is not x86-64, or lacks AVX2.
    """
    import tvm

    if machine_name() != "x86_64":
        raise UnsupportedTargetError(
            f"target 'x86' needs an x86-64 host; this one is {machine_name()}"
        )
    mcpu = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    presets = (PRESETS["x86-avx512"], PRESETS["x86-avx2"])
    base = next((preset for preset in presets if not _lacks(preset)), None)
    if base is None:
        raise UnsupportedTargetError(f"this CPU ({mcpu}) has no AVX2, which target 'x86' needs")
    host = {"kind": "llvm", "mcpu": mcpu}
    if _lacks(replace(base, tvm=host)):  # hidden by a virtual machine
        host = base.tvm
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return replace(
        base,
        name="x86",
        tvm=host,
        cores=cores or 1,
        l1_bytes=_cache_bytes(1, base.l1_bytes),
        l2_bytes=_cache_bytes(2, base.l2_bytes),
    )


def resolve(target: str | PivotTarget) -> PivotTarget:
    """The target a user means: a record as it is, a preset's name, ``"x86"`` for this host, or
    ``"cuda"`` for any GPU from sm_80 on.

    Raises:
        UnsupportedTargetError: the name is unknown; the message lists the known ones.
    """
    if isinstance(target, PivotTarget):
        return target
    if target == "x86":
        return detect_host()
    if target == "cuda":
        return replace(PRESETS["cuda-sm80"], name="cuda")
    if target not in PRESETS:
        raise UnsupportedTargetError(
            f"unknown target {target!r}; known: {', '.join(['x86', 'cuda', *sorted(PRESETS)])}"
        )
    return PRESETS[target]
