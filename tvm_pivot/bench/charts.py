"""Speed-up against density as an inline SVG.

Places along x are percentages and places along y pixels, so that a chart fills any width while its
text keeps its size: a phone gets a narrower chart, not smaller letters. Both axes are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from .html_text import TIMES, Markup, element, join, percent_position, ratio

Family = Literal["dense", "blocks", "unstructured", "other"]

HEIGHT = 250.0
# Slower than this is below the chart: it would press all others together.
LEAST = 0.3
_LONGEST_NAME = 16
_LINE_HEIGHT = 14.0
_DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
_SPEEDUPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True)
class Point:
    """One time of a runtime as a speed-up; over several variants, their geometric mean.

    Attributes:
        density: kept weights / all weights.
        speedup: over the baseline.
        family: of the variant; decides the marker.
        low, high: the least and the largest speed-up of the variants it stands for.
        text: what the tooltip says.
    """

    density: float
    speedup: float
    family: Family
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    """One runtime's points.

    Attributes:
        title: shown at the right end of its line.
        style: the CSS class that colours it: ``"ours"``, ``"rival-1"``, ..., ``"flat"``.
        points: in any order; each family is a line of its own.
    """

    title: str
    style: str
    points: tuple[Point, ...]

    @property
    def flat(self) -> bool:
        """Drawn thin, without markers: it does not skip zeros."""
        return self.style == "flat"

    @property
    def mean(self) -> float:
        """The geometric mean of its speed-ups."""
        return math.exp(sum(math.log(p.speedup) for p in self.points) / len(self.points))


@dataclass(frozen=True)
class Scale:
    """From densities and speed-ups to places: x in shares of the width, y in pixels."""

    least_density: float
    low: float
    high: float

    def x(self, density: float) -> float:
        """0 for a dense network, 1 for the sparsest."""
        return math.log(density) / math.log(self.least_density)

    def y(self, speedup: float) -> float:
        """0 at the top; `HEIGHT` for all that is below the chart."""
        speedup = max(speedup, self.low)
        return HEIGHT * math.log(self.high / speedup) / math.log(self.high / self.low)


def scale_for(series: Iterable[Series]) -> Scale:
    """Room for all points and for the linear line."""
    points = [p for one in series for p in one.points]
    least = min([0.05, *(p.density for p in points)]) * 0.98
    low = max(min([0.8, *(p.low * 0.9 for p in points)]), LEAST)
    high = max([1 / least, *(p.high * 1.1 for p in points)])
    return Scale(least, low, high)


def speedup_chart(series: Sequence[Series], description: str) -> Markup:
    """The chart; labels stand right of it and y ticks left, outside of its own box.

    Args:
        series: those that skip zeros, ours last so that it lies on top, and flat ones.
        description: what a screen reader says.
    """
    scale = scale_for(series)
    ordered = sorted(series, key=lambda one: (one.style == "ours", not one.flat))
    return element(
        "svg",
        element("title", description),
        *_grid(scale),
        _linear(scale),
        *(_series(one, scale) for one in ordered),
        *_labels(series, scale),
        class_="plot",
        width="100%",
        height=HEIGHT + 34,
        role="img",
        xmlns="http://www.w3.org/2000/svg",
    )


def _grid(scale: Scale) -> list[Markup]:
    parts = []
    for speedup in _SPEEDUPS:
        if scale.low <= speedup <= scale.high:
            y = scale.y(speedup)
            style = "one" if speedup == 1 else "rule"
            parts.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_=style))
            text = f"{speedup:g}{TIMES}"
            parts.append(element("text", text, x=-8, y=y + 4, class_="tick end"))
    for density in _DENSITIES:
        if density >= scale.least_density:
            x = percent_position(scale.x(density))
            parts.append(element("line", x1=x, x2=x, y1=0, y2=HEIGHT, class_="rule"))
            text = f"{density * 100:g} %"
            parts.append(element("text", text, x=x, y=HEIGHT + 17, class_="tick middle"))
    caption = "weights kept"
    parts.append(element("text", caption, x="50%", y=HEIGHT + 33, class_="axis middle"))
    return parts


def _linear(scale: Scale) -> Markup:
    return _segment(scale, (1.0, 1.0), (scale.least_density, 1 / scale.least_density), "linear")


def _segment(
    scale: Scale, start: tuple[float, float], end: tuple[float, float], style: str
) -> Markup:
    (d1, s1), (d2, s2) = start, end
    return element(
        "line",
        x1=percent_position(scale.x(d1)),
        y1=round(scale.y(s1), 1),
        x2=percent_position(scale.x(d2)),
        y2=round(scale.y(s2), 1),
        class_=style,
    )


def _series(one: Series, scale: Scale) -> Markup:
    if one.flat:
        return element("g", *_flat(one, scale), class_="series flat")
    parts = []
    dense = [p for p in one.points if p.family == "dense"]
    for family in ("unstructured", "other", "blocks"):
        line = [p for p in one.points if p.family == family]
        if line:  # the dense variant is where every line begins
            line += dense
        line.sort(key=lambda p: -p.density)
        for p, q in pairwise(line):
            ends = (p.density, p.speedup), (q.density, q.speedup)
            parts.append(_segment(scale, *ends, f"line {family}"))
    parts += [_mark(p, scale, one.style == "ours") for p in one.points]
    return element("g", element("title", one.title), *parts, class_=f"series {one.style}")


def _flat(one: Series, scale: Scale) -> list[Markup]:
    """A thin line over the whole width: zeros change nothing for such a runtime."""
    mean = one.mean
    if mean < scale.low:
        return []
    text = f"{one.title}: {ratio(mean)}"
    y = round(scale.y(mean), 1)
    line = element("line", element("title", text), x1="0", x2="100%", y1=y, y2=y, class_="line")
    return [line]


def _mark(p: Point, scale: Scale, ours: bool) -> Markup:
    """A marker at its place; for ours also how far block shapes differ."""
    y = scale.y(p.speedup)
    spread = None
    if ours and p.high > p.low * 1.02:
        y1, y2 = round(scale.y(p.high) - y, 1), round(scale.y(p.low) - y, 1)
        spread = element("line", x1=0, x2=0, y1=y1, y2=y2, class_="range")
    x = percent_position(scale.x(p.density))
    return element(
        "svg", element("title", p.text), spread, marker(p.family), class_="at", x=x, y=round(y, 1)
    )


def marker(family: Family) -> Markup:
    """A square for blocks, a ring for single weights, a diamond for other patterns; a dot for
    dense weights. Around 0."""
    if family == "dense":
        return element("circle", cx=0, cy=0, r=3.5, class_="mark")
    if family == "blocks":
        return element("rect", x=-4, y=-4, width=8, height=8, class_="mark")
    if family == "unstructured":
        return element("circle", cx=0, cy=0, r=4.2, class_="mark ring")
    return element("path", d="M0 -5.5 5.5 0 0 5.5 -5.5 0z", class_="mark")


def _labels(series: Sequence[Series], scale: Scale) -> list[Markup]:
    """Names right of the chart at the height of their lines' ends, moved apart where needed."""
    wanted = [("linear", "linear", 1 / scale.least_density)]
    for one in series:
        if one.points and not one.flat:
            last = min(one.points, key=lambda p: (p.density, -p.speedup))
            wanted.append((one.title, one.style, last.speedup))
    flat = sorted(one.mean for one in series if one.flat and one.mean >= scale.low)
    if flat:
        wanted.append(("no zeros skipped", "flat", flat[len(flat) // 2]))
    wanted.sort(key=lambda item: scale.y(item[2]))
    places = spread_out([scale.y(speedup) for _, _, speedup in wanted], _LINE_HEIGHT, HEIGHT)
    labels = []
    for (title, style, speedup), place in zip(wanted, places, strict=True):
        away = round(scale.y(speedup) - place, 1)
        inside = join(
            (
                element("path", d=f"M3 {away} 12 0", class_="leader"),
                element("text", _shortened(title), x=15, y=4, class_="name"),
            )
        )
        y = round(place, 1)
        labels.append(element("svg", inside, class_=f"at label {style}", x="100%", y=y))
    return labels


def _shortened(title: str) -> str:
    return title if len(title) <= _LONGEST_NAME else f"{title[: _LONGEST_NAME - 1].rstrip(' ,')}…"


def spread_out(places: Sequence[float], gap: float, most: float) -> list[float]:
    """Ascending places moved as little as is simple to be `gap` apart, none beyond `most`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, 0.0))
    limit = most
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved
