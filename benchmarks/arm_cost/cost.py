"""From what a program executed to what that costs on a core."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .blocks import Block, Count, Profile, loads_and_stores
from .cores import Core
from .elf import symbols_of
from .mca import cycles

# Beyond the first thousand, blocks that make up the last 0.1 % of the instructions are not worth
# modelling: they take as many cycles per instruction as the others do on average.
_MODELLED, _LEAST = 0.999, 1000


@dataclass(frozen=True)
class Cost:
    """What was executed, and the cycles that a model of the core gives for it.

    Attributes:
        instructions: executed.
        loads: instructions that load, of whatever size.
        stores: instructions that store.
        cycles: of the model, which knows no cache misses and no mispredicted branches.
        l1_misses: accesses to data that miss level 1, if they were counted.
        l2_misses: those that miss level 2 too.
    """

    instructions: float = 0.0
    loads: float = 0.0
    stores: float = 0.0
    cycles: float = 0.0
    l1_misses: float = 0.0
    l2_misses: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.instructions + other.instructions,
            self.loads + other.loads,
            self.stores + other.stores,
            self.cycles + other.cycles,
            self.l1_misses + other.l1_misses,
            self.l2_misses + other.l2_misses,
        )


def block_costs(profile: Mapping[Block, Count], core: Core) -> dict[Block, Cost]:
    """The cost of each block, of all its runs."""
    executed = {block: count.runs * len(block) for block, count in profile.items()}
    total = sum(executed.values())
    modelled: list[Block] = []
    reached = 0.0
    for block in sorted(executed, key=executed.__getitem__, reverse=True):
        if reached >= _MODELLED * total and len(modelled) >= _LEAST:
            break
        modelled.append(block)
        reached += executed[block]
    per_code = cycles((block.code for block in modelled), core.model)
    known = {block: profile[block].runs * per_code[block.code] for block in modelled}
    average = sum(known.values()) / reached if reached else 0.0
    found = {}
    for block, count in profile.items():
        loads, stores = _accesses(block.code)
        found[block] = Cost(
            executed[block],
            count.runs * loads,
            count.runs * stores,
            known.get(block, executed[block] * average),
            count.l1_misses,
            count.l2_misses,
        )
    return found


def total_cost(profile: Mapping[Block, Count], core: Core) -> Cost:
    """The cost of all that ran."""
    return sum(block_costs(profile, core).values(), Cost())


def grouped(
    profile: Profile, core: Core, key: Callable[[Block], str] | None = None
) -> dict[str, Cost]:
    """The cost of each function or other group of blocks, the costliest first.

    Args:
        profile: what ran.
        core: on what.
        key: the name of a block's group; default: `function_of`.
    """
    key = key or function_of
    found: defaultdict[str, Cost] = defaultdict(Cost)
    for block, cost in block_costs(profile, core).items():
        found[key(block)] += cost
    return dict(sorted(found.items(), key=lambda item: -item[1].cycles))


def function_of(block: Block) -> str:
    """``function`` of a block where its file names it, else ``[file]``."""
    if not block.file:
        return "[no file]"
    return symbols_of(block.file).name(block.place) or f"[{Path(block.file).name}]"


@lru_cache(maxsize=1 << 16)
def _accesses(code: str) -> tuple[int, int]:
    both = [loads_and_stores(int(code[i : i + 8], 16)) for i in range(0, len(code), 8)]
    return sum(loads for loads, _ in both), sum(stores for _, stores in both)
