"""Single layers against torch's dense sgemm: `make bench-layers`.

For each shape and density the packed kernel that the schedule rule chooses (no tuning), the same
kernel family run dense, and `torch.mm` on the dense weights are timed in turn, in one process,
on one thread. Outputs are checked against float64 before any time counts.

    fraction of linear = (torch time / kernel time) * density
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

for _name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np
import torch
import tvm

from benchmarks.layer_kernels import SHAPES, block_mask, dense_layer, kernel_and_arguments
from tvm_pivot.bench.machine import describe_machine
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.relay_passes.layers import Layer, Plan
from tvm_pivot.targets import PivotTarget, resolve

CASES = ((8, 0.05), (8, 0.1), (8, 0.2), (1, 0.1))
WARM, TIMED = 2, 5


def compiled(
    layer: Layer, plan: Plan, target: PivotTarget, x: Any
) -> tuple[Callable[[], None], Any]:
    """A call that runs the layer's kernel on planes `x` once, and the output it writes."""
    func, arrays = kernel_and_arguments(layer, plan, target, x)
    lib = tvm.compile(tvm.IRModule({"main": func}), target=target.to_tvm())
    args = [tvm.runtime.tensor(array) for array in arrays]
    main = lib["main"]
    return lambda: main(*args), args[-1]


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call: the candidates take turns, `rounds` times.

    A turn begins with calls that are not timed, for the candidate before has filled the caches
    with its own weights; then each call is timed by itself.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(WARM):
                call()
            for _ in range(TIMED):
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return times


def measure(
    shape: tuple[int, int, int], rows: int, density: float, rounds: int, target: PivotTarget
) -> dict[str, Any]:
    """One line of the table: minima and medians in microseconds."""
    m, k, n = shape
    rng = np.random.default_rng([m, k, n, rows, round(1000 * density)])
    mask = block_mask(rng, n, k, rows, density)
    weight = np.where(mask, rng.standard_normal((n, k)), 0).astype(np.float32)
    x = rng.standard_normal((k, m)).astype(np.float32)
    layer = dense_layer(weight, m)
    plans = {
        name: plan_layer(layer, target, sparse).plan
        for name, sparse in (("sparse", True), ("own_dense", False))
    }
    a, b, c = torch.from_numpy(weight), torch.from_numpy(x), torch.empty(n, m)
    calls: dict[str, Callable[[], Any]] = {"torch": lambda: torch.mm(a, b, out=c)}
    want = weight.astype(np.float64) @ x
    bound = k * np.finfo(np.float32).eps * (np.abs(weight).astype(np.float64) @ np.abs(x)).max()
    for name, plan in plans.items():
        call, out = compiled(layer, plan, target, x)
        call()
        error = float(np.abs(out.numpy()[0] - want).max())
        if not error <= bound:
            raise SystemExit(f"{name} is wrong on {shape}: error {error:.2e}, bound {bound:.2e}")
        calls[name] = call
    times = interleaved(calls, rounds)
    low = {name: min(t) for name, t in times.items()}
    d = float(mask.mean())
    return {
        "pixels": m,
        "K": k,
        "N": n,
        "block": f"{rows}x1",
        "density": d,
        "plan": f"{plans['sparse'].block_rows}x1",
        **{f"{name}_us_min": 1e6 * t for name, t in low.items()},
        **{f"{name}_us_median": 1e6 * statistics.median(t) for name, t in times.items()},
        "speedup": low["torch"] / low["sparse"],
        "fraction_of_linear": low["torch"] / low["sparse"] * d,
        "own_speedup": low["own_dense"] / low["sparse"],
        "own_fraction_of_linear": low["own_dense"] / low["sparse"] * d,
        "useful_gflops": 2e-9 * d * k * n * m / low["sparse"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--target", default="x86", help="for our kernels; torch picks its own")
    args = parser.parse_args()
    target = replace(resolve(args.target), cores=1)
    torch.set_num_threads(1)
    results = []
    print(
        f"1 thread, fp32, tvm {tvm.__version__}, torch {torch.__version__}, "
        f"{target.tvm['mcpu']}, {target.lanes} lanes; minima of {args.rounds} turns of {TIMED}; us"
    )
    print(
        " pixels     K     N  block  density  torch  own dense  sparse  speed-up  of linear  "
        "vs own dense  GFLOP/s"
    )
    for rows, density in CASES:
        for shape in SHAPES:
            r = measure(shape, rows, density, args.rounds, target)
            results.append(r)
            print(
                f"{r['pixels']:7d} {r['K']:5d} {r['N']:5d} {r['block']:>6} {r['density']:8.3f} "
                f"{r['torch_us_min']:6.0f} {r['own_dense_us_min']:10.0f} "
                f"{r['sparse_us_min']:7.1f} {r['speedup']:8.1f}x {r['fraction_of_linear']:10.2f} "
                f"{r['own_speedup']:12.1f}x {r['useful_gflops']:8.0f}",
                flush=True,
            )
    for block, title in (("8x1", "8x1 blocks"), ("1x1", "unstructured")):
        some = [r for r in results if r["block"] == block]
        rates = [r["useful_gflops"] for r in some]
        print(f"{title}: {min(rates):.0f} to {max(rates):.0f} GFLOP/s of what is kept")
        for key, label in (("fraction_of_linear", "torch"), ("own_fraction_of_linear", "our own")):
            values = [r[key] for r in some]
            mean = math.exp(statistics.fmean(map(math.log, values)))
            print(
                f"{title}, fraction of linear over {label} dense: geometric mean {mean:.2f}, "
                f"least {min(values):.2f}"
            )
    least = min(r["speedup"] for r in results if r["block"] == "1x1")
    print(f"unstructured at 0.1: least speed-up over torch {least:.1f}x")
    if args.json:
        facts = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": f"python -m benchmarks.layers --target {args.target}",
            "machine": asdict(describe_machine()),
            "versions": {"tvm": tvm.__version__, "torch": torch.__version__},
            "precision": "fp32",
            "threads": 1,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
