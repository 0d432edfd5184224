"""Blocks of guest code and how often they ran: what the plugin writes, and differences of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_WORD = 8  # hexadecimal digits
_PAGE = 4096
# A64 instructions that may go elsewhere, as mask and value.
_BRANCHES = (
    (0x7C000000, 0x14000000),  # b, bl
    (0xFE000000, 0x54000000),  # b.cond
    (0x7C000000, 0x34000000),  # cbz, cbnz, tbz, tbnz
    (0xFE000000, 0xD6000000),  # br, blr, ret
)


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other.

    Attributes:
        file: where the code is from; empty for code that is in no file.
        place: offset in that file; the guest's address where there is none.
        code: the instructions, eight hexadecimal digits each.
    """

    file: str
    place: int
    code: str

    def __len__(self) -> int:
        return len(self.code) // _WORD

    def words(self) -> list[int]:
        """The instructions as numbers."""
        return [int(self.code[i : i + _WORD], 16) for i in range(0, len(self.code), _WORD)]


@dataclass(frozen=True)
class Count:
    """How often a block ran, and how many of its accesses to data missed the caches."""

    runs: float
    l1_misses: float = 0.0
    l2_misses: float = 0.0


Profile = dict[Block, Count]
"""What a program executed."""


def parse(lines: Iterable[str]) -> Profile:
    """Read what the plugin wrote.

    Raises:
        ValueError: a line is not one of the plugin's.
    """
    files: list[str] = []
    found: Profile = {}
    for line in lines:
        kind, _, rest = line.rstrip("\n").partition(" ")
        if kind == "map":
            files.append(rest.split(" ", 3)[3])
        elif kind == "block":
            place, runs, file, l1, l2, code = rest.split(" ")
            path = files[int(file)] if int(file) >= 0 else ""
            block = Block(path, int(place, 16), code)
            before = found.get(block, Count(0))
            found[block] = Count(
                before.runs + int(runs), before.l1_misses + int(l1), before.l2_misses + int(l2)
            )
        else:
            raise ValueError(f"not a line of the plugin: {line!r}")
    return found


def read(path: Path) -> Profile:
    """Read the plugin's file."""
    with path.open(encoding="utf-8") as file:
        return parse(file)


def joined(profile: Profile) -> Profile:
    """The same, with blocks whole that QEMU cuts in two because a page ends in them.

    Each half would be modelled as if it followed itself.
    """
    found = dict(profile)
    starts = {(block.file, block.place): block for block in profile}
    for first in profile:
        end = first.place + 4 * len(first)
        if end % _PAGE or _may_branch(first.words()[-1]):
            continue
        second = starts.get((first.file, end))
        a, b = found[first], found.get(second, Count(0)) if second else Count(0)
        if second is None or not 0 < a.runs <= b.runs:
            continue
        share = a.runs / b.runs
        del found[first], found[second]
        whole = Block(first.file, first.place, first.code + second.code)
        misses = (a.l1_misses + share * b.l1_misses, a.l2_misses + share * b.l2_misses)
        found[whole] = Count(a.runs, *misses)
        if share < 1:  # the second half is jumped to as well
            rest = (b.l1_misses * (1 - share), b.l2_misses * (1 - share))
            found[second] = Count(b.runs - a.runs, *rest)
    return found


def _may_branch(word: int) -> bool:
    return any(word & mask == value for mask, value in _BRANCHES)


def per_run(few: Mapping[Block, Count], many: Mapping[Block, Count], runs: int) -> Profile:
    """What one run executes, from two programs that differ in `runs` runs.

    Loading, and all else that both did, cancels out.
    """
    none = Count(0)
    found: Profile = {}
    for block in {**few, **many}:
        a, b = few.get(block, none), many.get(block, none)
        if a != b:
            found[block] = Count(
                (b.runs - a.runs) / runs,
                (b.l1_misses - a.l1_misses) / runs,
                (b.l2_misses - a.l2_misses) / runs,
            )
    return joined(found)


def loads_and_stores(word: int) -> tuple[int, int]:
    """Whether an A64 instruction loads, and whether it stores, as 0 or 1 each.

    A pair, or several registers, is one access; prefetches are none; atomic updates are both.
    """
    if word >> 25 & 0b101 != 0b100:  # not of the group "loads and stores"
        if word >> 25 & 0b1111 == 0b0010 and word >> 31:  # SVE: of the rest, 111 in front stores
            return (0, 1) if word >> 29 == 0b111 else (1, 0)
        return (0, 0)
    kind = word >> 28 & 0b11
    if kind == 0b01 and not word >> 24 & 1:  # a literal
        prefetch = word >> 30 == 0b11 and not word >> 26 & 1
        return (0, 0) if prefetch else (1, 0)
    if kind == 0b11 and not word >> 24 & 1 and word >> 21 & 1 and not word >> 10 & 0b11:
        return (1, 1)
    if kind & 1 and not word >> 26 & 1:
        size, opcode = word >> 30, word >> 22 & 0b11
        if size == 0b11 and opcode == 0b10:  # a prefetch
            return (0, 0)
        return (0, 1) if opcode == 0 else (1, 0)
    return (1, 0) if word >> 22 & 1 else (0, 1)
