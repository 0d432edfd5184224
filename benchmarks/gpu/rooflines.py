"""What the CUDA-core kernels have to do, and how long a GPU takes for it by its data sheet.

    python -m benchmarks.gpu.rooflines [--target h100]

Nothing is measured: FLOPs and bytes are counted, and divided by the rates of the data sheet; the
last column is what the schedule rule predicts. For tensor cores: `tensor_core_cases`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.schedules.cuda import choose_planes, choose_rows
from tvm_pivot.schedules.cuda_planes import CudaPlanes
from tvm_pivot.schedules.problems import Epilogue, RowsProblem
from tvm_pivot.targets import PivotTarget, resolve

SIZE = 4  # bytes of a float32
COLUMNS = ("layer", "GFLOP", "MB of memory", "MB of level 2")
TIMES = ("FLOPs at peak", "memory", "level 2", "predicted")
RELU = Epilogue(low=0.0)


def _conv(channels: int, outputs: int, side: int, kernel: int, batch: int) -> ConvGeometry:
    axis = AxisGeometry(side, kernel, before=kernel // 2, after=kernel // 2)
    return ConvGeometry(batch, channels, outputs, axis, axis)


# Name, geometry, rows of a block, and the share of blocks that is kept.
PLANES = (
    ("3x3 128 to 128, 28x28, batch 1", _conv(128, 128, 28, 3, 1), 8, 0.1),
    ("3x3 128 to 128, 28x28, batch 64", _conv(128, 128, 28, 3, 64), 16, 0.1),
    ("1x1 256 to 64, 56x56, batch 64", _conv(256, 64, 56, 1, 64), 16, 0.1),
    ("3x3 512 to 512, 7x7, batch 1", _conv(512, 512, 7, 3, 1), 8, 0.1),
)
# Outputs, inputs, rows of a block, and the share of blocks that is kept.
ROWS = ((4096, 4096, 8, 0.1),)


def table(target: PivotTarget) -> Iterator[str]:
    """The lines of a Markdown table: megabytes, and microseconds without starting the kernel."""
    yield f"| {' | '.join((*COLUMNS, *TIMES))} |"
    yield "|---" * len((*COLUMNS, *TIMES)) + "|"
    for name, g, rows, share in PLANES:
        blocks, pixels = g.outputs // rows, g.batch * g.y.output * g.x.output
        columns = g.channels * g.y.kernel * g.x.kernel
        entries = round(share * blocks * columns)
        _, cycles = choose_planes(CudaPlanes(g, rows, blocks, RELU), entries, target)
        image = g.batch * g.channels * g.y.size * g.x.size
        memory = SIZE * (image + g.outputs * pixels + entries * (rows + 1))
        name = f"planes, {name}, {rows}x1 at {100 * (1 - share):.0f} %"
        yield _line(
            name, 2 * entries * rows * pixels, memory, SIZE * entries * pixels, cycles, target
        )
    for outputs, inputs, rows, share in ROWS:
        entries = round(share * outputs // rows * inputs)
        problem = RowsProblem(1, inputs, outputs, outputs // rows, rows, False, RELU)
        _, cycles = choose_rows(problem, entries, target)
        weights = SIZE * entries * (rows + 1)
        name = f"rows, {outputs} x {inputs}, one input, {rows}x1 at {100 * (1 - share):.0f} %"
        memory = weights + SIZE * (inputs + outputs)
        yield _line(name, 2 * entries * rows, memory, weights + SIZE * entries, cycles, target)


def _line(
    name: str, flops: float, memory: float, level_2: float, cycles: float, target: PivotTarget
) -> str:
    gpu = target.gpu
    assert gpu is not None
    peak = 2 * gpu.fp32_lanes * gpu.multiprocessors * gpu.clock_ghz * 1e9
    times = (
        flops / peak * 1e6,
        memory / gpu.memory_gbs / 1e3,
        level_2 / gpu.l2_gbs / 1e3,
        cycles / gpu.clock_ghz / 1e3,
    )
    counts = f"{flops / 1e9:.2f} | {memory / 1e6:.1f} | {level_2 / 1e6:.0f}"
    return f"| {name} | {counts} | {' | '.join(f'{time:.1f}' for time in times)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Rooflines of the CUDA-core kernels.")
    parser.add_argument("--target", default="h100")
    print(*table(resolve(parser.parse_args().target)), sep="\n")


if __name__ == "__main__":
    main()
