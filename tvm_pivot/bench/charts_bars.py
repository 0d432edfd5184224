"""Horizontal bars of times, one per runtime, as rows of text and small SVGs.

Bars are percentages of the room that the text leaves, so they fit a phone as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .html_data import OUR_DENSE, OURS, Entry, skips_zeros
from .html_text import Markup, element, number, percent_position, ratio

# A time this many times the middle one is cut: it would press all others together.
_CUT = 3.0
_HEIGHT = 16


def bars(entries: Sequence[Entry], caption: str) -> Markup:
    """A bar per entry in the order given, with its time and our speed-up over it.

    Args:
        entries: of one model and group; at least one.
        caption: e.g. ``"1 thread"``.

    Returns:
        Rows of the runtime, its bar, its median and our speed-up over it.
    """
    longest = _longest([entry.ms for entry in entries])
    ours = next((e.ms for e in entries if e.result.runtime == OURS), None)
    rows = [_row(entry, longest, ours) for entry in entries]
    head = element(
        "div",
        element("span", caption, class_="threads"),
        element("span", "", class_="wide"),
        element("span", "ms", class_="ms"),
        element("span", "speed-up" if ours else "", class_="over"),
        class_="bar-row head",
    )
    return element("div", head, *rows, class_="bars")


def _longest(times: Iterable[float]) -> float:
    """The time a whole bar's length stands for: the largest that is not cut."""
    ordered = sorted(times)
    limit = _CUT * ordered[len(ordered) // 2]
    longest = max(ms for ms in ordered if ms <= limit)
    return longest if ordered[-1] <= limit else longest * 1.15


def _row(entry: Entry, longest: float, ours: float | None) -> Markup:
    r = entry.result
    style = bar_style(r.runtime)
    over = ""
    if ours and r.runtime != OURS:
        over = ratio(entry.ms / ours)
    behind = "behind" if ours and entry.ms < ours else ""
    return element(
        "div",
        element("span", r.title or r.runtime, "\u00a0*" if entry.borrowed else None, class_="who"),
        _bar(entry, longest),
        element("span", number(entry.ms), class_="ms"),
        element("span", over, class_=f"over {behind}".strip()),
        class_=f"bar-row {style}{' borrowed' if entry.borrowed else ''}",
    )


def bar_style(runtime: str) -> str:
    """The CSS class of a runtime: ours, our dense build, skips zeros, or none of these."""
    if runtime in (OURS, OUR_DENSE):
        return "ours" if runtime == OURS else "dense"
    return "rival" if skips_zeros(runtime) else "plain"


def _bar(entry: Entry, longest: float) -> Markup:
    share = entry.ms / longest
    cut = share > 1
    middle = _HEIGHT / 2
    least = entry.result.min_ms
    parts = [
        element(
            "rect",
            x=0,
            y=1,
            height=_HEIGHT - 2,
            rx=2,
            width=percent_position(min(share, 1.0)),
            class_="bar",
        )
    ]
    if cut:
        broken = element("path", d=f"M-3 {_HEIGHT} 3 0 M3 {_HEIGHT} 9 0", class_="break")
        parts.append(element("svg", broken, x="80%", y=0, class_="at"))
    elif least is not None and 0 < least <= entry.ms:
        start, end = percent_position(least / longest), percent_position(share)
        parts.append(element("line", x1=start, x2=end, y1=middle, y2=middle, class_="whisker"))
        parts.append(element("line", x1=start, x2=start, y1=4, y2=12, class_="whisker"))
    r = entry.result
    text = f"{r.title}: median {number(entry.ms, 4)} ms, min {number(least, 4)} ms"
    return element(
        "svg",
        element("title", text),
        *parts,
        class_="bar-box",
        width="100%",
        height=_HEIGHT,
        xmlns="http://www.w3.org/2000/svg",
    )
