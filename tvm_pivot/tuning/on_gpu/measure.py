"""Check and time a batch of candidates on this machine's GPU; see docs/tuning.md.

    python measure.py [--json results.json] [--minutes 10]

Needs Python 3.9 with NumPy, and the NVIDIA driver; TVM's runtime is in the folder, and CUDA's is
looked for on the system first. Every task is measured in a process of its own, so that a kernel
that crashes or hangs costs itself only. Candidates take turns, each as a CUDA graph of several
launches, and their times are those between device events.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .device import Array, Gpu, Tensor, size_of

# Rounds of a first comparison, and of the best ones beside the rule's.
ROUNDS, FINAL_ROUNDS, FINALISTS = 15, 60, 3
# Launches of a graph, and how long they take together, about.
MOST_LAUNCHES, GRAPH_SECONDS = 64, 5e-4
MOST_COPIES = 16
TASK_SECONDS = 180.0
# Of the arguments of a kernel; the others are tables, named by their files.
VALUES = ("X", "Y", "residual")
# The content of an argument, its dtype and shape, and whether rows and columns change places.
Key = tuple[str, str, tuple[int, ...], bool]


def random_values(count: int, seed: int) -> Array:
    """Numbers in [-1, 1), the same on every machine, which every dtype of weights holds: float32.

    Multiples of 1/128.
    """
    n = np.arange(count, dtype=np.uint32) + np.uint32(seed * 7919 + 1)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        n = (n ^ (n >> np.uint32(shift))) * np.uint32(factor)
    return ((n >> np.uint32(24)).astype(np.float32) - 128) / np.float32(128)


def stored(values: Array, dtype: str) -> Array:
    """float32 values as they lie in memory in `dtype`; they must be such that it holds them."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.ascontiguousarray(values, dtype)


def loaded(raw: Array, dtype: str) -> Array:
    """Bytes of `dtype` as float32."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view(dtype).astype(np.float32)


class Task:
    """One task of a batch, on the GPU."""

    def __init__(self, gpu: Gpu, folder: Path, stated: dict[str, Any], spacing: int) -> None:
        self.gpu, self.folder, self.stated, self.spacing = gpu, folder, stated, spacing
        check = stated["check"]
        self.y_shape, self.pixels = check["y_shape"], np.array(check["pixels"])
        self.expected = np.fromfile(folder / check["expected"], "<f4").astype(np.float64)
        self.tolerance = check["tolerance"]
        self.buffers: dict[Key, ctypes.c_void_p] = {}

    def values(self, source: str, dtype: str, shape: Sequence[int], turned: bool) -> Array:
        """The content of an argument: random values, a table, or for the output NaN."""
        if source == "Y":
            return np.full(math.prod(shape) * size_of(dtype), 0xFF, np.uint8)
        if source not in VALUES:
            return np.fromfile(self.folder / source, np.uint8)
        values = random_values(math.prod(shape), 0 if source == "X" else 1)
        if turned:
            values = values.reshape(shape[1], shape[0]).T
        return stored(values, dtype)

    def buffer(self, key: Key) -> ctypes.c_void_p:
        """Device memory of an argument, the same for equal ones."""
        if key not in self.buffers:
            self.buffers[key] = self.gpu.put(self.values(*key))
        return self.buffers[key]

    def error(self, got: Array, turned: bool) -> float:
        """Of an output as float32, over the norm of what it should be; NaN counts as infinite."""
        images, rows, pixels = self.y_shape
        whole = got.reshape(pixels, rows).T if turned else got
        whole = whole.reshape(images, rows, pixels)
        some = whole[self.pixels // pixels, :, self.pixels % pixels].astype(np.float64)
        want = self.expected.reshape(some.shape)
        off = float(np.linalg.norm(some - want)) / max(float(np.linalg.norm(want)), 1e-30)
        return off if np.isfinite(whole).all() else math.inf


class Candidate:
    """One candidate, its tables on the GPU."""

    def __init__(self, task: Task, stated: dict[str, Any]) -> None:
        self.task, self.turned = task, stated["turned"]
        gpu, arguments = task.gpu, stated["arguments"]
        self.keys: list[Key] = [(name, d, tuple(s), self.turned) for d, s, name in arguments]
        own = [key for key in self.keys if key[0] not in VALUES]
        size = sum(math.prod(key[2]) * size_of(key[1]) for key in own)
        copies = max(1, min(MOST_COPIES, task.spacing // max(1, size)))
        self.sets = []
        for _ in range(copies):
            tables = {key: gpu.put(task.values(*key)) for key in own}
            places = [tables[key] if key in tables else task.buffer(key) for key in self.keys]
            pairs = zip(places, self.keys)  # noqa: B905 (Python 3.9)
            self.sets.append([Tensor(place, key[1], key[2]) for place, key in pairs])
        self.function = gpu.function(str(task.folder / stated["library"]), stated["function"])

    def check(self) -> float:
        """Run it once; the error of what it computes."""
        gpu, task = self.task.gpu, self.task
        key = next(key for key in self.keys if key[0] == "Y")
        place, size = task.buffer(key), math.prod(key[2]) * size_of(key[1])
        gpu.fill(place, task.values(*key))
        gpu.run(self.function, self.sets[0])
        gpu.wait()
        return task.error(loaded(gpu.get(place, size), key[1]), self.turned)

    def prepare(self) -> None:
        """Make the graph that is timed: as many launches as take long enough."""
        gpu, count = self.task.gpu, len(self.sets)
        first = self._graph(count)
        gpu.seconds(first)
        one = gpu.seconds(first) / count
        wanted = math.ceil(GRAPH_SECONDS / max(one, 1e-7))
        self.launches = max(count, min(MOST_LAUNCHES, wanted) // count * count)
        self.graph = self._graph(self.launches)
        self.seconds()

    def _graph(self, launches: int) -> ctypes.c_void_p:
        gpu, sets = self.task.gpu, [self.sets[i % len(self.sets)] for i in range(launches)]
        return gpu.capture([partial(gpu.run, self.function, tensors) for tensors in sets])

    def seconds(self) -> float:
        """Time of one launch."""
        return self.task.gpu.seconds(self.graph) / self.launches


def measure_task(
    gpu: Gpu, folder: Path, stated: dict[str, Any], spacing: int, skip: dict[int, str]
) -> dict[str, Any]:
    """The results of one task; candidates in `skip` have failed before, for those reasons.

    Prints the number of each candidate before it first runs.
    """
    task, ready = Task(gpu, folder, stated, spacing), dict[int, Candidate]()
    results: list[dict[str, Any]] = []
    for number, one in enumerate(stated["candidates"]):
        found: dict[str, Any] = {"decisions": one["decisions"], "seconds": [], "failed": ""}
        results.append(found)
        found["failed"] = one["failed"] or skip.get(number, "")
        if found["failed"]:
            continue
        print(f"candidate {number}", flush=True)
        made = Candidate(task, one)
        wrong = made.check()
        if wrong > task.tolerance:
            found["failed"] = f"wrong results: an error of {wrong:.1e}"
            continue
        made.prepare()
        ready[number] = made
    for _ in range(ROUNDS):
        for number, made in ready.items():
            results[number]["seconds"].append(made.seconds())
    finalists = sorted(ready, key=lambda number: float(np.median(results[number]["seconds"])))
    finalists = [*([0] if 0 in ready else []), *[n for n in finalists if n][:FINALISTS]]
    again: dict[int, list[float]] = {number: [] for number in finalists}
    for _ in range(FINAL_ROUNDS):
        for number in finalists:
            again[number].append(ready[number].seconds())
    compared = [
        {"decisions": results[number]["decisions"], "seconds": seconds, "failed": ""}
        for number, seconds in again.items()
    ]
    return {
        "task": stated["task"],
        "layers": stated["layers"],
        "candidates": results,
        "again": compared,
    }


def _child(folder: Path, number: int, skip: dict[int, str]) -> None:
    """Measure one task, and print its results and the machine as the last line."""
    batch = json.loads((folder / "batch.json").read_text())
    gpu = Gpu(folder / "site")
    found = measure_task(gpu, folder, batch["tasks"][number], batch["spacing"], skip)
    print(json.dumps({"machine": gpu.machine(), "task": found}), flush=True)


def _in_process(folder: Path, number: int, count: int) -> dict[str, Any]:
    """What `_child` found; a candidate that ends its process or takes too long is left out."""
    skip: dict[int, str] = {}
    for _ in range(count + 1):
        command = [sys.executable, str(folder / "measure.py"), "--task", str(number)]
        command += ["--skip", json.dumps(skip)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TASK_SECONDS)
            output, why = done.stdout, done.stderr.strip().split("\n")[-1]
            if done.returncode == 0:
                found: dict[str, Any] = json.loads(output.strip().split("\n")[-1])
                return found
            why = why or f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired as e:
            output = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
            why = f"took more than {TASK_SECONDS:g} s"
        started = [line for line in output.split("\n") if line.startswith("candidate ")]
        if not started:
            raise RuntimeError(why)
        skip[int(started[-1].split()[1])] = why[-300:]
    raise RuntimeError(f"no candidate of task {number} runs")


def main(folder: Path, arguments: Sequence[str] | None = None) -> None:
    """Measure all tasks of a folder, in its order; the results of each are written at once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, default=Path("results.json"))
    parser.add_argument("--minutes", type=float, help="start no task after so long")
    parser.add_argument("--task", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="{}", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.task is not None:
        skip = {int(number): why for number, why in json.loads(given.skip).items()}
        _child(folder, given.task, skip)
        return
    batch, began = json.loads((folder / "batch.json").read_text()), time.monotonic()
    kept = ("format", "batch", "target", "tvm", "package")
    results: dict[str, Any] = {name: batch[name] for name in kept} | {"machine": {}, "tasks": []}
    for number, task in enumerate(batch["tasks"]):
        if given.minutes is not None and time.monotonic() - began > 60 * given.minutes:
            print(f"the time is over: {len(batch['tasks']) - number} tasks left")
            break
        try:
            found = _in_process(folder, number, len(task["candidates"]))
        except RuntimeError as e:
            if not results["tasks"]:  # nothing will run here
                sys.exit(f"{task['layers'][0]}: {e}")
            print(f"{task['layers'][0]}: not measured: {e}", flush=True)
            continue
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        results["machine"] = found["machine"] | {"date": now}
        results["tasks"].append(found["task"])
        part = given.json.with_suffix(".part")
        part.write_text(json.dumps(results))
        os.replace(part, given.json)
        print(_line(found["task"]), flush=True)


def _line(task: dict[str, Any]) -> str:
    failed = [one["failed"] for one in task["candidates"] if one["failed"]]
    best = [float(np.median(one["seconds"])) * 1e6 for one in task["again"]]
    text = f"{task['layers'][0]}: {len(task['candidates'])} candidates, {len(failed)} failed"
    if task["candidates"][0]["failed"]:
        return f"{text}, the rule's too: {failed[0]}"
    return f"{text}; rule {best[0]:.1f} us, best {min(best):.1f} us"
