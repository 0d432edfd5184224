"""The one sentence a comparison comes down to, computed from it; also when we lose."""

from __future__ import annotations

from collections.abc import Sequence

from .html_data import (
    BASELINE,
    NAME,
    OUR_DENSE,
    OURS,
    Entry,
    Group,
    Index,
    is_ninety,
    is_ours,
    timed,
)
from .html_data import median as middle
from .html_text import milliseconds, ratio, several
from .results import ModelFacts

# Closer than this is called equal: what a quiet machine differs by from run to run.
_EQUAL = 0.03


def finding(index: Index) -> tuple[str, str]:
    """A headline and what must be said with it, perhaps nothing; plain text."""
    for group in index.groups:
        models = [m for m in index.models if index.ms(m, OURS, group) is not None]
        if models:
            headline, more = _about(index, group, models)
            return headline, f"{more} {_failures(index, group)}".strip()
    return _without_us(index), ""


def _about(index: Index, group: Group, models: list[ModelFacts]) -> tuple[str, str]:
    ninety = [m for m in models if is_ninety(m)]
    pruned = [m for m in models if m.density < 0.995]
    chosen = ninety or pruned or models
    if len(chosen) == 1:
        return _about_one(index, group, chosen[0]), ""
    return _about_many(index, group, chosen, bool(ninety))


def _about_one(index: Index, group: Group, facts: ModelFacts) -> str:
    entries = index.entries(facts, group)
    (ours,) = (e for e in entries if e.result.runtime == OURS)
    said = f"{NAME} runs {_described(facts)} in {milliseconds(ours.ms)}"
    rivals = [e for e in entries if not is_ours(e.result.runtime)]
    if not rivals:
        dense = index.over(facts, OUR_DENSE, group)
        end = f", {compared(dense)} its own dense build" if dense else ""
        return f"{said}{end} ({group}). No other runtime was timed."
    return f"{said}, {_against(ours, rivals)} ({group})."


def _against(ours: Entry, rivals: Sequence[Entry]) -> str:
    first = rivals[0]
    parts = [f"{compared(first.ms / ours.ms)} {first.result.title}"]
    if len(rivals) > 1:
        place = "the next fastest" if ours.ms <= first.ms else "the fastest"
        parts[0] += f", {place} of {several(len(rivals), 'other runtime')}"
    usual = [e for e in rivals[1:] if e.result.runtime == BASELINE]
    parts += [f"{compared(e.ms / ours.ms)} {e.result.title}" for e in usual]
    return ", and ".join(parts)


def compared(times: float) -> str:
    """``4.9 -> "4.9x faster than"``, ``0.95 -> "5 % slower than"``."""
    if abs(times - 1) <= _EQUAL:
        return "as fast as"
    more, word = (times, "faster than") if times > 1 else (1 / times, "slower than")
    return f"{(more - 1) * 100:.0f} % {word}" if more < 1.1 else f"{ratio(more)} {word}"


def _described(facts: ModelFacts) -> str:
    removed = 1 - facts.density
    if not removed >= 0.005:  # not known, too
        return facts.network
    return f"{facts.network} with {removed * 100:.0f} % of its weights removed"


def _about_many(
    index: Index, group: Group, models: list[ModelFacts], ninety: bool
) -> tuple[str, str]:
    usual = _usual_rival(index, group, models)
    if usual is None:
        return f"{NAME} ran {_counted(models, ninety)}; no other runtime was timed ({group}).", ""
    over = {m.name: index.over(m, usual, group) for m in models}
    rated = [m for m in models if over[m.name] is not None]
    ratios = [times for times in over.values() if times is not None]
    headline = (
        f"Over {_counted(rated, ninety)}, {NAME} is {compared(middle(ratios))} "
        f"{index.titles[usual]} in the median, from {_plain(min(ratios))} to "
        f"{_plain(max(ratios))} ({group})."
    )
    return headline, _wins(index, group, models)


def _counted(models: list[ModelFacts], ninety: bool) -> str:
    networks = {m.network for m in models}
    removed = " with 90 % of the weights removed" if ninety else ""
    if len(networks) == 1:
        return f"{several(len(models), 'variant')} of {models[0].network}{removed}"
    number = several(len(models), "model")
    return f"{several(len(networks), 'network')}{removed} ({number})"


def _failures(index: Index, group: Group) -> str:
    """For which models we have no time, where we should have one."""
    failed = [
        r.model
        for r in index.comparison.results
        if r.runtime == OURS and Group(r.precision, r.threads) == group and timed(r) is None
    ]
    return f"It has no time that counts for {', '.join(failed)}." if failed else ""


def _plain(times: float) -> str:
    return ratio(times) if times >= 1 else f"{ratio(1 / times)} slower"


def _usual_rival(index: Index, group: Group, models: list[ModelFacts]) -> str | None:
    """ONNX Runtime where it was timed, else the runtime with the most times."""
    counts: dict[str, int] = {}
    for m in models:
        for entry in index.entries(m, group):
            if not is_ours(entry.result.runtime):
                counts[entry.result.runtime] = counts.get(entry.result.runtime, 0) + 1
    if not counts:
        return None
    return max(counts, key=lambda name: (name == BASELINE, counts[name], name))


def _wins(index: Index, group: Group, models: list[ModelFacts]) -> str:
    """For how many models nothing else was faster, and who was, where something was."""
    lost: dict[str, int] = {}
    contested = 0
    for m in models:
        rivals = [e for e in index.entries(m, group) if not is_ours(e.result.runtime)]
        ours = index.ms(m, OURS, group)
        if not rivals or ours is None:
            continue
        contested += 1
        if rivals[0].ms < ours:
            title = rivals[0].result.title
            lost[title] = lost.get(title, 0) + 1
    wins = contested - sum(lost.values())
    said = f"It is the fastest of all runtimes for {wins} of {several(contested, 'model')}"
    if not lost:
        return f"{said}."
    winners = sorted(lost.items(), key=lambda item: -item[1])
    beaten = ", ".join(f"{title} for {count}" for title, count in winners)
    return f"{said}; the fastest otherwise: {beaten}."


def _without_us(index: Index) -> str:
    for group in index.groups:
        for m in index.models:
            entries = index.entries(m, group)
            if entries:
                first = entries[0]
                return (
                    f"{NAME} has no time here. {first.result.title} runs {_described(m)} in "
                    f"{milliseconds(first.ms)} ({group})."
                )
    return "No runtime has a time that counts; the reasons are listed below."
