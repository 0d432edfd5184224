"""Check everything in a bundle on this machine's GPU, then time it beside torch: one command.

    python FOLDER/check.py [--json gpu_results.json] [--minutes 5] [--only resnet50]

Started from a bundle (see `bundle`), on a machine with torch. First every network and layer is
checked and timed beside dense torch; then the tensor-core kernels by themselves; then sparse rivals
(2:4, BSR, Triton) and CUDA graphs; then torch.compile, which takes longest. The results are written
after each step, so that little is lost if it is interrupted. Times are medians between device
events; ours and a rival take turns in one process, with the network's input on the device.
What does not work is a result too: its reason is noted, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER / "site")]

import numpy as np
import torch

import tvm_pivot
from benchmarks import zoo
from benchmarks.gpu import tensor_core_timing
from benchmarks.gpu.cases import LAYERS, NETWORKS, Layer, Network
from benchmarks.gpu.rivals import COMPILED, DENSE, SPARSE, Rival, layer_rivals, network_rivals
from benchmarks.gpu.timing import interleaved
from tvm_pivot.cuda_runtime import DeviceSlot

Case = Network | Layer
# Of the norm of the reference. Those of 16-bit types are for whole networks.
TOLERANCE, TOLERANCE_16 = {"float32": 1e-4}, 2e-2
# A rival may use TF32; one that is further off computes something else.
RIVAL_TOLERANCE = 5e-2
STAGES = {DENSE: "dense", SPARSE: "sparse", COMPILED: "compiled"}


@dataclass(frozen=True)
class Step:
    """A part of the check: its name, and what does it."""

    name: str
    run: Callable[[], None]


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run all steps, as far as the time allows; 1 if something of ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, default=Path("gpu_results.json"))
    parser.add_argument("--minutes", type=float, default=5.0, help="start nothing after these")
    parser.add_argument("--only", default="", help="part of the names of cases to run")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    given = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    results: dict[str, Any] = {"machine": machine(), "cases": {}, "tensor_cores": {}, "left": []}
    began = time.monotonic()
    for step in steps(folder, given.only, given.compile_mode, results):
        if time.monotonic() - began > 60 * given.minutes:
            results["left"].append(step.name)
            continue
        print(step.name, flush=True)
        step.run()
        given.json.write_text(json.dumps(results, indent=1))
    given.json.write_text(json.dumps(results, indent=1))
    print(*table(results), sep="\n")
    wrong = mismatches(results)
    print(f"{len(wrong)} wrong {wrong}; {len(results['left'])} steps left: no time; {given.json}")
    return int(bool(wrong))


def steps(folder: Path, only: str, mode: str, results: dict[str, Any]) -> Iterator[Step]:
    """What there is to do, most important first."""
    there = [(case, folder / "cases" / f"{case.key}.pivot") for case in (*NETWORKS, *LAYERS)]
    there = [(case, path) for case, path in there if path.is_file() and only in case.key]
    for stage, word in STAGES.items():
        for case, path in there:
            found = results["cases"].setdefault(case.key, {"rivals": {}})
            yield Step(f"{case.key}, {word}", partial(run_case, case, path, stage, mode, found))
        if stage == DENSE:
            kernels = folder / "tensor_cores"
            for number, name in enumerate(tensor_core_timing.case_keys(kernels)):
                if only in name:
                    found = results["tensor_cores"].setdefault(name, {})
                    yield Step(f"kernels, {name}", partial(run_kernels, kernels, number, found))


def machine() -> dict[str, str]:
    """What the numbers are measured on, with what, and when."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as e:
        said = f"unknown: {type(e).__name__}"
    name, _, driver = said.partition("\n")[0].partition(", ")
    cudnn = torch.backends.cudnn
    return {
        "device": name,
        "driver": driver.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "tvm": tvm_pivot.runtime.tvm_version(),
        "tvm_pivot": tvm_pivot.__version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn.version() if cudnn.is_available() else None),
        "triton": version_of("triton"),
        "numpy": np.__version__,
        "of torch": _settings(),
    }


def _settings() -> str:
    """What torch is allowed to do that changes its times."""
    halves = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    tuned = torch.backends.cudnn.benchmark
    return f"sums of float16 in float16: {halves}; cuDNN tries all its algorithms: {tuned}"


def version_of(package: str) -> str:
    """The version of a package, or why there is none."""
    try:
        return str(import_module(package).__version__)
    except Exception as e:  # a broken one must not end the script
        return reason(e)


def reason(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def run_kernels(folder: Path, number: int, found: dict[str, Any]) -> None:
    """One case of the tensor-core kernels."""
    try:
        found |= tensor_core_timing.measure(folder, number)
    except Exception as e:
        found["failed"] = reason(e)
    release()


def run_case(case: Case, path: Path, stage: int, mode: str, found: dict[str, Any]) -> None:
    """One case beside the rivals of a stage; the first time it is checked."""
    ours: Callable[[], Any] | None = None
    try:
        net = tvm_pivot.load(path)
        if stage == DENSE:
            found["error"] = error(case, net, path)
            found["right"] = found["error"] <= TOLERANCE.get(case.precision, TOLERANCE_16)
        ours = runner(net)
        if stage == DENSE and torch.cuda.is_available():
            found["ours_ms"] = interleaved({"ours": ours})["ours"] * 1e3
    except Exception as e:  # one broken kernel must not hide the others' results
        found["failed"] = reason(e)
    try:
        for rival in rivals(case, mode):
            if rival.stage == stage:
                found["rivals"][rival.name] = beside(rival, ours, case, path)
    except Exception as e:
        found["rivals"]["torch"] = {"failed": reason(e)}
    release()


def release() -> None:
    """Give back what torch and its compiler hold."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def beside(rival: Rival, ours: Callable[[], Any] | None, case: Case, path: Path) -> dict[str, Any]:
    """A rival's error and times beside ours, or why there are none."""
    found: dict[str, Any] = {}
    try:
        run = rival.make()
        if rival.same:
            got = run().detach().float().cpu().numpy()
            found["error"] = distance(some(case, got), reference(case, path))
            if not found["error"] < RIVAL_TOLERANCE:
                raise ValueError(f"computes something else: an error of {found['error']:.1e}")
        runs = {"rival": run} | ({} if ours is None else {"ours": ours})
        found |= {f"{name}_ms": 1e3 * s for name, s in interleaved(runs).items()}
    except Exception as e:
        found["failed"] = reason(e)
    return found


def error(case: Case, net: tvm_pivot.Session, path: Path) -> float:
    """Of our network, over the norm of the reference."""
    got = net.run(model_input(case, path))
    whole = distance(some(case, got), reference(case, path))
    return whole if np.isfinite(got).all() else float("inf")


def some(case: Case, y: Any) -> Any:
    """What is compared: a network's first output and last, and some of a layer's."""
    count = 64 if isinstance(case, Layer) else 2
    return y[np.linspace(0, len(y) - 1, count).astype(int)]


def distance(got: Any, expected: Any) -> float:
    """Norm of the difference over that of the reference; NaN counts as infinite."""
    off = np.linalg.norm((got - expected).astype(np.float64)) / np.linalg.norm(expected)
    return float(off) if np.isfinite(off) else float("inf")


def model_input(case: Case, path: Path) -> Any:
    """float32, the whole batch."""
    if isinstance(case, Layer):
        return case.input()
    with np.load(path.with_suffix(".npz")) as arrays:
        first = arrays["x"][:1]
    return np.concatenate([np.roll(first, n, -1) for n in range(case.batch)])


def reference(case: Case, path: Path) -> Any:
    """What `some` of the outputs should be."""
    if isinstance(case, Layer):
        return some(case, case.input()).astype(np.float64) @ case.weight().astype(np.float64).T
    with np.load(path.with_suffix(".npz")) as arrays:
        return arrays["y"]


def runner(net: tvm_pivot.Session) -> Callable[[], Any]:
    """A run of ours whose input lies on the device."""
    (spec,) = net.inputs
    x = np.random.default_rng(0).standard_normal(spec.shape).astype(spec.numpy_dtype())
    tensor, run = DeviceSlot(spec).fill(x), net.virtual_machine().run
    return lambda: run(tensor)


def rivals(case: Case, mode: str) -> Iterator[Rival]:
    """torch on the same network or layer."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: nothing to compare with")
    dtype = getattr(torch, case.precision, torch.float32)  # TF32 is a way to compute in float32
    if isinstance(case, Layer):
        pair = (torch.from_numpy(a).to("cuda", dtype) for a in (case.weight(), case.input()))
        weight, x = pair
        return layer_rivals(weight, x, (case.rows, case.columns), mode)

    def make() -> tuple[Any, Any]:
        module, x = zoo.build_torch(case.name, case.variant)
        x = torch.cat([x.roll(n, -1) for n in range(case.batch)])
        return module.to("cuda", dtype), x.to("cuda", dtype)

    return network_rivals(make, dtype, mode)


def mismatches(results: dict[str, Any]) -> list[str]:
    """What of ours is wrong, or did not run."""
    wrong = [key for key, found in results["cases"].items() if found.get("right") is False]
    wrong += [key for key, found in results["cases"].items() if "failed" in found]
    for name, found in results["tensor_cores"].items():
        right = all(one["right"] for one in found.get("variants", []))
        wrong += [] if right and "failed" not in found else [name]
    return list(dict.fromkeys(wrong))


def table(results: dict[str, Any]) -> Iterator[str]:
    """One line for each case, and its rivals: milliseconds, and ours over theirs."""
    for key, found in results["cases"].items():
        said = found.get("failed") or f"{found.get('ours_ms', float('nan')):.3f} ms"
        yield f"{key}: {said}, error {found.get('error', float('nan')):.1e}"
        for name, rival in found["rivals"].items():
            if "rival_ms" not in rival:
                yield f"    {name}: {rival['failed']}"
            else:
                times = rival["rival_ms"], rival.get("ours_ms", float("nan"))
                yield f"    {name}: {times[0]:.3f} ms, ours is {times[0] / times[1]:.2f}x as fast"
    for name, found in results["tensor_cores"].items():
        yield f"{name}: {found.get('failed', '')}"
        pairs = [*enumerate(found.get("variants", [])), *found.get("rivals", {}).items()]
        for label, one in pairs:
            times = [f"{one[s]:.1f} us {s[:4]}" for s in ("cold_us", "warm_us") if s in one]
            yield f"    {label}: {', '.join(times) or one.get('failed', '')}"


if __name__ == "__main__":
    sys.exit(main())
