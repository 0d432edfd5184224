"""What the compiler has to know about a machine: one frozen record."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import UnsupportedTargetError

# Threads of a warp.
WARP = 32
PRECISIONS = ("float32", "float16", "bfloat16", "tf32")


@dataclass(frozen=True)
class Gpu:
    """What the schedules of a GPU target have to know about it, from its data sheet.

    Attributes:
        arch: the compute capability, e.g. ``"sm_80"``.
        multiprocessors: of the whole chip.
        clock_ghz: of the multiprocessors, under load.
        fp32_lanes: multiply-adds of one multiprocessor per clock.
        tensor_fma: the same on tensor cores, float16 with sums in float32, without sparsity.
        memory_gbs, l2_gbs: bandwidths of device memory and of the level-2 cache.
        shared_bytes: shared memory of one multiprocessor.
    """

    arch: str
    multiprocessors: int
    clock_ghz: float
    fp32_lanes: int
    tensor_fma: int
    memory_gbs: float
    l2_gbs: float
    shared_bytes: int

    @property
    def capability(self) -> int:
        """The number of `arch`: 80 for ``"sm_80"``, 90 for ``"sm_90a"``.

        Raises:
            ValueError: `arch` is no compute capability.
        """
        found = re.fullmatch(r"sm_(\d+)[af]?", self.arch)
        if found is None:
            raise ValueError(f"{self.arch!r} is no compute capability such as 'sm_80'")
        return int(found[1])


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
        in_order: the core waits for a load that is used at once, and for all behind it.
        has_schedules: False where only the description exists so far.
        precision: how weights are kept, and what layers hand on: one of `PRECISIONS`; ``"tf32"``
            is float32 whose leading 11 bits tensor cores may multiply. Sums are float32 on GPUs,
            and of that precision, for some products at a time, on CPUs.
        gpu: the GPU, for ``"cuda"``.
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
    in_order: bool = False
    has_schedules: bool = True
    precision: str = "float32"
    gpu: Gpu | None = None

    @property
    def storage(self) -> str:
        """The dtype of weights and of what layers hand on."""
        return "float32" if self.precision == "tf32" else self.precision

    @property
    def stored_lanes(self) -> int:
        """Elements in one vector register of what layers hand on, on a CPU."""
        return 2 * self.lanes if self.precision == "float16" else self.lanes

    def with_precision(self, precision: str) -> PivotTarget:
        """This target, computing in one of `PRECISIONS`.

        Raises:
            UnsupportedTargetError: the precision is unknown, or this target does not have it.
        """
        if precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise UnsupportedTargetError(f"unknown precision {precision!r}; known: {known}")
        halves = precision == "float16" and self._multiplies_halves()
        if precision != "float32" and self.family != "cuda" and not halves:
            newer = " or an ARM core with arithmetic for it, from the Cortex-A55 on"
            raise UnsupportedTargetError(
                f"target {self.name!r} does not compute in {precision}, which needs a CUDA target"
                + newer * (precision == "float16")
            )
        late = precision in ("bfloat16", "tf32")
        if late and self.gpu is not None and self.gpu.capability < 80:
            raise UnsupportedTargetError(
                f"target {self.name!r} is {self.gpu.arch}, which has no {precision} (sm_80 and "
                "later have it): use float16 or float32"
            )
        return replace(self, precision=precision)

    def _multiplies_halves(self) -> bool:
        """Whether LLVM knows the CPU to have arithmetic for vectors of float16."""
        import tvm

        if self.family != "arm":
            return False
        spec = {key: self.tvm[key] for key in ("kind", "mcpu", "mtriple") if key in self.tvm}
        listed = tvm.get_global_func("target.llvm_get_cpu_features")(tvm.target.Target(spec))
        return "fullfp16" in {*map(str, listed)}

    def require_schedules(self) -> PivotTarget:
        """Return self, or raise UnsupportedTargetError where no schedules exist yet."""
        if not self.has_schedules:
            from .target_presets import PRESETS  # which is made of these records

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
