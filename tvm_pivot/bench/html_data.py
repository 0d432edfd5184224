"""A comparison looked at the ways the HTML report needs: by group, by network, as ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from .html_text import several
from .results import Comparison, ModelFacts, Result
from .runtimes import adapter

OURS, OUR_DENSE = "pivot", "pivot-dense"
NAME = "tvm_pivot"
BASELINE = "onnxruntime"
# What counts as "90 % of the weights removed".
_NINETY = (0.08, 0.12)


@dataclass(frozen=True)
class Group:
    """What must be equal for two times to be compared on one chart."""

    precision: str
    threads: int

    def __str__(self) -> str:
        threads = several(self.threads, "thread")
        return threads if self.precision == "fp32" else f"{threads}, {self.precision}"

    @property
    def order(self) -> tuple[bool, str, int]:
        """fp32 first, then by threads."""
        return self.precision != "fp32", self.precision, self.threads


@dataclass(frozen=True)
class Entry:
    """A runtime's time for a model.

    Attributes:
        result: of that model; of its network's dense variant where `borrowed`.
        ms: the median.
        borrowed: the runtime does not skip zeros and was timed on the dense variant only.
    """

    result: Result
    ms: float
    borrowed: bool = False


class Index:
    """A comparison by model, network, and group.

    Attributes:
        comparison: the one indexed.
        groups: all there are, fp32 and few threads first.
        models: those of the comparison, and those that only results name.
        networks: the models of each network, densest first.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        groups = {Group(r.precision, r.threads) for r in comparison.results}
        self.groups = sorted(groups, key=lambda group: group.order)
        self.models = [*comparison.models, *_unknown(comparison)]
        self.networks: dict[str, list[ModelFacts]] = {}
        for facts in self.models:
            self.networks.setdefault(facts.network, []).append(facts)
        for same in self.networks.values():
            same.sort(key=lambda facts: (-target_density(facts), _pattern_order(facts)))
        self._results: dict[tuple[str, Group], dict[str, Result]] = {}
        for r in comparison.results:
            place = self._results.setdefault((r.model, Group(r.precision, r.threads)), {})
            place[r.runtime] = r
        self.titles = {r.runtime: r.title or r.runtime for r in comparison.results}

    @property
    def single(self) -> bool:
        """Whether there is one model only."""
        return len(self.models) == 1

    def results(self, model: str, group: Group) -> list[Result]:
        """Of one model, fastest first, those without a time last."""
        found = self._results.get((model, group), {}).values()
        return sorted(found, key=lambda r: (timed(r) is None, timed(r) or 0.0, r.title))

    def all_results(self, model: str) -> list[Result]:
        """Of one model in all groups."""
        return [r for group in self.groups for r in self.results(model, group)]

    def entries(self, facts: ModelFacts, group: Group) -> list[Entry]:
        """Every time there is for a model, fastest first."""
        found = self._results.get((facts.name, group), {})
        entries = [Entry(r, ms) for r in found.values() if (ms := timed(r)) is not None]
        dense = self._dense_variant(facts)
        if dense is not None and dense is not facts:
            for name, r in self._results.get((dense.name, group), {}).items():
                ms = timed(r)
                if name not in found and ms is not None and not skips_zeros(name):
                    entries.append(Entry(r, ms, borrowed=True))
        return sorted(entries, key=lambda entry: (entry.ms, entry.result.title))

    def ms(self, facts: ModelFacts, runtime: str, group: Group) -> float | None:
        """Median of one runtime on a model, perhaps borrowed; None where there is none."""
        for entry in self.entries(facts, group):
            if entry.result.runtime == runtime:
                return entry.ms
        return None

    def over(self, facts: ModelFacts, runtime: str, group: Group) -> float | None:
        """How many times faster than a runtime we are on a model; None where not known."""
        ours, theirs = self.ms(facts, OURS, group), self.ms(facts, runtime, group)
        return theirs / ours if ours and theirs else None

    def baseline(self, facts: ModelFacts, runtime: str, group: Group) -> float | None:
        """Time of a runtime with every weight multiplied; for us that is our dense build.

        Where it was not timed on the model itself, any of the network's will do, the densest
        first: no zero is skipped.
        """
        for other in (facts, *self.networks[facts.network]):
            names = [runtime]
            if runtime == OUR_DENSE and other.density >= 0.995:
                names.append(OURS)
            for name in names:
                r = self._results.get((other.name, group), {}).get(name)
                if r is not None and (ms := timed(r)) is not None:
                    return ms
        return None

    def runtimes(self) -> list[str]:
        """All names, ours first, then those that skip zeros, then by title."""
        return sorted(
            self.titles,
            key=lambda name: (not is_ours(name), not skips_zeros(name), self.titles[name].lower()),
        )

    def borrows(self) -> bool:
        """Whether any time is borrowed."""
        return any(e.borrowed for m in self.models for g in self.groups for e in self.entries(m, g))

    def _dense_variant(self, facts: ModelFacts) -> ModelFacts | None:
        densest = self.networks[facts.network][0]
        return densest if densest.density >= 0.995 else None


def _unknown(comparison: Comparison) -> list[ModelFacts]:
    """Stand-ins for models that results name and nothing describes."""
    known = {facts.name for facts in comparison.models}
    names = dict.fromkeys(r.model for r in comparison.results if r.model not in known)
    return [ModelFacts(name, name, "", "", "", math.nan, 0, 0) for name in names]


def timed(result: Result) -> float | None:
    """The median of a result that counts."""
    ms = result.median_ms
    return ms if result.status == "ok" and ms is not None and 0 < ms < math.inf else None


def is_ours(runtime: str) -> bool:
    """Whether a runtime is a build of this package."""
    return runtime in (OURS, OUR_DENSE)


@cache
def skips_zeros(runtime: str) -> bool:
    """Whether a runtime claims to be faster for zeros."""
    try:
        return adapter(runtime).skips_zeros
    except (KeyError, ImportError):  # results of another version, with other runtimes
        return runtime == OURS or runtime.endswith("-sparse")


def target_density(facts: ModelFacts) -> float:
    """The density a variant was pruned to; the measured one where the name does not say.

    Layers that are left dense make the two differ.
    """
    asked = facts.variant.rpartition("@")[2]
    try:
        density = float(asked)
    except ValueError:
        density = facts.density
    return density if 0 < density <= 1 else 1.0


def is_ninety(facts: ModelFacts) -> bool:
    """Whether about 90 % of the weights were removed."""
    low, high = _NINETY
    return low <= target_density(facts) <= high


def pattern_of(facts: ModelFacts) -> str:
    """The pattern for people: ``"8x1 blocks"``, ``"unstructured"``, ``"dense"``, ``"dlmc"``."""
    kind, at, _ = facts.variant.rpartition("@")
    if not at:
        return facts.variant or facts.pattern
    rows, x, cols = kind.partition("x")
    if not (x and rows.isdecimal() and cols.isdecimal()):
        return kind
    return "unstructured" if rows == cols == "1" else f"{kind} blocks"


def _pattern_order(facts: ModelFacts) -> tuple[bool, int, str]:
    """Blocks by size, then everything else by name."""
    pattern = pattern_of(facts)
    rows, _, cols = pattern.removesuffix(" blocks").partition("x")
    if rows.isdecimal() and cols.isdecimal():
        return False, int(rows) * int(cols), pattern
    return True, 0, pattern


def label(facts: ModelFacts) -> str:
    """A variant for people: ``"8x1 blocks, 10 % kept"``; the name where no variant is known."""
    if not facts.variant or facts.variant == "dense":
        return facts.variant or facts.name
    return f"{pattern_of(facts)}, {target_density(facts) * 100:g} % kept"


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def median(values: Sequence[float]) -> float:
    """The middle one of at least one number; the mean of the middle two."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
