"""The sections of the report that hold charts and pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

from .charts import LEAST, Family, Point, Series, marker, speedup_chart
from .charts_bars import bars
from .html_data import (
    BASELINE,
    OUR_DENSE,
    OURS,
    Group,
    Index,
    geometric_mean,
    is_ninety,
    label,
    pattern_of,
    skips_zeros,
    target_density,
    timed,
)
from .html_finding import compared
from .html_overview import overview
from .html_tables import badge, digest_line, facts_line, results_table
from .html_text import Markup, element, join, milliseconds, percent, ratio
from .patterns import WINDOW, PatternPicture
from .results import ModelFacts, Result

# More models than this are folded away, but for those that matter most.
MANY = 12


def family_of(facts: ModelFacts) -> Family:
    """Which marker a variant gets."""
    if facts.density >= 0.995:
        return "dense"
    pattern = pattern_of(facts)
    if pattern == "unstructured":
        return "unstructured"
    return "blocks" if pattern.endswith(("blocks", "permuted")) else "other"


def density_section(index: Index) -> Markup | None:
    """Speed-up against density, a chart per network; None where nothing can be drawn."""
    parts: list[Markup] = []
    for baseline in (OUR_DENSE, BASELINE):
        for group in index.groups:
            charts = _charts(index, group, baseline)
            if not charts:
                continue
            over = "our dense build" if baseline == OUR_DENSE else index.titles[baseline]
            title = f"Speed-up over {over}, {group}"
            grid = element("div", *charts, class_="grid charts")
            folded = element("details", element("summary", title), grid)
            parts.append(folded if parts else join((element("h3", title), grid)))
    if not parts:
        return None
    intro = element(
        "p",
        "Along the dotted line, time shrinks exactly as the weights do: that is linear. Both axes "
        "are logarithmic. Where several block shapes were measured, a square is their geometric "
        "mean, and the bar through it reaches from the slowest to the fastest of them.",
    )
    head = element("h2", "Speed-up against density")
    return element("section", head, intro, _key(index), *parts, id="density")


def _key(index: Index) -> Markup:
    """What the markers mean that occur."""
    present = {family_of(m) for m in index.models}
    kinds: tuple[tuple[Family, str], ...] = (
        ("blocks", "blocks"),
        ("unstructured", "single weights"),
        ("other", "other patterns"),
    )
    items = [
        element("span", _swatch(_line(family), marker(family)), text, class_="item")
        for family, text in kinds
        if family in present
    ]
    thin = _swatch(_line("blocks"), style="flat")
    items.append(element("span", thin, "runtimes that skip no zeros", class_="item"))
    return element("p", *items, class_="key")


def _line(family: Family) -> Markup:
    return element("line", x1=-15, x2=15, y1=0, y2=0, class_=f"line {family}")


def _swatch(*shapes: Markup, style: str = "ours") -> Markup:
    inside = element("g", *shapes, class_=f"series {style}")
    return element("svg", inside, viewBox="-15 -7 30 14", width=30, height=14, aria_hidden="true")


def _charts(index: Index, group: Group, baseline: str) -> list[Markup]:
    charts: list[Markup] = []
    single: list[Markup] = []
    for network, models in index.networks.items():
        series = _network_series(index, models, group, baseline)
        points = {p.density for one in series if not one.flat for p in one.points}
        if not points:
            continue
        chart = speedup_chart(series, f"speed-up against density of {network}, {group}")
        box = element("div", chart, class_="plot-box")
        figure = element("figure", element("figcaption", network), box, _below(series))
        (charts if len({target_density(m) for m in models}) > 1 else single).append(figure)
    return charts or single


def _below(series: Sequence[Series]) -> Markup | None:
    """Who is too slow for the chart."""
    slow = [f"{one.title} ({ratio(one.mean)})" for one in series if one.flat and one.mean < LEAST]
    return element("p", f"Below the chart: {', '.join(slow)}", class_="facts") if slow else None


def _network_series(
    index: Index, models: Sequence[ModelFacts], group: Group, baseline: str
) -> list[Series]:
    series, rivals = [], 0
    for runtime in index.runtimes():
        if runtime == OUR_DENSE or (runtime == baseline and not skips_zeros(runtime)):
            continue  # the line at 1
        style = "ours" if runtime == OURS else "flat"
        if style == "flat" and skips_zeros(runtime):
            rivals += 1
            style = f"rival-{(rivals - 1) % 4 + 1}"
        points = _points(index, models, group, baseline, runtime)
        if points:
            series.append(Series(index.titles[runtime], style, tuple(points)))
    return series


def _points(
    index: Index, models: Sequence[ModelFacts], group: Group, baseline: str, runtime: str
) -> list[Point]:
    """One point per family and density, over the variants that share them."""
    found: dict[tuple[Family, float], list[tuple[ModelFacts, float]]] = {}
    for facts in models:
        results = {r.runtime: r for r in index.results(facts.name, group)}
        ms = timed(results[runtime]) if runtime in results else None
        dense = index.baseline(facts, baseline, group)
        if ms and dense and facts.density > 0:
            place = found.setdefault((family_of(facts), target_density(facts)), [])
            place.append((facts, dense / ms))
    points = []
    for (family, _), pairs in found.items():
        speedups = [speedup for _, speedup in pairs]
        mean = geometric_mean(speedups)
        names = "; ".join(f"{label(facts)}: {ratio(speedup)}" for facts, speedup in pairs)
        density = geometric_mean(facts.density for facts, _ in pairs)
        text = f"{index.titles[runtime]}: {names}"
        points.append(Point(density, mean, family, min(speedups), max(speedups), text))
    return points


def bars_section(index: Index) -> Markup | None:
    """Every runtime's time for every model."""
    if not index.comparison.results:
        return None
    everywhere = _missing_everywhere(index)
    folded = len(index.models) > MANY
    parts: list[Markup] = []
    for network, models in index.networks.items():
        shown = [_model_bars(index, m, everywhere, folded) for m in models]
        if not index.single:
            parts.append(element("h3", network))
        parts += [one for one in shown if one is not None]
    glance = None if index.single else overview(index, ninety_only=folded)
    intro = element(
        "p",
        "Medians, sorted, fastest first; the thin line in a bar reaches back to the fastest call. "
        "The speed-up is that of tvm_pivot over the runtime in the row. ",
        "Bars that would be far longer than the rest are cut. ",
        element("b", "Filled"),
        " bars skip zeros, pale ones multiply by every weight.",
        _borrowed_note(index),
    )
    missing = _missing_list(everywhere)
    head = element("h2", "Times")
    return element("section", head, glance, intro, *parts, missing, id="times")


def _borrowed_note(index: Index) -> str | None:
    if not index.borrows():
        return None
    return (
        " *: a runtime that does not skip zeros, timed on the network's dense variant; its bar is "
        "hollow."
    )


def _model_bars(
    index: Index, facts: ModelFacts, everywhere: Sequence[Result], folded: bool
) -> Markup | None:
    panels = []
    for group in index.groups:
        entries = index.entries(facts, group)
        if entries:
            panels.append(bars(entries, str(group)))
    absent = [r for r in index.all_results(facts.name) if timed(r) is None]
    skip = {(r.runtime, r.detail) for r in everywhere}
    absent = [r for r in absent if (r.runtime, r.detail) not in skip]
    if not panels and not absent:
        return None
    body = join(
        (facts_line(facts), element("div", *panels, class_="grid panels"), _absent_list(absent))
    )
    title = facts.name if index.single or not facts.variant else label(facts)
    if not folded:
        return element("article", element("h4", title), body)
    summary = element("summary", element("b", title), " ", _summary(index, facts))
    return element("details", summary, body, open=is_ninety(facts))


def _summary(index: Index, facts: ModelFacts) -> Markup | None:
    """What a folded model's line says: our time, and the next best."""
    for group in index.groups:
        ours = index.ms(facts, OURS, group)
        if ours is None:
            continue
        rivals = [
            e for e in index.entries(facts, group) if e.result.runtime not in (OURS, OUR_DENSE)
        ]
        text = milliseconds(ours)
        if rivals:
            text += f", {compared(rivals[0].ms / ours)} {rivals[0].result.title}"
        return element("span", text, class_="aside")
    return None


def _missing_everywhere(index: Index) -> list[Result]:
    """Runtimes that are missing for the same reason for all models: told once."""
    first: dict[tuple[str, str], Result] = {}
    for r in index.comparison.results:
        if r.status == "missing":
            first.setdefault((r.runtime, r.detail), r)
    return list(first.values())


def _missing_list(missing: Sequence[Result]) -> Markup | None:
    if not missing:
        return None
    items = [
        element(
            "li",
            element("b", r.title or r.runtime),
            " ",
            badge(r),
            " ",
            element("code", r.detail) if r.detail else None,
        )
        for r in missing
    ]
    return join((element("h3", "Not installed here"), element("ul", *items, class_="absent")))


def _absent_list(absent: Sequence[Result]) -> Markup | None:
    """Runtimes without a time and why, each reason once."""
    reasons: dict[tuple[str, str, str], list[Result]] = {}
    for r in absent:
        reasons.setdefault((r.runtime, r.status, r.detail), []).append(r)
    items = []
    for same in reasons.values():
        r = same[0]
        groups = ", ".join(str(Group(one.precision, one.threads)) for one in same)
        items.append(
            element(
                "li", element("b", r.title or r.runtime), " ", badge(r), f" ({groups}) ", r.detail
            )
        )
    return element("ul", *items, class_="absent") if items else None


def numbers_section(index: Index) -> Markup | None:
    """Every number of every model."""
    if not index.comparison.results:
        return None
    folded = len(index.models) > MANY
    parts = []
    for network, models in index.networks.items():
        tables = [_numbers(index, m) for m in models]
        if folded:
            summary = element("summary", element("b", network), f" {len(models)} variants")
            parts.append(element("details", summary, *tables))
        else:
            parts += tables
    return element("section", element("h2", "All numbers"), *parts, id="numbers")


def _numbers(index: Index, facts: ModelFacts) -> Markup:
    known = facts.variant and not index.single
    title = f"{facts.network}, {label(facts)}" if known else facts.name
    head = element("h4", title)
    return element("article", head, digest_line(facts), results_table(index, facts))


def patterns_section(pictures: Iterable[PatternPicture]) -> Markup | None:
    """Weight matrices before and after pivoting."""
    figures = [_figure(picture) for picture in pictures]
    if not figures:
        return None
    intro = element(
        "p",
        "A row is an output channel, a column an input channel and tap. After pivoting, rows that "
        "use the same columns stand together, in blocks that a kernel reads at once; two shades "
        "tell one block of rows from the next, and pale cells are zeros that are multiplied "
        "nevertheless. Packed, the kernel sees only what is coloured.",
    )
    return element("section", element("h2", "Weight patterns"), intro, *figures, id="patterns")


def _figure(p: PatternPicture) -> Markup:
    rows, columns = p.shape
    shown = f"all {rows} x {columns} weights"
    if p.size[0] < rows or p.size[1] < columns:
        shown = f"the first {p.size[0]} of {rows} rows and {p.size[1]} of {columns} columns"
    about = element(
        "div",
        element("p", f"{p.pattern}, {percent(p.density)} kept"),
        element("p", f"{p.order}; run as {p.block} blocks"),
        element("p", f"shown: {shown}", class_="aside"),
        class_="about",
    )
    caption = element("figcaption", element("b", p.layer), about)
    pictures = (
        _image(p.before, p.size, "before", p.layer),
        _image(p.after, p.size_after, "after", p.layer),
        _image(p.packed, p.size_after, "packed", p.layer),
    )
    return element("figure", caption, *pictures, class_="pattern")


def _image(data: bytes, size: tuple[int, int], title: str, layer: str) -> Markup:
    rows, columns = size
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    image = element(
        "img",
        src=source,
        alt=f"non-zero weights of {layer}, {title}",
        width=columns,
        height=rows,
        style=f"width:{columns / WINDOW * 100:.1f}%",
    )
    return element("div", element("span", title, class_="stage"), image, class_="picture")
