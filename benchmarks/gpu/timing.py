"""Times on the device, by events of torch; everything that is compared takes turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_UP, ROUNDS = 10, 50


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds of one run of each, in the median over rounds."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(some) for name, some in times.items()}


def graphed(run: Callable[[], Any], launches: int = 1) -> Callable[[], Any]:
    """`launches` runs as one CUDA graph; returns what the last of them did."""
    stream, last = torch.cuda.Stream(), None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(launches):
            last = run()

    def replay() -> Any:
        graph.replay()
        return last

    return replay
