"""What the compiler has to know about a machine: one frozen record."""

from __future__ import annotations

from dataclasses import dataclass, field
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
        in_order: the core waits for a load that is used at once, and for all behind it.
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
    in_order: bool = False
    has_schedules: bool = True

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
