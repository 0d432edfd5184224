"""Targets as data: what the compiler has to know about a machine, in one frozen record each."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import UnsupportedTargetError


@dataclass(frozen=True)
class PivotTarget:
    """A machine to compile for.

    Attributes:
        name: what the user typed, e.g. ``"x86"`` or ``"cortex-a76"``.
        family: the schedule family, ``"x86"``, ``"arm"`` or ``"cuda"``.
        tvm: the TVM target as a plain dict (``kind``, ``mcpu``, ``mtriple``, ...).
        lanes: fp32 elements in one vector register.
        registers: architectural vector registers.
        l1_bytes: level-1 data cache of one core.
        l2_bytes: level-2 cache of one core.
        fma_per_cycle: vector multiply-adds issued per cycle.
        fma_latency: cycles until a multiply-add's result can be added to.
        load_cycles: cycles that a vector load adds to the multiply-adds it overlaps with, from
            level 1 and from level 2.
        cores: cores a network may use when the user does not say.
        block_rows: heights R of R x 1 blocks to consider, best first.
        has_schedules: False where only the description exists so far.
    """

    name: str
    family: str
    tvm: dict[str, Any] = field(hash=False)  # equal targets still hash alike
    lanes: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    fma_per_cycle: float = 2.0
    fma_latency: float = 4.0
    load_cycles: tuple[float, float] = (0.1, 1.4)
    cores: int = 1
    block_rows: tuple[int, ...] = (8, 16, 4, 2, 1)
    has_schedules: bool = True

    def require_schedules(self) -> PivotTarget:
        """Return self, or raise UnsupportedTargetError where no schedules exist yet."""
        if not self.has_schedules:
            ready = ", ".join(sorted(n for n, t in PRESETS.items() if t.has_schedules))
            raise UnsupportedTargetError(
                f"target {self.name!r} is described but has no schedules yet; "
                f"targets that compile today: {ready}"
            )
        return self

    def to_tvm(self) -> Any:
        """The `tvm.target.Target`, with an LLVM `mcpu` that is checked to exist.

        Raises:
            UnsupportedTargetError: LLVM does not know the `mcpu` (TVM would only log it).
        """
        import tvm

        spec = {**self.tvm, "num-cores": self.cores} if self.family != "cuda" else dict(self.tvm)
        mcpu = spec.get("mcpu")
        if spec["kind"] == "llvm" and mcpu is not None:
            triple = spec.get("mtriple") or tvm.get_global_func("target.llvm_get_system_triple")()
            if not tvm.get_global_func("target.llvm_is_valid_cpu")(mcpu, triple):
                raise UnsupportedTargetError(
                    f"target {self.name!r}: LLVM has no CPU named {mcpu!r} for {triple}"
                )
        return tvm.target.Target(spec)


def _x86(name: str, mcpu: str, lanes: int, registers: int, **more: Any) -> PivotTarget:
    caches = {"l1_bytes": 32 << 10, "l2_bytes": 1 << 20, **more}
    return PivotTarget(name, "x86", {"kind": "llvm", "mcpu": mcpu}, lanes, registers, **caches)


def _arm(name: str, mcpu: str, **more: Any) -> PivotTarget:
    spec = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": mcpu}
    caches = {"l1_bytes": 32 << 10, "l2_bytes": 512 << 10, **more}
    return PivotTarget(name, "arm", spec, 4, 32, has_schedules=False, **caches)


PRESETS: dict[str, PivotTarget] = {
    t.name: t
    for t in (
        _x86("x86-avx2", "haswell", 8, 16, l2_bytes=256 << 10),
        _x86("x86-avx512", "skylake-avx512", 16, 32),
        _x86("haswell", "haswell", 8, 16, l2_bytes=256 << 10),
        _x86("skylake-avx512", "skylake-avx512", 16, 32),
        _x86("sapphire-rapids", "sapphirerapids", 16, 32, l1_bytes=48 << 10, l2_bytes=2 << 20),
        _x86("zen2", "znver2", 8, 16, l2_bytes=512 << 10),
        _x86("zen4", "znver4", 16, 32),
        _arm("arm", "cortex-a72"),
        _arm("cortex-a53", "cortex-a53"),
        _arm("cortex-a76", "cortex-a76"),
        PivotTarget(
            "cuda",
            "cuda",
            {"tag": "nvidia/nvidia-h100"},
            lanes=32,
            registers=255,
            l1_bytes=228 << 10,
            l2_bytes=50 << 20,
            block_rows=(16, 32, 8),
            has_schedules=False,
        ),
    )
}


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


def needed_features(target: PivotTarget) -> tuple[str, ...]:
    """Instruction sets that x86 code for `target` may contain, by LLVM's names."""
    import tvm

    if target.family != "x86":
        return ()
    known = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    spec = {key: target.tvm[key] for key in ("kind", "mcpu", "mtriple") if key in target.tvm}
    listed = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(spec))
    needed = {str(name) for name in listed if str(name) in known}
    for change in target.tvm.get("mattr", ()):
        (needed.add if change[0] == "+" else needed.discard)(change[1:])
    return tuple(sorted(f for f in needed if f.startswith(_USED_BY_CODE)))


def missing_features(needed: Iterable[str]) -> tuple[str, ...]:
    """Those instruction sets that this x86 machine cannot run.

    What a CPU model has and what the machine offers differ: a virtual machine may hide
    AVX-512 and still report the model's name.
    """
    offered = _linux_features()
    doubtful = [f for f in needed if _LINUX_NAMES.get(f, _plain(f)) not in offered]
    if not doubtful:
        return ()  # without TVM's compiler, which takes a second to load
    import tvm

    host = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    return tuple(sorted(f for f in doubtful if not host.get(f, False)))


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

    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise UnsupportedTargetError(f"target 'x86' needs an x86-64 host; this one is {machine}")
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
    """The target a user means: a record as it is, ``"x86"`` for this host, or a preset's name.

    Raises:
        UnsupportedTargetError: the name is unknown; the message lists the known ones.
    """
    if isinstance(target, PivotTarget):
        return target
    if target == "x86":
        return detect_host()
    if target not in PRESETS:
        raise UnsupportedTargetError(
            f"unknown target {target!r}; known: {', '.join(['x86', *sorted(PRESETS)])}"
        )
    return PRESETS[target]
