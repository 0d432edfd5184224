"""Making HTML and SVG text that is safe by construction, and writing numbers for people."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

_EMPTY = {"circle", "img", "line", "meta", "path", "rect"}
# HTML and XML have no place for these, not even as references.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
NONE = "–"  # noqa: RUF001 (an en dash: there is no number)
TIMES = "×"  # noqa: RUF001


class Markup(str):
    """Text that is HTML or SVG already; any other `str` is escaped where it is put in."""

    __slots__ = ()


Child = str | None


def escape(text: str) -> Markup:
    """`text`, which may come from anywhere, as HTML and XML text or attribute value."""
    if isinstance(text, Markup):
        return text
    plain = _CONTROL.sub("\ufffd", text).encode("utf-8", "replace").decode()
    return Markup(html.escape(plain))


def join(children: Iterable[Child]) -> Markup:
    """One after the other; None is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def element(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An HTML or SVG element.

    Args:
        name: e.g. ``"td"``.
        children: Markup is put in as it is, other text is escaped, None is left out.
        attributes: `class_` is class, `stroke_width` is stroke-width; None and False are left
            out, True is the attribute's own name (``open="open"``).
    """
    written = "".join(
        f' {_attribute(key)}="{_value(key, value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _EMPTY and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def _attribute(key: str) -> str:
    return "viewBox" if key == "viewBox" else key.rstrip("_").replace("_", "-")


def _value(key: str, value: str | float | bool) -> str:
    if value is True:
        return _attribute(key)
    return escape(value) if isinstance(value, str) else f"{value:g}"


def percent_position(share: float) -> str:
    """A place along an axis for an SVG attribute: ``0.25 -> "25%"``."""
    return f"{share * 100:.4g}%"


def number(value: float | None, digits: int = 3) -> str:
    """That many significant digits, thousands apart: ``1631.4 -> "1,631"``; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value
    return f"{value:,.{min(max(digits - 1 - exponent, 0), 9)}f}"


def milliseconds(value: float | None) -> str:
    """``"7.63 ms"``; a dash for None."""
    return NONE if value is None else f"{number(value)} ms"


def ratio(value: float | None) -> str:
    """``"4.9x"`` with a real multiplication sign; near 1 with a digit more."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{number(value, 3 if 0.995 <= value < 1.095 else 2)}{TIMES}"


def percent(share: float | None, digits: int = 2) -> str:
    """That many significant digits: ``0.1 -> "10 %"``; a dash for None."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{number(share * 100, digits)} %"


def amount(count: float, unit: str = "") -> str:
    """``8_178_000_000 -> "8.18 G"``, with the unit after the prefix."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{number(count / size)} {prefix}{unit}"
    return f"{count:g} {unit}".rstrip()


def scientific(value: float | None) -> str:
    """``0.00000234 -> "2.3e-06"``; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    return "0" if value == 0 else f"{value:.1e}"


def several(count: int, noun: str) -> str:
    """``2, "thread" -> "2 threads"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
