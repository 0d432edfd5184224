"""Charts and text of the HTML report: places, numbers for people, escaping."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from tvm_pivot.bench import charts
from tvm_pivot.bench.charts import Point, Scale, Series
from tvm_pivot.bench.html_text import Markup, amount, element, escape, number, percent, ratio


def test_speedup_chart_places_points_on_the_linear_line() -> None:
    points = tuple(Point(d, 1 / d, "blocks", 1 / d, 1 / d, "p") for d in (0.5, 0.1, 0.05))
    series = [Series("ours", "ours", points), Series("slow", "flat", (
        Point(1.0, 0.01, "dense", 0.01, 0.01, "slow"),))]  # fmt: skip
    svg = ElementTree.fromstring(charts.speedup_chart(series, "<chart>"))
    names = {"s": "http://www.w3.org/2000/svg"}
    (linear,) = svg.findall(".//s:line[@class='linear']", names)
    x1, y1, x2, y2 = (float(linear.get(k, "").rstrip("%")) for k in ("x1", "y1", "x2", "y2"))
    marks = svg.findall(".//s:svg[@class='at']", names)
    assert len(marks) == 3
    for mark in marks:
        x, y = float(mark.get("x", "").rstrip("%")), float(mark.get("y", ""))
        assert y == pytest.approx(y1 + (x - x1) / (x2 - x1) * (y2 - y1), abs=0.2)
    assert not svg.findall(".//s:g[@class='series flat']/s:line", names)  # below the chart


def test_scales() -> None:
    scale = Scale(0.05, 0.5, 20.0)
    assert scale.x(1.0) == 0 and scale.x(0.05) == 1
    assert scale.y(20.0) == 0 and scale.y(0.5) == scale.y(0.001) == charts.HEIGHT
    assert charts.spread_out([10, 12, 90, 99], 14, 100) == [10, 24, 86, 100]
    assert charts.spread_out([], 14, 100) == []


def test_numbers_for_people() -> None:
    assert [number(x) for x in (7.626, 52.46, 1631.4, 0.0834, 99.96, 0, None, math.inf)] == [
        "7.63", "52.5", "1,631", "0.0834", "100", "0", "\u2013", "\u2013"
    ]  # fmt: skip
    assert [ratio(x) for x in (9.96, 2.04, 1.04, 0.5)] == [
        "10\u00d7", "2.0\u00d7", "1.04\u00d7", "0.50\u00d7"
    ]  # fmt: skip
    assert [percent(x) for x in (1.0, 0.1, 0.0123, None)] == ["100 %", "10 %", "1.2 %", "\u2013"]
    assert [amount(x, "FLOP") for x in (8_178_000_000, 12)] == ["8.18 GFLOP", "12 FLOP"]


def test_elements_escape_what_is_not_markup() -> None:
    assert element("td", "<b>", Markup("<i></i>"), None, title='"&', colspan=4.0, hidden=True) == (
        '<td title="&quot;&amp;" colspan="4" hidden="hidden">&lt;b&gt;<i></i></td>'
    )
    assert escape("a\x00\ud800b") == "a\ufffd?b"
