"""The machine a comparison ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from .results import Machine

# What the processor's flags are called in /proc/cpuinfo -> the name to show; what decides how
# fast fp32 and bf16 arithmetic is.
_FEATURES = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "bf16",
}
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> Machine:
    """This machine: its processor, the physical cores this process may use, its memory."""
    fields = _processor(_CPUINFO.read_text() if _CPUINFO.exists() else "")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Machine(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=_cores(),
        features=tuple(name for flag, name in _FEATURES.items() if flag in flags),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _processor(text: str) -> dict[str, str]:
    """The fields of the first processor in the text of /proc/cpuinfo."""
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    usable = usable or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)
