"""How much ratios change when a benchmark is repeated: ``repeatability.py OLD.json NEW.json``.

For every model, runtime, precision and number of threads in both files, the runtime's time over
ours is compared. Exits with 1 if the median change, over networks, is more than 10 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
from benchmarks.standing_plan import OURS, aligned, ratio
from tvm_pivot.bench.results import Comparison

LIMIT = 0.1

Case = tuple[str, str, str, int]


def changes(old: Comparison, new: Comparison) -> dict[str, float]:
    """The median relative change of ratios, by network; networks without common cases are left out.

    A change from 2 to 1.6 is one of 0.2.
    """
    before, after = ratios(old), ratios(new)
    networks = {model.name: model.network for model in old.models}
    found: dict[str, list[float]] = {}
    for case, value in before.items():
        if case in after:
            found.setdefault(networks[case[0]], []).append(abs(after[case] / value - 1))
    return {network: statistics.median(values) for network, values in found.items()}


def ratios(comparison: Comparison) -> dict[Case, float]:
    """Every rival's time over ours: by model, rival, precision and threads."""
    ours = {(r.model, r.precision, r.threads): r for r in comparison.results if r.runtime == OURS}
    found = {}
    for r in comparison.results:
        value = ratio(r, ours.get((r.model, r.precision, r.threads)))
        if value is not None and r.runtime != OURS:
            found[r.model, r.runtime, r.precision, r.threads] = value
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(argv)
    old, new = (Comparison.from_json(path.read_bytes()) for path in (options.old, options.new))
    found = changes(old, new)
    if not found:
        print("the files have no case in common", file=sys.stderr)
        return 2
    rows = [["network", "ratios changed by"], *([n, f"{c:.1%}"] for n, c in found.items())]
    overall = statistics.median(found.values())
    print("\n".join(aligned([*rows, ["median over networks", f"{overall:.1%}"]])))
    return int(overall > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
