"""What the compiler found in a network and what it did about it: one line per layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from . import schema

_NAME_WIDTH = 28
_LINE_WIDTH = 116


@dataclass(frozen=True)
class BlockFill:
    """Non-zeros per slot of a layer's kept blocks, 0 to 1, for one block shape, e.g. ``"4x4"``."""

    block: str
    fill: float


@dataclass(frozen=True)
class Pivoted:
    """What an order of a layer's rows did for its blocks.

    Attributes:
        kind: what was found, e.g. ``"block-diagonal"`` or ``"searched"``.
        before, after: non-zeros per slot of the kept blocks, in the model's order and in this one.
    """

    kind: str
    before: float
    after: float


@dataclass(frozen=True)
class SharedOrder:
    """An order of channels that all layers of a group share; it is in their weights.

    Attributes:
        group: the group's name, after the first of its layers, e.g. ``"conv1 rows"``.
        side: what of this layer is in that order, ``"rows"`` or ``"columns"``.
        gain: predicted time before / after of the layers it was chosen for.
    """

    group: str
    side: Literal["rows", "columns"]
    gain: float


@dataclass(frozen=True)
class Moves:
    """Operators that depend on an input and only move elements at run time.

    Attributes:
        gathers: those that pick or place elements by index, or at a stride: take, gather, ...
        transposes: permutations of axes, other than of axes of extent 1.
    """

    gathers: int
    transposes: int


@dataclass(frozen=True)
class LayerReport:
    """One dense or convolution layer.

    Attributes:
        name: the layer's name in the model.
        op: ``"dense"``, ``"conv2d"``, ...
        shape: the weight's shape in the model, e.g. ``(64, 3, 7, 7)``.
        pattern: where the zeros are: ``"8x1 blocks"``, ``"unstructured"``, ``"dense"``, ``"dead"``.
        density: kept weights / all weights, 0 to 1.
        block: the block the kernel uses, ``"8x1"``; empty when the layer runs dense.
        fill: non-zeros per slot of the kept blocks, 0 to 1; the rest is padding.
        mode: ``"sparse"`` or ``"dense"``: how the layer runs.
        reason: why it runs that way, in words a user understands.
        flops_dense: floating-point operations of the layer with no zero skipped.
        flops_kept: operations of the weights that are not skipped: in a sparse layer the
            non-zero ones, in a dense one all that are left.
        kernel: the name of the kernel that runs it; empty when nothing was compiled.
        fills: what the fill of the model's own rows and columns would be with other blocks.
        pivot: the order its rows were given, or None where they have their own.
        shared: orders its rows and columns were given together with other layers.
        tuned: the tuning record that its kernel is made by; empty where the target's rule chose.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    block: str
    fill: float
    mode: Literal["sparse", "dense"]
    reason: str
    flops_dense: int
    flops_kept: int
    kernel: str
    fills: tuple[BlockFill, ...] = ()
    pivot: Pivoted | None = None
    shared: tuple[SharedOrder, ...] = ()
    tuned: str = ""

    def __post_init__(self) -> None:
        for field in ("density", "fill"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} must lie between 0 and 1, not {getattr(self, field)}")
        if self.mode not in ("sparse", "dense"):
            raise ValueError(f"mode must be 'sparse' or 'dense', not {self.mode!r}")
        if any(extent < 0 for extent in self.shape):
            raise ValueError(f"shape must not be negative: {self.shape}")
        if not 0 <= self.flops_kept <= self.flops_dense:
            raise ValueError(
                f"flops_kept must lie between 0 and {self.flops_dense}, not {self.flops_kept}"
            )


@dataclass(frozen=True)
class Report:
    """All layers of a network, in the order they run. ``print(report)`` shows a table.

    Attributes:
        layers: one `LayerReport` per dense or convolution layer.
        target: the name of the target the decisions were made for.
        notes: remarks on the whole network, e.g. how many dead rows were dropped.
        compile_seconds: how long compilation took; None when nothing was compiled.
        model_moves: gathers and transposes in the model; None where they cannot be counted.
        compiled_moves: those in the compiled graph; None when nothing was compiled.
    """

    layers: tuple[LayerReport, ...]
    target: str
    notes: tuple[str, ...] = ()
    compile_seconds: float | None = None
    model_moves: Moves | None = None
    compiled_moves: Moves | None = None

    @property
    def density(self) -> float:
        """Kept weights / all weights over all layers; 1.0 for a network without layers."""
        weights = sum(prod(layer.shape) for layer in self.layers)
        kept = sum(layer.density * prod(layer.shape) for layer in self.layers)
        return kept / weights if weights else 1.0

    @property
    def flops_dense(self) -> int:
        """Operations of all layers with no zero skipped."""
        return sum(layer.flops_dense for layer in self.layers)

    @property
    def flops_kept(self) -> int:
        """Operations of the weights of all layers that are not skipped."""
        return sum(layer.flops_kept for layer in self.layers)

    def to_json(self, *, indent: int | None = None) -> str:
        """The report as JSON text; `from_json` reads it back to an equal report."""
        return schema.dumps(self, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report `to_json` wrote.

        Raises:
            ArtifactError: the text is not such JSON; the message names the place.
        """
        return schema.loads(cls, text)

    def __str__(self) -> str:
        lines = _table(self.layers) if self.layers else ["no dense or convolution layers"]
        lines += ["", *_totals(self)]
        lines += _moves(self)
        lines += _pivots(self.layers)
        lines += _shared_orders(self.layers)
        lines += _dense_reasons(self.layers)
        lines += _tuned(self.layers)
        lines += [wrapped for note in self.notes for wrapped in _wrap("note: ", note)]
        return "\n".join(lines)


def _table(layers: Iterable[LayerReport]) -> list[str]:
    head = ("layer", "op", "shape", "pattern", "density", "block", "fill", "runs", "FLOPs kept")
    rows = [_cells(layer) for layer in layers]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left = (True, True, False, True, False, False, False, True, False)

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, left, strict=True)
        return "  ".join(c.ljust(w) if le else c.rjust(w) for c, w, le in parts).rstrip()

    return [line(head), "-" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)]


def _cells(layer: LayerReport) -> tuple[str, ...]:
    sparse = layer.mode == "sparse"
    return (
        _shorten(layer.name, _NAME_WIDTH),
        _shorten(layer.op, 8),
        "x".join(map(str, layer.shape)),
        _shorten(layer.pattern, 13),
        _percent(layer.density),
        layer.block or "-",
        # The fill of a layer that runs dense says nothing about how it runs.
        f"{layer.fill * 100:.0f} %" if sparse else "-",
        layer.mode,
        f"{_human(layer.flops_kept)} of {_human(layer.flops_dense)}",
    )


def _totals(report: Report) -> list[str]:
    sparse = sum(layer.mode == "sparse" for layer in report.layers)
    kept, dense = report.flops_kept, report.flops_dense
    share = f" ({_percent(kept / dense)})" if dense else ""
    total = (
        f"total: {sparse} of {len(report.layers)} layers sparse, density "
        f"{_percent(report.density)}, FLOPs kept {_human(kept)} of {_human(dense)}{share}"
    )
    seconds = report.compile_seconds
    state = "not compiled" if seconds is None else f"compiled in {seconds:.1f} s"
    return [total, f"target: {report.target}, {state}"]


def _moves(report: Report) -> list[str]:
    model, compiled = report.model_moves, report.compiled_moves
    if model is None or compiled is None:
        return []
    return [
        f"moves at run time: {compiled.gathers} gathers, {compiled.transposes} transposes "
        f"(the model: {model.gathers}, {model.transposes})"
    ]


def _shared_orders(layers: Iterable[LayerReport]) -> list[str]:
    """The groups of channels that were given an order, and whose rows and columns they are."""
    groups: dict[tuple[str, float], list[str]] = {}
    for layer in layers:
        for order in layer.shared:
            groups.setdefault((order.group, order.gain), []).append(f"{layer.name} {order.side}")
    lines = []
    for (_, gain), sides in groups.items():
        shown = ", ".join(sides[:6]) + (f" and {len(sides) - 6} more" if len(sides) > 6 else "")
        lines += _wrap("order: ", f"shared by {shown}: predicted {gain:.2f}x")
    return lines


def _pivots(layers: Iterable[LayerReport]) -> list[str]:
    """Layers whose rows were given another order, grouped by what it was made for."""
    groups: dict[str, list[tuple[str, Pivoted]]] = {}
    for layer in layers:
        if layer.pivot is not None:
            groups.setdefault(layer.pivot.kind, []).append((layer.name, layer.pivot))
    lines = []
    for kind, found in groups.items():
        before, after = (
            100 * sum(getattr(pivot, when) for _, pivot in found) / len(found)
            for when in ("before", "after")
        )
        mean = "mean fill" if len(found) > 1 else "fill"
        names = _names([name for name, _ in found])
        lines += _wrap("pivot: ", f"{kind}, {mean} {before:.0f} % -> {after:.0f} % [{names}]")
    return lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _tuned(layers: Iterable[LayerReport]) -> list[str]:
    """Layers whose kernels are made by tuning records, grouped by what these are of."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.tuned:
            groups.setdefault(layer.tuned, []).append(layer.name)
    lines = []
    for record, names in groups.items():
        lines += _wrap("tuned: ", f"{record}, {len(names)} layers [{_names(names)}]")
    return lines


def _dense_reasons(layers: Iterable[LayerReport]) -> list[str]:
    """Layers that run dense, grouped by why: a reason is the same for many layers."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.mode == "dense" and layer.reason:
            groups.setdefault(layer.reason, []).append(layer.name)
    lines = []
    for reason, names in groups.items():
        lines += _wrap("dense: ", f"{reason} [{_names(names)}]")
    return lines


def _wrap(label: str, text: str) -> list[str]:
    """`text` after `label`, broken at spaces and indented under its own start."""
    lines, line = [], label
    for word in text.split():
        if len(line) > len(label) and len(line) + len(word) + 1 > _LINE_WIDTH:
            lines.append(line)
            line = " " * len(label)
        line += word if len(line) == len(label) else f" {word}"
    return [*lines, line]


def _shorten(text: str, width: int) -> str:
    """Cut the middle out: names differ at their ends (``/layer3/conv1`` and ``conv2``)."""
    if len(text) <= width:
        return text
    tail = (width - 2) * 2 // 3
    return f"{text[: width - 2 - tail]}..{text[-tail:]}"


def _percent(share: float) -> str:
    """``0.1 -> "10.0 %"``; what is not zero never prints as zero."""
    return "<0.1 %" if 0 < share < 0.0005 else f"{share * 100:.1f} %"


def _human(count: int) -> str:
    """Three significant digits: ``59_012_345 -> "59.0 M"``."""
    value, unit = float(count), ""
    for larger in ("K", "M", "G", "T"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if not unit:
        return str(count)
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
