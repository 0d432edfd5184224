"""Every node test that ONNX ships, compiled and run: which are right, refused, or wrong.

    python -m benchmarks.onnx_nodes            # all of them
    python -m benchmarks.onnx_nodes --only attention

A model that is refused with a reason is none of ours; one that computes something else is a bug.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
from onnx.backend.test.loader import load_model_tests

import tvm_pivot

Outcome = Literal["right", "refused", "wrong"]

# What is known to be wrong, and why it stays so.
KNOWN = {
    "test_mod_float_edge_cases_fmod_0": "the remainder of infinity is not NaN",
}
# Relative to 1 and to the value: the sums of a few numbers of a few products.
TOLERANCES = {"float16": 4e-3, "bfloat16": 4e-2}
OTHERWISE = 1e-3


@cache
def cases() -> dict[str, Any]:
    """The node tests by name: a model, and pairs of inputs and expected outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def check(case: Any) -> tuple[Outcome, str]:
    """Compile a case, run it on its inputs, and compare; a reason where it is not right.

    Raises:
        Exception: anything but a `PivotError`, which is a bug too.
    """
    try:
        session = tvm_pivot.build(case.model, threads=1)
        for inputs, expected in case.data_sets:
            outputs = session.run(*(np.asarray(value) for value in inputs))
            got = outputs if isinstance(outputs, tuple) else (outputs,)
            if len(got) != len(expected):
                return "wrong", f"{len(got)} outputs instead of {len(expected)}"
            for own, other in zip(got, expected, strict=True):
                reason = difference(np.asarray(own), np.asarray(other))
                if reason:
                    return "wrong", reason
    except tvm_pivot.PivotError as error:
        return "refused", str(error)
    return "right", ""


def difference(own: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> str:
    """How two arrays differ, or nothing."""
    if own.shape != other.shape:
        return f"shape {own.shape} instead of {other.shape}"
    if own.dtype != other.dtype:
        return f"{own.dtype} instead of {other.dtype}"
    if other.dtype.kind in "biuSO":
        return "" if np.array_equal(own, other) else "other values"
    allowed = TOLERANCES.get(str(other.dtype), OTHERWISE)
    wide = np.complex128 if other.dtype.kind == "c" else np.float64
    pair = own.astype(wide), other.astype(wide)
    close = np.allclose(*pair, rtol=allowed, atol=allowed, equal_nan=True)
    return "" if close else f"off by up to {np.nanmax(abs(pair[0] - pair[1])):.2g}"


def known(name: str) -> bool:
    """Whether a case is listed as wrong."""
    return any(name.startswith(start) for start in KNOWN)


def main(say: Callable[[str], None] = print) -> int:
    """Run the cases; the exit status says whether any is wrong that is not known to be."""
    parser = argparse.ArgumentParser(description="The node tests that ONNX ships.")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    logging.disable(logging.ERROR)
    counts: Counter[str] = Counter()
    for name, case in sorted(cases().items()):
        if only in name:
            outcome, reason = check(case)
            counts[outcome] += 1
            if outcome == "wrong":
                counts["not known"] += not known(name)
                say(f"{name}: {reason}" + " (known)" * known(name))
    say(", ".join(f"{counts[key]} {key}" for key in ("right", "refused", "wrong")))
    return int(counts["not known"] > 0)


if __name__ == "__main__":
    sys.exit(main())
