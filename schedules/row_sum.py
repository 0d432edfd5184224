"""The ragged sum of a planes kernel with one row per block, as a function that LLVM inlines.

Such a sum does little but load: per entry an index, a weight and P vectors of the input row that
the index names. A processor issues the loads that are ready oldest first. Right before its vectors,
an index waits behind those of the entries before it; then all units wait for the index. So indices
are loaded a few entries ahead and wait in registers, which TIR cannot say. Few vectors are added up
in several chains, or all units wait for the last sum. The loop is not unrolled and has no rest:
runs are short, and the end of a loop is a jump that is hard to foresee.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .prefetch import LINE_BYTES, prefetch_function

# Indices that wait in registers.
AHEAD = 4
# Multiply-adds that are under way together, at most.
IN_FLIGHT = 8


def chains_of(vectors: int) -> int:
    """In how many chains so many vectors are added up: a power of two up to `AHEAD`."""
    chains = 1
    while chains < AHEAD and 4 * chains * vectors < 3 * IN_FLIGHT:
        chains *= 2
    return chains


@dataclass(frozen=True)
class RowSum:
    """``acc[v] += weight[e] * x[index[e], v]`` over entries e, for vectors v of the input.

    The number of entries is a multiple of the chains. `AHEAD` indices behind them are loaded, too.

    Attributes:
        vectors: of the accumulators.
        lanes: floats of each.
        step: floats between two values of the index.
        carried: the indices that wait when the sum ends are those of the next one, which begins
            with its entries right behind.
        ahead: fetch weights and indices that lie so many entries further on; 0: none.
    """

    vectors: int
    lanes: int
    step: int = 1
    carried: bool = False
    ahead: int = 0

    @property
    def name(self) -> str:
        """The function: its arguments are pointers to the accumulators, to the weights and indices
        of the first entry, and to the inputs at index 0, and the number of entries; if carried,
        a pointer to the waiting indices follows.
        """
        more = "_carried" * self.carried + f"_{self.ahead}" * (self.ahead > 0)
        return f"row_sum_{self.vectors}x{self.lanes}_{self.step}{more}"

    @property
    def _kind(self) -> str:
        return f"<{self.lanes} x float>"

    @property
    def _multiply(self) -> str:
        return f"@llvm.fmuladd.v{self.lanes}f32"

    def llvm(self) -> str:
        """The function in LLVM's language."""
        kind, held = self._kind, ", ptr noalias %held" * self.carried
        pointers = ", ".join(f"ptr noalias %{name}" for name in ("acc", "weight", "index", "x"))
        lines = [
            f"declare {kind} {self._multiply}({kind}, {kind}, {kind})",
            f"define linkonce_odr void @{self.name}({pointers}, i32 %count{held})",
            "alwaysinline nounwind {",
            *self._begin(),
            *self._loop(),
            *self._end(),
            "ret void",
            "}",
            "!0 = distinct !{!0, !1}",
            '!1 = !{!"llvm.loop.unroll.disable"}',
            "",
        ]
        return prefetch_function(2) * (self.ahead > 0) + "\n".join(lines)

    def _begin(self) -> Iterator[str]:
        yield "begin:"
        yield "%entries = zext i32 %count to i64"
        for i in range(AHEAD):
            waiting = "%held" if self.carried else "%index"
            yield f"%at{i} = getelementptr i32, ptr {waiting}, i64 {i}"
            yield f"%first{i} = load i32, ptr %at{i}, align 4"
        for v in range(self.vectors):
            yield f"%to{v} = getelementptr {self._kind}, ptr %acc, i64 {v}"
            yield f"%start{v} = load {self._kind}, ptr %to{v}, align 4"
        if self.ahead:
            yield from self._fetch()
        yield "br label %loop"

    def _fetch(self) -> Iterator[str]:
        """Fetch what a later sum takes, once per sum: more often it costs more than it saves.

        Sums of few vectors are long, for columns are cut to fill level 1.
        """
        for name in ("weight", "index"):
            for line in range(chains_of(self.vectors)):
                later = 4 * self.ahead + line * LINE_BYTES
                yield f"%{name}_later{line} = getelementptr i8, ptr %{name}, i64 {later}"
                yield f"call void @pivot_prefetch_level2(ptr %{name}_later{line})"

    def _loop(self) -> Iterator[str]:
        """Entry e, of which the index is held at place 0, and those of the other chains."""
        kind, chains = self._kind, chains_of(self.vectors)
        yield "loop:"
        yield "%e = phi i64 [0, %begin], [%following, %step]"
        for i in range(AHEAD):
            yield f"%held{i} = phi i32 [%first{i}, %begin], [%held{i + chains}, %step]"
        for c in range(chains):
            for v in range(self.vectors):
                start = "zeroinitializer" if c else f"%start{v}"
                yield f"%a{c}.{v} = phi {kind} [{start}, %begin], [%b{c}.{v}, %step]"
        yield "%more = icmp ult i64 %e, %entries"
        yield "br i1 %more, label %step, label %end"
        yield "step:"
        yield f"%following = add nuw nsw i64 %e, {chains}"
        for i in range(AHEAD, AHEAD + chains):
            yield f"%e{i} = add nuw nsw i64 %e, {i}"
            yield f"%at{i} = getelementptr i32, ptr %index, i64 %e{i}"
            # Volatile, or LLVM loads it where it is used.
            yield f"%held{i} = load volatile i32, ptr %at{i}, align 4"
        for c in range(chains):
            yield from self._entry(c)
        yield "br label %loop, !llvm.loop !0"

    def _entry(self, c: int) -> Iterator[str]:
        """Add the products of the entry whose index is held at place c to chain c."""
        kind, zeros = self._kind, f"<{self.lanes} x i32> zeroinitializer"
        yield f"%weight{c} = add nuw nsw i64 %e, {c}"
        yield f"%where{c} = getelementptr float, ptr %weight, i64 %weight{c}"
        yield f"%w{c} = load float, ptr %where{c}, align 4"
        yield f"%one{c} = insertelement {kind} poison, float %w{c}, i64 0"
        yield f"%all{c} = shufflevector {kind} %one{c}, {kind} poison, {zeros}"
        yield f"%row{c} = sext i32 %held{c} to i64"
        yield f"%offset{c} = mul nsw i64 %row{c}, {self.step}"
        yield f"%input{c} = getelementptr float, ptr %x, i64 %offset{c}"
        for v in range(self.vectors):
            yield f"%p{c}.{v} = getelementptr {kind}, ptr %input{c}, i64 {v}"
            yield f"%x{c}.{v} = load {kind}, ptr %p{c}.{v}, align 4"
            values = f"{kind} %all{c}, {kind} %x{c}.{v}, {kind} %a{c}.{v}"
            yield f"%b{c}.{v} = call {kind} {self._multiply}({values})"

    def _end(self) -> Iterator[str]:
        """All chains added up."""
        yield "end:"
        for i in range(AHEAD if self.carried else 0):
            yield f"store i32 %held{i}, ptr %at{i}, align 4"
        for v in range(self.vectors):
            total = f"%a0.{v}"
            for c in range(1, chains_of(self.vectors)):
                yield f"%t{c}.{v} = fadd {self._kind} {total}, %a{c}.{v}"
                total = f"%t{c}.{v}"
            yield f"store {self._kind} {total}, ptr %to{v}, align 4"
