"""Check and time tensor-core kernels on a GPU, against cuBLAS in the same process.

    python3 tensor_core_timing.py DIR [RESULTS.json]

DIR is what `tensor_core_cases.py` wrote. Needs NumPy, PyTorch and CuPy; nothing of this project.
Times are medians over rounds, in which the kernels of a case and cuBLAS take turns, each on
inputs that change from launch to launch ("cold": together larger than the level-2 cache) and on
one input ("warm").
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import torch

ROUNDS, LAUNCHES = 30, 10
COLD_BYTES = 200 << 20
# Sums of float16 products are rounded once more, to float16.
MOST_ERROR = 2e-3


class Kernel:
    """A variant of a case, its tables on the GPU."""

    def __init__(self, folder: Path, module: Any, variant: dict[str, Any]) -> None:
        self.variant = variant
        self.function = module.get_function(variant["kernel"])
        self.function.max_dynamic_shared_size_bytes = variant["shared"]
        stored = np.load(folder / variant["tables"])
        self.tables = [cupy.asarray(stored[f"t{i}"]) for i in range(len(stored.files))]

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y = W x, on the current stream of PyTorch."""
        planes, out = cupy.from_dlpack(x), cupy.from_dlpack(y)
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        grid, threads = self.variant["tile"]["grid"], self.variant["threads"]
        arguments = (planes, *self.tables, planes, out)
        with stream:
            self.function((grid,), (threads,), arguments, shared_mem=self.variant["shared"])


def captured(launch: Callable[[int], None], count: int) -> Callable[[], None]:
    """`count` launches as one CUDA graph: no time is lost between them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(count):
            launch(i)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            launch(i)
    return graph.replay


def medians(replays: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Microseconds of one launch of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(ROUNDS):
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return {name: statistics.median(values) for name, values in times.items()}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over that of the reference; NaN where nothing was written."""
    return float((got.double() - want).norm() / want.norm())


def measure(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Check and time one case."""
    module = cupy.RawModule(path=str(folder / case["cubin"]))
    weight = torch.from_numpy(np.load(folder / case["weight"])["weight"]).cuda()
    n, k = weight.shape
    m = case["pixels"]
    copies = max(2, COLD_BYTES // (2 * m * (n + k)) + 1)
    xs = [torch.randn(k, m, device="cuda", dtype=torch.half) for _ in range(copies)]
    ys = [torch.empty(n, m, device="cuda", dtype=torch.half) for _ in range(copies)]
    kernels = [Kernel(folder, module, variant) for variant in case["variants"]]
    want = weight.double() @ xs[0].double()
    result: dict[str, Any] = {key: case[key] for key in ("name", "density", "pixels")}
    result["variants"] = []
    replays: dict[str, dict[str, Callable[[], None]]] = {"cold": {}, "warm": {}}
    launches: dict[str, Callable[[int], None]] = {
        "cublas": lambda i: torch.matmul(weight, xs[i], out=ys[i])
    }
    for number, kernel in enumerate(kernels):
        ys[0].fill_(float("nan"))
        kernel(xs[0], ys[0])
        torch.cuda.synchronize()
        wrong = error(ys[0], want)
        entry = {"tile": kernel.variant["tile"], "error": wrong, "right": wrong < MOST_ERROR}
        result["variants"].append({**entry, "predicted_us": kernel.variant["predicted_us"]})
        launches[str(number)] = lambda i, kernel=kernel: kernel(xs[i], ys[i])
    for name, launch in launches.items():
        replays["cold"][name] = captured(lambda i, f=launch: f(i % copies), LAUNCHES)
        replays["warm"][name] = captured(lambda i, f=launch: f(0), LAUNCHES)
    for state in ("cold", "warm"):
        found = medians(replays[state])
        result[f"cublas_{state}_us"] = found["cublas"]
        for number, variant in enumerate(result["variants"]):
            variant[f"{state}_us"] = found[str(number)]
    return result


def report(result: dict[str, Any]) -> None:
    """One case as lines of text."""
    print(f"{result['name']} (density {result['density']:.3f}, {result['pixels']} pixels)")
    dense = {state: result[f"cublas_{state}_us"] for state in ("cold", "warm")}
    print(f"  cuBLAS {dense['cold']:.1f} us cold, {dense['warm']:.1f} us warm")
    for variant in result["variants"]:
        tile = variant["tile"]
        found = {state: variant[f"{state}_us"] for state in dense}
        times = ", ".join(f"{t:.1f} us {s} ({dense[s] / t:.2f}x)" for s, t in found.items())
        size = f"{tile['loader']}, cluster {tile['cluster']}, {tile['warp_rows']}x"
        size += f"{tile['warp_columns']} warps of {tile['blocks']} blocks x {tile['warp_pixels']},"
        size += f" slab {tile['slab']}"
        verdict = "right" if variant["right"] else "WRONG"
        print(f"  {size}: {times}; predicted {variant['predicted_us']:.1f}; {verdict}", flush=True)


def main() -> None:
    """Measure every case of a folder."""
    folder = Path(sys.argv[1])
    results = []
    for case in json.loads((folder / "cases.json").read_text()):
        results.append(measure(folder, case))
        report(results[-1])
    machine = {
        "device": torch.cuda.get_device_name(0),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps({"machine": machine, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
