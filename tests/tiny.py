"""Networks of a few operators, built by hand: they test running and saving without the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import tvm
from tvm import relax, te

from tvm_pivot.manifest import Manifest
from tvm_pivot.report import LayerReport, Report
from tvm_pivot.session import Session
from tvm_pivot.targets import PivotTarget, resolve
from tvm_pivot.tensors import TensorSpec

LAYER = LayerReport(
    name="conv1",
    op="conv2d",
    shape=(64, 32, 3, 3),
    pattern="8x1 blocks",
    density=0.1,
    block="8x1",
    fill=1.0,
    mode="sparse",
    reason="skips 90.0 % of the operations",
    flops_dense=590_000_000,
    flops_kept=59_000_000,
    kernel="block_sparse_conv1",
)
REPORT = Report((LAYER,), "x86", ("12 dead rows dropped",), 1.5)

Spec = tuple[str, tuple[int, ...], str]


def manifest(
    inputs: Sequence[Spec], outputs: Sequence[Spec], target: PivotTarget | None = None
) -> Manifest:
    """A manifest for a hand-made network."""
    return Manifest.create(
        "tiny",
        target or resolve("x86"),
        tuple(TensorSpec(*spec) for spec in inputs),
        tuple(TensorSpec(*spec) for spec in outputs),
        REPORT,
    )


def compiled(inputs: Sequence[Spec], body: Callable[..., Any]) -> relax.VMExecutable:
    """Compile ``main(*inputs)``, whose result is `body` of Relax variables: one or a list."""
    builder = relax.BlockBuilder()
    variables = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape, dtype in inputs]
    with builder.function("main", variables):
        with builder.dataflow():
            result = body(*variables)
            single = isinstance(result, relax.Expr)
            # The same expression twice is one variable that is returned twice.
            once = {id(e): builder.emit_output(e) for e in ([result] if single else result)}
            made = list(once.values()) if single else [once[id(e)] for e in result]
        builder.emit_func_output(made[0] if single else relax.Tuple(made))
    return relax.build(builder.get(), resolve("x86").to_tvm())


@cache
def relu_executable(size: int = 16, dtype: str = "float32") -> relax.VMExecutable:
    """``x [1, size] -> relu(x)``."""
    return compiled([("x", (1, size), dtype)], relax.op.nn.relu)


def relu(size: int = 16, dtype: str = "float32", **more: Any) -> Session:
    """A session of `relu_executable`."""
    specs = [("x", (1, size), dtype)], [("y", (1, size), dtype)]
    return Session(relu_executable(size, dtype), manifest(*specs), **more)


def two_by_two() -> Session:
    """``a, b [2, 3] -> sum a + b, difference a - b``."""
    inputs = [("a", (2, 3), "float32"), ("b", (2, 3), "float32")]
    executable = compiled(inputs, lambda a, b: [relax.op.add(a, b), relax.op.subtract(a, b)])
    outputs = [("sum", (2, 3), "float32"), ("difference", (2, 3), "float32")]
    return Session(executable, manifest(inputs, outputs))


@cache
def heavy_executable(work: int) -> relax.VMExecutable:
    """``x [8, 4096] -> work * x``, added up in a loop: parallel over 8, slow on purpose."""
    x = relax.Var("x", relax.TensorType((8, 4096), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(
                builder.call_te(_repeat_sum, x, work, primfunc_name_hint="heavy")
            )
        builder.emit_func_output(y)
    schedule = tvm.s_tir.Schedule(builder.get())
    schedule.work_on("heavy")
    block = schedule.get_child_blocks(schedule.get_sblock("root"))[0]
    row, column, again = schedule.get_loops(block)
    outer, inner = schedule.split(column, [None, 16])
    schedule.reorder(row, outer, again, inner)
    schedule.vectorize(inner)
    schedule.parallel(row)
    schedule.decompose_reduction(block, again)
    return relax.build(schedule.mod, resolve("x86").to_tvm())


def heavy(work: int = 500, **more: Any) -> Session:
    """A session of `heavy_executable`; `work` = 500 takes about a millisecond of one core."""
    specs = [("x", (8, 4096), "float32")], [("y", (8, 4096), "float32")]
    return Session(heavy_executable(work), manifest(*specs), **more)


def _repeat_sum(a: te.Tensor, work: int) -> te.Tensor:
    again = te.reduce_axis((0, work), name="again")
    # The multiplication keeps LLVM from replacing the loop by one.
    one = tvm.tirx.const(1.0001, "float32")
    return te.compute(a.shape, lambda i, j: te.sum(a[i, j] * one, axis=again), name="heavy")
