"""A comparison as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import environments
from .results import Comparison, ModelFacts, Noise, PerLayer, Result
from .runtimes import ADAPTERS, adapter

_OURS = "pivot"
_WIDE = 118  # columns a table with everything in it needs


def show(comparison: Comparison, console: Console) -> None:
    """Print one table per model, precision and number of threads, then the per-layer tables."""
    machine = comparison.machine
    console.print(
        f"{escape(machine.cpu)}, {machine.cores} cores, {machine.memory_gb:.0f} GB; "
        f"{escape(machine.system)}; {comparison.date}"
    )
    console.print(f"outputs checked against {escape(comparison.reference)}")
    for model in comparison.models:
        results = [r for r in comparison.results if r.model == model.name]
        groups = dict.fromkeys((r.precision, r.threads) for r in results)
        console.print(f"\n[bold]{escape(model.name)}[/bold]: {_describe(model)}")
        for precision, threads in groups:
            group = [r for r in results if (r.precision, r.threads) == (precision, threads)]
            noise = [n for n in comparison.noise if _belongs(n, model, precision, threads)]
            _show_group(group, noise, console)
    for profile in comparison.per_layer:
        _show_layers(profile, console)


def show_runtimes(console: Console) -> None:
    """Print the runtimes there are, and how to install those that are not."""
    rows = Table("runtime", "what it is", "precisions", "installed")
    for name in ADAPTERS:
        runtime = adapter(name)
        state = "yes" if environments.is_ready(runtime) else environments.install_command(name)
        rows.add_row(name, runtime.title, ", ".join(runtime.precisions), escape(state))
    console.print(rows)


def _describe(model: ModelFacts) -> str:
    kept = model.flops_kept / model.flops_dense if model.flops_dense else 1.0
    return (
        f"{escape(model.pattern)}, density {model.density * 100:.1f} %, "
        f"{model.flops_dense / 1e9:.3g} GFLOP dense, {kept * 100:.1f} % of them kept"
    )


def _belongs(noise: Noise, model: ModelFacts, precision: str, threads: int) -> bool:
    return (noise.model, noise.precision, noise.threads) == (model.name, precision, threads)


def _show_group(results: list[Result], noise: Iterable[Noise], console: Console) -> None:
    precision, threads = results[0].precision, results[0].threads
    ours = next((r.median_ms for r in results if r.runtime == _OURS), None)
    wide = console.width >= _WIDE
    table = Table(title=f"{precision}, {threads} thread{'s'[: threads > 1]}", title_justify="left")
    table.add_column("runtime", overflow="fold")
    heads = ["median ms", "min ms", "spread", "over ours", "error"]
    heads += ["cores", "convert s", "load s", "first ms", "peak MB", "file MB"] if wide else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    timed = [r for r in results if r.median_ms is not None]
    for r in sorted(timed, key=lambda r: r.median_ms or 0.0):
        style = "bold" if r.runtime == _OURS else None
        table.add_row(_name(r), *_cells(r, ours, wide), style=style)
    console.print(table)
    if ours is not None:
        console.print("  over ours: how many times as long as tvm_pivot it takes")
    for r in results:
        if r.median_ms is None:
            error = "" if r.max_error is None else f" (max error {r.max_error:.1e})"
            console.print(f"  {escape(r.title)}: {r.status}{error}. {escape(r.detail)}")
    for n in noise:
        console.print(f"  noise: {n.runtime} measured twice, second over first: {n.ratio:.3f}")


def _name(result: Result) -> str:
    return f"{escape(result.title)} {escape(result.version)}".strip()


def _cells(r: Result, ours: float | None, wide: bool) -> list[str]:
    assert r.median_ms is not None
    ratio = "" if ours is None or r.runtime == _OURS else f"{r.median_ms / ours:.2f}x"
    spread = "" if r.spread is None else f"{r.spread * 100:.0f} %"
    cells = [_number(r.median_ms), _number(r.min_ms), spread, ratio, f"{r.max_error or 0:.0e}"]
    if wide:
        more = (r.cores_used, r.convert_s, r.load_s, r.first_run_ms, r.peak_memory_mb, r.file_mb)
        cells += map(_number, more)
    return cells


def _number(value: float | None) -> str:
    """Three significant digits, no exponent: ``1234.5 -> "1234"``, ``0.01234 -> "0.0123"``."""
    if value is None:
        return ""
    for digits, limit in ((0, 100.0), (1, 10.0), (2, 1.0), (3, 0.1)):
        if abs(value) >= limit:
            return f"{value:.{digits}f}"
    return f"{value:.4f}"


def _show_layers(profile: PerLayer, console: Console) -> None:
    roof = profile.roofline
    console.print(
        f"\n[bold]{escape(profile.model)}[/bold], each step of our build, {profile.threads} "
        f"thread{'s'[: profile.threads > 1]}: {profile.total_ms:.3f} ms in all"
    )
    console.print(
        f"this machine: {roof.gflops:.0f} GFLOP/s; {roof.l2_gbs:.0f} GB/s from L2, "
        f"{roof.l3_gbs:.0f} from L3, {roof.memory_gbs:.0f} from memory"
    )
    table = Table()
    table.add_column("step", overflow="fold")
    table.add_column("pattern", no_wrap=True)
    heads = ("density", "runs", "ms", "share", "dense ms", "of linear", "MFLOP", "MB")
    for head in (*heads, "limit ms", "of limit", "bound"):
        table.add_column(head, justify="left" if head in ("runs", "bound") else "right")
    for layer in profile.layers:
        linear = layer.fraction_of_linear
        table.add_row(
            escape(layer.name),
            escape(layer.pattern),
            "" if layer.kind == "other" else f"{layer.density * 100:.1f} %",
            layer.mode,
            f"{layer.ms:.4f}",
            f"{layer.ms / profile.total_ms * 100:.1f} %" if profile.total_ms else "",
            "" if layer.dense_ms is None else f"{layer.dense_ms:.4f}",
            "" if linear is None else f"{linear:.2f}",
            f"{layer.flops / 1e6:.1f}" if layer.flops else "",
            f"{layer.bytes / 1e6:.2f}",
            f"{layer.limit_ms:.4f}",
            f"{layer.limit_ms / layer.ms * 100:.0f} %" if layer.ms else "",
            layer.bound,
        )
    console.print(table)
