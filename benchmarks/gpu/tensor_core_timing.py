"""Check and time the tensor-core kernels of a bundle, beside torch, each as a CUDA graph.

Times are microseconds of one launch, on inputs that change from launch to launch ("cold": together
larger than the level-2 cache) and on one input ("warm").
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.rivals import SPARSE, Rival, layer_rivals
from benchmarks.gpu.timing import graphed, interleaved

LAUNCHES = 10
COLD_BYTES = 200 << 20
# Sums of float16 products are rounded once more, to float16.
MOST_ERROR = 2e-3
_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Driver:
    """The CUDA driver, in torch's context."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self._library = ctypes.CDLL("libcuda.so.1")

    def __call__(self, name: str, *args: Any) -> None:
        """Call a function; RuntimeError if it fails."""
        status = getattr(self._library, name)(*args)
        if status:
            raise RuntimeError(f"{name} failed with {status}")


class Kernel:
    """A variant of a case, its tables on the GPU."""

    def __init__(self, driver: Driver, folder: Path, module: Any, variant: dict[str, Any]) -> None:
        self.driver, self.variant, self.function = driver, variant, ctypes.c_void_p()
        name = variant["kernel"].encode()
        driver("cuModuleGetFunction", ctypes.byref(self.function), module, name)
        driver("cuFuncSetAttribute", self.function, _SHARED, variant["shared"])
        with np.load(folder / variant["tables"]) as stored:
            tables = [stored[f"t{i}"].ravel().view(np.uint8) for i in range(len(stored.files))]
        self.tables = [torch.from_numpy(table).cuda() for table in tables]

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """y = W x, on the current stream of torch."""
        places = [t.data_ptr() for t in (x, *self.tables, x, y)]
        values = (ctypes.c_void_p * len(places))(*places)
        at = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(places))(*(at + 8 * i for i in range(len(places))))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        grid, threads = self.variant["tile"]["grid"], self.variant["threads"]
        sizes = (grid, 1, 1, threads, 1, 1, self.variant["shared"])
        self.driver("cuLaunchKernel", self.function, *sizes, stream, pointers, None)


def case_keys(folder: Path) -> list[str]:
    """Names of the cases of a folder; none where there is no such folder."""
    path = folder / "cases.json"
    return [case["name"] for case in json.loads(path.read_text())] if path.is_file() else []


def measure(folder: Path, number: int) -> dict[str, Any]:
    """Check and time one case of a folder."""
    case = json.loads((folder / "cases.json").read_text())[number]
    driver, module = Driver(), ctypes.c_void_p()
    image = (folder / case["cubin"]).read_bytes()
    driver("cuModuleLoadData", ctypes.byref(module), image)
    weight = torch.from_numpy(np.load(folder / case["weight"])["weight"]).cuda()
    (n, k), m = weight.shape, case["pixels"]
    copies = max(2, COLD_BYTES // (2 * m * (n + k)) + 1)
    xs = [torch.randn(k, m, device="cuda", dtype=torch.half) for _ in range(copies)]
    ys = [torch.empty(n, m, device="cuda", dtype=torch.half) for _ in range(copies)]
    want = weight.double() @ xs[0].double()
    result: dict[str, Any] = {name: case[name] for name in ("name", "density", "pixels")}
    result |= {"variants": [], "rivals": {}}
    runs: dict[str, dict[str, Callable[[], Any]]] = {"cold": {}, "warm": {}}
    for variant in case["variants"]:
        entry = {name: variant[name] for name in ("tile", "predicted_us")}
        result["variants"].append(entry)
        kernel = Kernel(driver, folder, module, variant)
        ys[0].fill_(float("nan"))
        kernel(xs[0], ys[0])
        torch.cuda.synchronize()
        entry["error"] = error(ys[0], want)
        entry["right"] = entry["error"] < MOST_ERROR
        name = f"variant {len(result['variants']) - 1}"
        _add(runs, name, lambda x, y, kernel=kernel: kernel(x, y), xs, ys)
    for name, make in _rivals(weight, xs[0], tuple(case["block"])):
        try:
            result["rivals"][name] = {}
            _add(runs, name, make(), xs, ys)
        except Exception as e:  # a rival's failure is a result
            result["rivals"][name] = {"failed": f"{type(e).__name__}: {e}"[:300]}
    for state, some in runs.items():
        for name, seconds in interleaved(some, rounds=30).items():
            entry = _entry(result, name)
            entry[f"{state}_us"] = seconds * 1e6 / LAUNCHES
    return result


def _entry(result: dict[str, Any], name: str) -> Any:
    if name.startswith("variant "):
        return result["variants"][int(name.split()[1])]
    return result["rivals"][name]


def _rivals(weight: Any, x: Any, block: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """cuBLAS on the same planes, and the sparse rivals on one input of their own."""
    yield "cuBLAS", lambda: lambda x, y: torch.matmul(weight, x, out=y)
    for rival in layer_rivals(weight, x.T.contiguous(), block, "default"):
        if rival.stage == SPARSE:
            yield f"{rival.name}, warm", partial(_on_its_own, rival)


def _on_its_own(rival: Rival) -> Callable[[Any, Any], Any]:
    run = rival.make()
    return lambda *_: run()


def _add(
    runs: dict[str, dict[str, Callable[[], Any]]],
    name: str,
    launch: Callable[[Any, Any], Any],
    xs: list[Any],
    ys: list[Any],
) -> None:
    """Graphs of some launches; a rival that keeps its own input has a warm one only."""
    for state, pairs in (("cold", list(zip(xs, ys, strict=True))), ("warm", [(xs[0], ys[0])])):
        if state == "cold" and name.endswith(", warm"):
            continue
        turn = cycle(pairs)
        runs[state][name] = graphed(lambda turn=turn: launch(*next(turn)), LAUNCHES)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over that of the reference; infinite where NaN is left."""
    off = float((got.double() - want).norm() / want.norm())
    return off if off == off else float("inf")
