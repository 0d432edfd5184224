"""The report's tables: every result in numbers, noise, and the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

from .charts_bars import bar_style
from .html_data import NAME, OURS, Group, Index, label, timed
from .html_text import (
    NONE,
    Markup,
    amount,
    element,
    join,
    milliseconds,
    number,
    percent,
    ratio,
    scientific,
    several,
)
from .results import LayerTime, ModelFacts, Noise, PerLayer, Result

_RESULT_HEAD = (
    ("threads", "asked for, and verified by cores used"),
    ("median ms", "of all timed calls"),
    ("min ms", "of all timed calls"),
    ("spread", "distance between the quartiles of the turns' medians, over the median"),
    ("speed-up", f"of {NAME} over the runtime; below 1 it is faster than we are"),
    ("max error", "largest difference from the reference, over its largest magnitude"),
    ("cores", "CPU time over wall time of the timed calls"),
    ("convert s", "converting and compiling the ONNX file, once"),
    ("load s", "loading what was deployed"),
    ("first run ms", "the first inference after loading"),
    ("peak MB", "largest resident size of the process"),
    ("model MB", "the same, less the resident size before the model was loaded"),
    ("file MB", "size of the deployed files"),
    ("version", "the runtime's own"),
)
# Columns of words.
_LEFT = ("version", "kind", "pattern", "runs", "bound", "runtime")


def scrolling(table: Markup, name: str) -> Markup:
    """The table in a box of its own that scrolls sideways, by keyboard too."""
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def table(head: Sequence[tuple[str, str]], rows: Sequence[Markup], first: str) -> Markup:
    """A table with `first` above the row names and tooltips on the other heads."""
    cells = [
        element(
            "th", text, title=hint or None, scope="col", class_="left" if text in _LEFT else None
        )
        for text, hint in head
    ]
    top = element("tr", element("th", first, scope="col"), *cells)
    return element("table", element("thead", top), element("tbody", *rows))


def results_table(index: Index, facts: ModelFacts) -> Markup:
    """Everything measured of one model."""
    rows: list[Markup] = []
    for group in index.groups:
        for i, r in enumerate(index.results(facts.name, group)):
            rows.append(_result_row(index, facts, group, r, first=not i and bool(rows)))
    return scrolling(table(_RESULT_HEAD, rows, "runtime"), f"results of {facts.name}")


def _result_row(index: Index, facts: ModelFacts, group: Group, r: Result, *, first: bool) -> Markup:
    threads = str(r.threads) if r.precision == "fp32" else f"{r.threads}, {r.precision}"
    ms = timed(r)
    ours = index.ms(facts, OURS, group)
    over = ms / ours if ms and ours and r.runtime != OURS else None
    name = element("th", r.title or r.runtime, scope="row", title=_settings(r) or None)
    cost = (
        _cell(number(r.convert_s)),
        _cell(number(r.load_s)),
        _cell(number(r.first_run_ms)),
        _cell(number(r.peak_memory_mb)),
        _cell(number(r.model_memory_mb)),
        _cell(number(r.file_mb)),
        _cell(r.version or NONE, "version"),
    )
    error = _cell(scientific(r.max_error))
    if ms is None:
        why = element("td", badge(r), " ", _brief(r.detail), colspan="4", class_="why")
        times: tuple[Markup, ...] = (why, error, _cell(number(r.cores_used, 2)))
    else:
        times = (
            _cell(_exact(ms), "median"),
            _cell(_exact(r.min_ms)),
            _cell(percent(r.spread)),
            _cell(ratio(over), "behind" if over is not None and over < 1 else ""),
            error,
            _cell(number(r.cores_used, 2)),
        )
    style = f"{bar_style(r.runtime)}{' next' if first else ''}"
    return element("tr", name, _cell(threads), *times, *cost, class_=style)


def _cell(text: str, style: str = "") -> Markup:
    return element("td", text, class_=style or None)


def _exact(value: float | None, digits: int = 4) -> Markup:
    """The number for people, and in full for programs."""
    text = number(value, digits)
    if value is None:
        return element("span", text)
    return element("data", text, value=repr(float(value)))


def _settings(r: Result) -> str:
    return ", ".join(f"{s.name} = {s.value}" for s in r.settings)


def _brief(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def badge(r: Result) -> Markup:
    """The status of a result that has no time, as a word."""
    status = r.status if r.status != "ok" else "no time"
    return element("span", status, class_=f"badge {r.status}")


def facts_line(facts: ModelFacts) -> Markup:
    """What a model is, in one line: how many of its weights and operations are left."""
    parts = []
    if facts.density == facts.density:  # not where nothing describes the model
        parts.append(f"{percent(facts.density, 3)} of the weights kept")
    if facts.pattern and facts.pattern != "dense":
        parts.append(f"mostly {facts.pattern}")
    if facts.flops_dense:
        kept, dense = amount(facts.flops_kept, "FLOP"), amount(facts.flops_dense, "FLOP")
        parts.append(f"{kept} of {dense} kept")
    return element("p", escape_join(parts), class_="facts")


def digest_line(facts: ModelFacts) -> Markup | None:
    """Which file it was."""
    if not facts.sha256:
        return None
    digest = element("code", facts.sha256[:16], title=facts.sha256)
    name = f"{facts.name}, " if facts.variant else ""
    return element("p", f"{name}SHA-256 ", digest, class_="facts")


def escape_join(parts: Sequence[str]) -> Markup:
    """The texts with dots between them."""
    return join([text for part in parts for text in (" · ", part)][1:])


def noise_table(noise: Sequence[Noise], index: Index) -> Markup:
    """Each runtime that was measured twice."""
    names = {m.name: f"{m.network} {label(m)}" for m in index.models if m.variant}
    rows = [
        element(
            "tr",
            element("th", names.get(n.model, n.model), scope="row"),
            _cell(index.titles.get(n.runtime, n.runtime), "version"),
            _cell(str(n.threads) if n.precision == "fp32" else f"{n.threads}, {n.precision}"),
            _cell(number(n.ratio, 4)),
        )
        for n in noise
    ]
    head = (("runtime", ""), ("threads", ""), ("second / first", "1 on a quiet machine"))
    return scrolling(table(head, rows, "model"), "noise")


_LAYER_HEAD = (
    ("kind", ""),
    ("pattern", "where the layer's zeros lie"),
    ("density", "kept weights / all weights"),
    ("runs", "sparse, or dense where skipping zeros would not pay"),
    ("ms", "median time inside whole runs of the network; the bar is its share of the whole"),
    ("dense ms", "the same layer in our dense build"),
    ("FLOP", "operations of the non-zero weights"),
    ("bytes", "that must be moved at least"),
    ("limit ms", "what the machine's peak and bandwidth allow"),
    ("% of limit", "limit over time: 100 % cannot be beaten"),
    ("bound", "what sets the limit"),
    ("of linear", "speed-up over the dense layer times density: 100 % where time is as density"),
)


def layers_table(measured: PerLayer) -> Markup:
    """Each step of one network beside the machine's limit."""
    total = sum(layer.ms for layer in measured.layers) or 1.0
    most = max((layer.ms for layer in measured.layers), default=1.0) or 1.0
    rows = [_layer_row(layer, total, most) for layer in measured.layers]
    return scrolling(table(_LAYER_HEAD, rows, "layer"), f"layers of {measured.model}")


def _layer_row(layer: LayerTime, total: float, most: float) -> Markup:
    known = layer.kind != "other"
    limited = layer.limit_ms > 0
    of_limit = layer.limit_ms / layer.ms if limited and layer.ms > 0 else None
    bar = element("span", "", class_="share", style=f"width:{layer.ms / most * 100:.1f}%")
    share = f"{percent(layer.ms / total)} of the time of all steps"
    linear = layer.fraction_of_linear
    return element(
        "tr",
        element("th", layer.name, scope="row"),
        _cell(layer.kind, "version"),
        _cell(layer.pattern or NONE, "version"),
        _cell(percent(layer.density, 3) if known else NONE),
        _cell(layer.mode or NONE, "version"),
        element("td", bar, _exact(layer.ms, 3), class_="median bar-cell", title=share),
        _cell(number(layer.dense_ms)),
        _cell(amount(layer.flops) if layer.flops else NONE),
        _cell(amount(layer.bytes) if layer.bytes else NONE),
        _cell(number(layer.limit_ms) if limited else NONE),
        _shaded(of_limit),
        _cell(layer.bound if limited else NONE, "version"),
        _shaded(linear),
        class_="other" if not known else None,
    )


def _shaded(share: float | None) -> Markup:
    """A share whose background is the deeper the nearer it is to 1."""
    if share is None:
        return _cell(NONE)
    strength = min(max(share, 0.0), 1.0)
    return element("td", percent(share), class_="shaded", style=f"--s:{strength:.2f}")


def roofline_line(measured: PerLayer) -> Markup:
    """The machine's limits that the layers are held against."""
    r = measured.roofline
    text = escape_join(
        (
            f"{several(measured.threads, 'thread')}: {milliseconds(measured.total_ms)} in all",
            f"peak {number(r.gflops)} GFLOP/s",
            f"L2 {number(r.l2_gbs)} GB/s up to {amount(r.l2_bytes, 'B')}",
            f"L3 {number(r.l3_gbs)} GB/s up to {amount(r.l3_bytes, 'B')}",
            f"memory {number(r.memory_gbs)} GB/s",
        )
    )
    return element("p", text, class_="facts")
