"""The report of a comparison as one HTML file: no network, no scripts, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from .html_data import NAME, Index, label, median
from .html_finding import finding
from .html_sections import bars_section, density_section, numbers_section, patterns_section
from .html_tables import layers_table, noise_table, roofline_line
from .html_text import Markup, element, join, percent, several
from .patterns import PatternPicture
from .results import Comparison, Machine

# Instruction sets that decide how fast a runtime can be; a CPU lists a hundred others.
_FEATURES = ("avx", "fma", "amx", "sse4", "f16c", "neon", "asimd", "sve", "bf16", "dotprod")
# The browser is told too that nothing is to be loaded or run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_html(comparison: Comparison, path: Path, pictures: Sequence[PatternPicture] = ()) -> None:
    """Write a comparison as one self-contained HTML file.

    Args:
        comparison: may lack anything: our own times, all times, the layers.
        path: the file.
        pictures: weight patterns to show, see `pattern_pictures`.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(page(comparison, pictures), encoding="utf-8")


def page(comparison: Comparison, pictures: Sequence[PatternPicture] = ()) -> str:
    """The text of that file."""
    index = Index(comparison)
    sections = [
        ("density", "Density", density_section(index)),
        ("times", "Times", bars_section(index)),
        ("numbers", "Numbers", numbers_section(index)),
        ("noise", "Noise", _noise_section(index)),
        ("layers", "Layers", _layers_section(index)),
        ("patterns", "Patterns", patterns_section(pictures)),
    ]
    shown = [(key, short, body) for key, short, body in sections if body is not None]
    links = [element("a", short, href=f"#{key}") for key, short, _ in shown]
    body = element(
        "body",
        element(
            "main",
            _header(index),
            element("nav", *links, aria_label="sections") if links else None,
            *(body for _, _, body in shown),
        ),
    )
    html = element("html", _head(_title(index)), body, lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def _head(title: str) -> Markup:
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(style)),
    )


def _title(index: Index) -> str:
    networks = list(index.networks)
    what = networks[0] if len(networks) == 1 else several(len(networks), "network")
    return f"{NAME} benchmark: {what}"


def _header(index: Index) -> Markup:
    c = index.comparison
    headline, more = finding(index)
    limits = ", ".join(f"{t.name}: {t.value}" for t in c.tolerances)
    rows = [
        ("Measured", _date(c.date)),
        ("Machine", _machine(c.machine)),
        ("Instructions", _features(c.machine)),
        ("System", f"{c.machine.system}, Python {c.machine.python}"),
        ("Checked against", c.reference),
        ("Largest error allowed", limits),
        ("Versions", _versions(index)),
    ]
    facts = [
        element("div", element("dt", name), element("dd", text)) for name, text in rows if text
    ]
    again = element("pre", element("code", c.command), tabindex="0", aria_label="command")
    return element(
        "header",
        element("p", _title(index), class_="kicker"),
        element("h1", headline),
        element("p", more, class_="lead") if more else None,
        element("dl", *facts),
        join((element("h2", "Repeat it", class_="small"), again)) if c.command else None,
    )


def _date(date: str) -> str:
    return date.replace("T", " ").removesuffix("+00:00").removesuffix("Z") + " UTC" if date else ""


def _machine(m: Machine) -> str:
    return f"{m.cpu}, {several(m.cores, 'core')}, {m.memory_gb:.0f} GB of memory"


def _features(m: Machine) -> str:
    return ", ".join(f for f in m.features if f.lower().startswith(_FEATURES))


def _versions(index: Index) -> str:
    """Each runtime's version once, ours first; not once more for every way to configure it."""
    seen: dict[str, str] = {}
    for r in index.comparison.results:
        if r.version:
            seen.setdefault(r.runtime, r.version)
    names = (name for name in index.runtimes() if name in seen)
    return " · ".join(
        dict.fromkeys(f"{index.titles[name].partition(',')[0]} {seen[name]}" for name in names)
    )


def _noise_section(index: Index) -> Markup | None:
    noise = index.comparison.noise
    if not noise:
        return None
    off = [abs(n.ratio - 1) for n in noise]
    said = element(
        "p",
        f"The same runtime was measured twice in the same run ({several(len(off), 'pair')}). "
        "The two differed by ",
        element("b", percent(median(off))),
        f" (median) and {percent(max(off))} at most: ratios closer to 1 than that say nothing.",
    )
    folded = element("details", element("summary", "All pairs"), noise_table(noise, index))
    return element("section", element("h2", "Noise"), said, folded, id="noise")


def _layers_section(index: Index) -> Markup | None:
    measured = [m for m in index.comparison.per_layer if m.layers]
    if not measured:
        return None
    names = {m.name: f"{m.network}, {label(m)}" for m in index.models if m.variant}
    parts = [
        element(
            "article",
            element("h4", names.get(one.model, one.model)),
            roofline_line(one),
            layers_table(one),
        )
        for one in measured
    ]
    intro = element(
        "p",
        "Each step of our build beside what this machine allows: the larger of the time to compute "
        "and the time to move what must be moved.",
    )
    return element("section", element("h2", "Layer by layer"), intro, *parts, id="layers")
