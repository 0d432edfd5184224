"""Check every case of a bundle on this machine's GPU, then time it beside torch.

Started from a bundle (see `bundle`), on a machine with torch. Writes JSON: device, driver,
versions, date, the error of each case against float32 or float64 references, and times in
milliseconds. Times are medians of device events, all in one process, of the whole network with its
input on the device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "site")]

import numpy as np
import torch

import tvm_pivot
from benchmarks import zoo
from benchmarks.gpu.cases import LAYERS, NETWORKS, Layer, Network

# Of the norm of the reference.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
WARM_UP, ROUNDS = 10, 50


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, default=Path("gpu_results.json"))
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=400.0, help="start no case after these")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began, results = time.perf_counter(), []
    for case in (*LAYERS, *NETWORKS):
        path = FOLDER / "cases" / f"{case.key}.pivot"
        if not path.is_file() or time.perf_counter() - began > given.seconds:
            continue
        results.append(run_case(case, path, given.compile_mode))
        print(json.dumps(results[-1]), flush=True)
        given.json.write_text(json.dumps({"machine": machine(), "cases": results}, indent=1))
    wrong = [r["case"] for r in results if not r.get("right")]
    print(f"{len(results)} cases, {len(wrong)} mismatches {wrong}")
    sys.exit(bool(wrong))


def machine() -> dict[str, str]:
    """What the numbers were measured on, and when."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, capture_output=True, text=True).stdout.split(", ")
    return {
        "device": name,
        "driver": driver.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "tf32": "off",
        "numpy": np.__version__,
    }


def run_case(case: Network | Layer, path: Path, mode: str) -> dict[str, Any]:
    """One case: its error and its times, or what went wrong."""
    found: dict[str, Any] = {"case": case.key}
    try:
        net = tvm_pivot.load(path)
        found["error"] = error(case, net, path)
        found["right"] = found["error"] <= TOLERANCE[case.precision]
        found["tvm_pivot"] = time_ours(net)
    except Exception as e:  # one broken kernel must not hide the others' results
        found["failed"] = f"{type(e).__name__}: {e}"[:500]
        return found
    for name, make in rivals(case, mode).items():
        try:
            found[name] = milliseconds(make())
        except Exception as e:
            found[name] = f"{type(e).__name__}: {e}"[:200]
    return found


def error(case: Network | Layer, net: tvm_pivot.Session, path: Path) -> float:
    """Norm of the difference over that of the reference; NaN counts as infinite."""
    if isinstance(case, Layer):
        x = case.input()
        exact = (
            torch.from_numpy(x).cuda().double() @ torch.from_numpy(case.weight()).cuda().double().T
        )
        got, expected = net.run(x), exact.cpu().numpy()
    else:
        with np.load(path.with_suffix(".npz")) as arrays:
            ends, expected = arrays["x"], arrays["y"]
        batch = np.concatenate([np.roll(ends[:1], n, -1) for n in range(case.batch)])
        got = net.run(batch)
        got = np.concatenate([got[:1], got[-1:]])
    off = np.linalg.norm((got - expected).astype(np.float64)) / np.linalg.norm(expected)
    return float(off) if np.isfinite(off) else float("inf")


def time_ours(net: tvm_pivot.Session) -> float:
    """Milliseconds of a run whose input lies on the device."""
    import tvm_ffi

    (spec,) = net.inputs
    x = torch.randn(spec.shape, device="cuda", dtype=torch.float32)
    run, tensor = net.virtual_machine()["main"], tvm_ffi.from_dlpack(x)
    return milliseconds(lambda: run(tensor))


def rivals(case: Network | Layer, mode: str) -> dict[str, Callable[[], Callable[[], Any]]]:
    """torch on the same network, as functions that prepare a run."""
    dtype = torch.float16 if case.precision == "float16" else torch.float32

    def dense(compiled: bool) -> Callable[[], Any]:
        if isinstance(case, Layer):
            module, x = case.module(), torch.from_numpy(case.input())
        else:
            module, x = zoo.build_torch(case.name, case.variant)
            x = torch.cat([x] * case.batch)
        module, x = module.to("cuda", dtype), x.to("cuda", dtype)
        if x.ndim == 4:
            module = module.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
        run = torch.compile(module, mode=mode) if compiled else module
        return inference(lambda: run(x))

    found = {"torch": lambda: dense(False), "torch.compile": lambda: dense(True)}
    if isinstance(case, Layer) and dtype == torch.float16:
        found["torch 2:4"] = lambda: semi_structured(case)
        if case.rows == case.columns:
            found["torch BSR"] = lambda: block_sparse(case)
    return found


def inference(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` without autograd."""

    def step() -> Any:
        with torch.inference_mode():
            return run()

    return step


def semi_structured(case: Layer) -> Callable[[], Any]:
    """A layer of the same shape with every second weight of a pair of pairs kept."""
    mask = torch.tensor([0, 0, 1, 1], device="cuda").tile(case.outputs, case.inputs // 4)
    weight = torch.randn(mask.shape, device="cuda", dtype=torch.float16) * mask
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    x = torch.from_numpy(case.input()).to("cuda", torch.float16)
    return inference(lambda: torch.nn.functional.linear(x, sparse))


def block_sparse(case: Layer) -> Callable[[], Any]:
    """The layer in torch's block-sparse format."""
    weight = torch.from_numpy(case.weight()).to("cuda", torch.float16)
    sparse = weight.to_sparse_bsr((case.rows, case.columns))
    x = torch.from_numpy(case.input()).to("cuda", torch.float16).T.contiguous()
    return inference(lambda: sparse @ x)


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a run, between device events."""
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return float(np.median([begin.elapsed_time(end) for begin, end in pairs]))


if __name__ == "__main__":
    main()
