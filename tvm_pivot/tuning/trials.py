"""Candidates, from a choice to times: what worker processes do.

A candidate is a library and, beside it, the tables that belong to it: its layer's own, so that row
blocks are as long and as uneven as in the network.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from ..linking import linker
from ..relay_passes.pack_layer import LayerKernel
from ..schedules.choices import Choice
from ..schedules.pack_planes import pack_planes, packed_first
from .artifacts import arguments_of, contents_of
from .tasks import LayerTask

# In a network, the weights of a layer were last read one run ago: they come from beyond level 2.
_COPIES_BYTES, _MOST_COPIES = 3, 64

# What a kernel takes beside its tables.
_IMAGES = ("X", "P", "Y", "residual")
# Forms whose kernels read the input as it is.
_UNPACKED = ("rows", "depthwise")


def ignore_interrupts() -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the one that searches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def candidate_func(task: LayerTask, choice: Choice, kernel: LayerKernel) -> tirx.PrimFunc:
    """The function to measure: the kernel, behind the copy to planes where it needs one.

    Its arguments: X, P (planes, where they are copied first), the tables, the residual (if any), Y.
    """
    g, func = replace(task.geometry, unfolded=choice.unfolded), kernel.make()
    if task.op == "dense" or g.direct or choice.band_rows or choice.form in _UNPACKED:
        return func
    return packed_first(func, pack_planes(g, task.target.lanes, False))


def build_candidate(task: LayerTask, decisions: dict[str, Any], folder: str, name: str) -> str:
    """Compile one candidate; returns the path of its library, with the tables beside it."""
    choice = Choice.of(decisions)
    kernel = task.kernel(choice)
    func = candidate_func(task, choice, kernel).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), target=task.target.to_tvm())
    path = Path(folder) / f"{name}.so"
    library.export_library(str(path), fcompile=linker(task.target))
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(task.geometry.outputs).astype(np.float32)
    params = {str(param.name): param.ty for param in func.params}
    names = [name for name in params if name not in _IMAGES]
    tables = dict(zip(names, kernel.tables(bias), strict=True))
    np.savez(path.with_suffix(".npz"), **tables)  # type: ignore[arg-type]
    arguments = []
    for name, ty in params.items():
        shape = tables[name].shape if name in tables else ty.shape
        table = name if name in tables else None
        arguments.append([str(ty.dtype), [int(extent) for extent in shape], table])
    path.with_suffix(".json").write_text(json.dumps(arguments))
    return str(path)


class _Loaded:
    """A candidate that is ready to run, with several copies of its tables to take turns."""

    def __init__(self, artifact: str, l2_bytes: int) -> None:
        path = Path(artifact)
        arguments = arguments_of(path)
        contents = contents_of(path, arguments)
        size = sum(c.nbytes for c in contents if c is not None)
        copies = min(_MOST_COPIES, 1 + _COPIES_BYTES * l2_bytes // max(size, 1))
        rng = np.random.default_rng(0)
        others = {
            i: tvm.runtime.tensor(rng.standard_normal(shape).astype(dtype))
            for i, (dtype, shape) in enumerate(arguments)
            if contents[i] is None
        }
        self.sets = [
            [others[i] if c is None else tvm.runtime.tensor(c) for i, c in enumerate(contents)]
            for _ in range(copies)
        ]
        self.main = tvm.runtime.load_module(artifact)["main"]
        self.turn = 0
        self.run(2)

    def run(self, count: int) -> float:
        """Seconds of one of `count` runs, on average."""
        sets, main, seconds = self.sets, self.main, 0.0
        while seconds <= 0:  # time that the host took before may be taken off a later stretch
            turn, began = self.turn, time.thread_time()  # not counting what else the core runs
            for i in range(turn, turn + count):
                main(*sets[i % len(sets)])
            seconds = (time.thread_time() - began) / count
            self.turn += count
        return seconds

    def count(self, least: float) -> int:
        """How many runs take `least` seconds, about."""
        return max(1, round(least / max(1e-7, min(self.run(1) for _ in range(3)))))


def measure_candidates(
    artifacts: Sequence[str], l2_bytes: int, rounds: int, least: float
) -> list[list[float]]:
    """Times of candidates, which take turns: of each, the seconds of one run in every round."""
    loaded = [_Loaded(artifact, l2_bytes) for artifact in artifacts]
    counts = [one.count(least) for one in loaded]
    times = [
        [one.run(count) for one, count in zip(loaded, counts, strict=True)] for _ in range(rounds)
    ]
    return [list(of_one) for of_one in zip(*times, strict=True)]
