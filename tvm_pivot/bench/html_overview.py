"""Our speed-up over every runtime for every model at a glance: one table for many charts."""

from __future__ import annotations

import math

from .html_data import NAME, OURS, Group, Index, is_ninety, label
from .html_tables import scrolling, table
from .html_text import NONE, Markup, element, join, number, ratio
from .results import ModelFacts

# The colour is deepest at this speed-up, or slow-down.
_DEEPEST = 10.0


def overview(index: Index, ninety_only: bool) -> Markup | None:
    """A row per model, a column per runtime; None where there is nothing to compare.

    Args:
        index: the comparison.
        ninety_only: leave out the variants with more or less than about 90 % removed, unless
            that leaves none.
    """
    parts: list[Markup] = []
    for group in index.groups:
        models = [m for m in index.models if index.ms(m, OURS, group) is not None]
        chosen = [m for m in models if is_ninety(m)] if ninety_only else models
        chosen = chosen or models
        runtimes = [
            name
            for name in index.runtimes()
            if name != OURS and any(index.over(m, name, group) is not None for m in chosen)
        ]
        if not runtimes:
            continue
        title = f"Speed-up of {NAME} over each runtime, {group}"
        ordered = _by_network(index, chosen)
        new = [i > 0 and m.network != ordered[i - 1].network for i, m in enumerate(ordered)]
        rows = [_row(index, m, runtimes, group, n) for m, n in zip(ordered, new, strict=True)]
        head = (("ms", f"median of {NAME}"), *((index.titles[name], "") for name in runtimes))
        shown = scrolling(table(head, rows, "model"), title)
        folded = element("details", element("summary", title), shown)
        parts.append(folded if parts else join((element("h3", title), shown)))
    return element("div", *parts, class_="overview") if parts else None


def _by_network(index: Index, models: list[ModelFacts]) -> list[ModelFacts]:
    wanted = {m.name for m in models}
    return [m for same in index.networks.values() for m in same if m.name in wanted]


def _row(index: Index, facts: ModelFacts, runtimes: list[str], group: Group, new: bool) -> Markup:
    name = f"{facts.network}, {label(facts)}" if facts.variant else facts.name
    cells = [_cell(index.over(facts, runtime, group)) for runtime in runtimes]
    ours = element("td", number(index.ms(facts, OURS, group)), class_="median")
    head = element("th", name, scope="row")
    return element("tr", head, ours, *cells, class_="next" if new else None)


def _cell(times: float | None) -> Markup:
    if times is None:
        return element("td", NONE)
    strength = min(abs(math.log(times)) / math.log(_DEEPEST), 1.0)
    style = "shaded" if times >= 1 else "shaded behind"
    return element("td", ratio(times), class_=style, style=f"--s:{strength:.2f}")
