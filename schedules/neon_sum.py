"""The ragged sum of a planes kernel in assembly, for 64-bit ARM cores that issue in order.

Such a core stands still where a load follows multiply-adds that are not done, so it is best to load
the operands of several entries in one go, and then to multiply. LLVM's scheduler takes such groups
apart. Here they are written as assembly, in a function that LLVM inlines, so that the accumulators
stay in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LANES = 4
REGISTERS = 32
# Where the addresses of a group's inputs are computed: x9, x10, ...
_FIRST_SCRATCH = 9


@dataclass(frozen=True)
class NeonSum:
    """``acc[r, v] += weight[e, r] * x[index[e], v]`` over entries e, for vectors v of 4 floats.

    Attributes:
        rows, vectors: of the accumulators.
        entries: whose operands are loaded before any is multiplied.
        step: floats between two values of the index.
    """

    rows: int
    vectors: int
    entries: int
    step: int = 1

    @property
    def fits(self) -> bool:
        """Whether there are registers for it, and whole vectors of weights to load."""
        weights = self.entries * self.rows
        whole = weights % LANES == 0 or weights in (1, 2)
        return whole and self._accumulator(self.rows * self.vectors) <= REGISTERS

    @property
    def name(self) -> str:
        """The function: its arguments are pointers to the accumulators, to the weights and indices
        of the first entry, and to the inputs at index 0, and the number of entries.
        """
        return f"neon_sum_{self.rows}x{self.vectors}_{self.entries}_{self.step}"

    def llvm(self) -> str:
        """The function in LLVM's language."""
        vectors, vector = range(self.rows * self.vectors), "<4 x float>"
        made = "{" + ", ".join([vector] * len(vectors) + ["ptr", "ptr", "i32"]) + "}"
        values = [f"{vector} %a{i}" for i in vectors]
        values += ["ptr %weight", "ptr %index", "i32 %count", "ptr %x", f"i32 {4 * self.step}"]
        code = "\\0A".join(self._code())
        lines = [f"define void @{self.name}(ptr %acc, ptr %weight, ptr %index, ptr %x, i32 %count)"]
        lines += ["{", *(f"%p{i} = getelementptr {vector}, ptr %acc, i32 {i}" for i in vectors)]
        lines += [f"%a{i} = load {vector}, ptr %p{i}, align 16" for i in vectors]
        lines += [f'%made = call {made} asm sideeffect "{code}", "{self._constraints()}"']
        lines += [f"({', '.join(values)})"]
        for i in vectors:
            lines += [f"%r{i} = extractvalue {made} %made, {i}"]
            lines += [f"store {vector} %r{i}, ptr %p{i}, align 16"]
        return "\n".join([*lines, "ret void", "}", ""])

    def _constraints(self) -> str:
        """What is where: the accumulators, weights, indices and count come back changed."""
        count = self.rows * self.vectors
        changed = [f"={{v{self._accumulator(i)}}}" for i in range(count)] + ["=&r"] * 3
        given = [*map(str, range(len(changed))), "r", "r"]
        lost = [f"v{i}" for i in range(self._accumulator(0))]
        lost += [f"x{_FIRST_SCRATCH + e}" for e in range(self.entries)] + ["cc", "memory"]
        return ",".join([*changed, *given, *(f"~{{{name}}}" for name in lost)])

    def _accumulator(self, i: int) -> int:
        """Its register: behind those of a group's weights, and its inputs."""
        return self._input(self.entries, 0) + i

    def _input(self, entry: int, vector: int) -> int:
        return -(-self.entries * self.rows // LANES) + entry * self.vectors + vector

    def _code(self) -> Iterator[str]:
        count = f"${{{self.rows * self.vectors + 2}:w}}"
        yield f"subs {count}, {count}, #{self.entries}"
        yield "b.lt 2f"
        yield "1:"
        yield from self._group(self.entries, f"subs {count}, {count}, #{self.entries}")
        yield "b.ge 1b"
        yield "2:"
        yield f"add {count}, {count}, #{self.entries}"
        bit = (self.entries - 1).bit_length()
        while bit:
            bit -= 1
            yield f"tbz {count}, #{bit}, 3f"
            yield from self._group(1 << bit)
            yield "3:"

    def _group(self, entries: int, counting: str = "") -> Iterator[str]:
        """The code of so many entries: every load, and then every multiply-add."""
        operand = self.rows * self.vectors
        weight, index = f"${operand}", f"${operand + 1}"
        x, step = f"${2 * operand + 6}", f"${{{2 * operand + 7}:w}}"
        scratch = [_FIRST_SCRATCH + e for e in range(entries)]
        yield from _loads("w", scratch, index)
        yield f"add {index}, {index}, #{4 * entries}"
        if counting:
            yield counting
        weights = entries * self.rows
        kind = {1: "s", 2: "d"}.get(weights, "q")
        yield from _loads(kind, list(range(-(-weights // LANES))), weight)
        yield f"add {weight}, {weight}, #{4 * weights}"
        for i in scratch:
            to = f"x{i}, {x}, w{i}, sxtw #2"
            yield f"add {to}" if self.step == 1 else f"smaddl x{i}, w{i}, {step}, {x}"
        for e, i in enumerate(scratch):
            yield from _loads("q", [self._input(e, v) for v in range(self.vectors)], f"x{i}")
        for e in range(entries):
            for r in range(self.rows):
                lane, weight = (e * self.rows + r) % LANES, f"v{(e * self.rows + r) // LANES}"
                for v in range(self.vectors):
                    total = self._accumulator(r * self.vectors + v)
                    yield f"fmla v{total}.4s, v{self._input(e, v)}.4s, {weight}.s[{lane}]"


_BYTES = {"w": 4, "s": 4, "d": 8, "q": 16}


def _loads(kind: str, registers: list[int], base: str) -> Iterator[str]:
    """Loads of neighbours in memory, in pairs as far as they go."""
    for i in range(0, len(registers) - 1, 2):
        first, second = registers[i : i + 2]
        yield f"ldp {kind}{first}, {kind}{second}, [{base}, #{i * _BYTES[kind]}]"
    if len(registers) % 2:
        yield f"ldr {kind}{registers[-1]}, [{base}, #{(len(registers) - 1) * _BYTES[kind]}]"
