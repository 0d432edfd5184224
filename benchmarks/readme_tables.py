"""Writes the tables of README.md from the results: ``python -m benchmarks.readme_tables``.

With ``--check`` it changes nothing and exits with 1 where README.md is not what it would write.
A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
from benchmarks.arm_cost import results as arm_cost
from tvm_pivot.bench.results import Comparison, Result
from tvm_pivot.bench.runtimes import ADAPTERS

README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
SHOWN_VARIANTS = ("dense", "8x1@0.1", "16x1@0.1", "1x1@0.1", "dlmc@0.1")
OURS = "pivot"
# Whole networks: the tables' name, and the results of a machine.
NETWORKS = {"networks": "standing_set.json", "xeon networks": "standing_set_xeon.json"}


def layers_table(layers: dict[str, Any]) -> list[str]:
    """Single layers: one line per shape and pattern, from ``layers.json``."""
    head = ("pixels, K, N", "zeros", "density", "torch dense", "own dense", "sparse")
    rows = []
    for layer in layers["results"]:
        torch, dense, ours = (layer[f"{k}_us_min"] for k in ("torch", "own_dense", "sparse"))
        rows.append(
            (
                ", ".join(str(layer[k]) for k in ("pixels", "K", "N")),
                "unstructured" if layer["block"] == "1x1" else f"{layer['block']} blocks",
                f"{layer['density']:.2f}",
                f"{torch:.0f}",
                f"{dense:.0f}",
                f"{ours:.1f}",
                f"{torch / ours:.1f}x",
                f"{dense / ours:.1f}x",
            )
        )
    return markdown((*head, "over torch", "over own dense"), rows)


def networks_table(comparison: Comparison, threads: int) -> list[str]:
    """Whole networks: medians in ms and how many times ours each rival's is, on `threads`.

    A rival that is faster than ours, or the only one, is bold; a dash is a pair that was not run,
    and what could not be run says why in the JSON.
    """
    results = {
        (r.model, r.runtime): r
        for r in comparison.results
        if r.threads == threads and r.precision == "fp32"
    }
    there = {runtime for _, runtime in results}
    known = [runtime for runtime in ADAPTERS if runtime in there and runtime != OURS]
    rivals = [*known, *sorted(there - {OURS, *known})]
    networks = list(dict.fromkeys(model.network for model in comparison.models))
    titles = {r.runtime: r.title for r in results.values()}
    rows = []
    shown = [
        model
        for model in comparison.models
        if model.variant in SHOWN_VARIANTS and (model.name, OURS) in results
    ]
    shown.sort(key=lambda m: (networks.index(m.network), SHOWN_VARIANTS.index(m.variant)))
    for model in shown:
        ours = results[model.name, OURS]
        cells = [_rival(results.get((model.name, rival)), ours) for rival in rivals]
        rows.append((model.network, _zeros(model.variant), _milliseconds(ours), *cells))
    return markdown(("network", "zeros", "**tvm_pivot**", *(titles[r] for r in rivals)), rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table as lines."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def replace_table(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with the lines between the marks of `name` replaced.

    Raises:
        ValueError: the marks are not there exactly once.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    body = "\n" + "\n".join(lines) + "\n\n"
    replaced, count = pattern.subn(lambda m: m[1] + body + m[2], text)
    if count != 1:
        raise ValueError(f"README.md has {count} tables marked {name!r}, not one")
    return replaced


def render(text: str) -> str:
    """README.md's text with every table made anew from the results."""
    layers = json.loads((RESULTS / "layers.json").read_text(encoding="utf-8"))
    text = replace_table(text, "layers", layers_table(layers))
    for name, file in NETWORKS.items():
        networks = Comparison.from_json((RESULTS / file).read_bytes())
        for threads in sorted({r.threads for r in networks.results}):
            text = replace_table(text, f"{name} {threads}", networks_table(networks, threads))
    arm = arm_cost.Results.read(arm_cost.RESULTS)
    text = replace_table(text, "arm networks", markdown(*arm_cost.networks_table(arm.networks)))
    return replace_table(text, "arm kernels", markdown(*arm_cost.kernels_table(arm.kernels)))


def _zeros(variant: str) -> str:
    block, _, density = variant.partition("@")
    if not density:
        return "none"
    sparsity = f"{(1 - float(density)) * 100:.0f} %"
    kinds = {"1x1": "unstructured", "dlmc": "unstructured (DLMC masks)"}
    return f"{sparsity} {kinds.get(block, f'{block} blocks')}"


def _milliseconds(result: Result) -> str:
    return result.status if result.median_ms is None else _number(result.median_ms)


def _rival(result: Result | None, ours: Result) -> str:
    if result is None:
        return "-"
    if result.median_ms is None:
        return result.status
    if ours.median_ms is None:
        return f"**{_number(result.median_ms)}**"
    ratio = result.median_ms / ours.median_ms
    cell = f"{_number(result.median_ms)} ({_number(ratio)}x)"
    return cell if ratio >= 1 else f"**{cell}**"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(argv)
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if options.check:
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
