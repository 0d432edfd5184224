"""The schedule rules: random shapes, what they do to loops, and how they fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_oracle import HOST, THREADED, compare, functions, module, rules, run
from tvm import s_tir, tirx
from tvm.relax import op
from tvm.script import tirx as T

from tvm_pivot.errors import CompileError
from tvm_pivot.relay_passes.schedule_functions import schedule_functions
from tvm_pivot.schedules import contraction, fallback, rules_for
from tvm_pivot.schedules.analysis import Block, is_naive, leaf_blocks, walk
from tvm_pivot.schedules.contraction import choose_tile
from tvm_pivot.schedules.moves import whole_tiles
from tvm_pivot.targets import resolve

SIZES = st.sampled_from([1, 2, 3, 7, 16, 17, 31, 49, 65, 100])
TARGETS = st.sampled_from([HOST, THREADED])
FEW = settings(max_examples=30)


@st.composite
def shapes(draw: Callable[..., Any], most: int = 4) -> tuple[int, ...]:
    shape = draw(st.lists(SIZES, min_size=1, max_size=most).filter(lambda s: math.prod(s) < 40_000))
    return tuple(shape)


@FEW
@given(data=st.data(), shape=shapes(), target=TARGETS)
def test_broadcast_chain_and_transpose(data: Any, shape: tuple[int, ...], target: Any) -> None:
    other = tuple(extent if data.draw(st.booleans()) else 1 for extent in shape)
    axes = data.draw(st.permutations(range(len(shape))))
    compare(
        lambda x, y: op.permute_dims(op.nn.gelu(op.nn.silu(x * y)), axes),
        lambda x, y: F.gelu(F.silu(x * y)).permute(axes),
        *(shape, other),
        target=target,
    )


@FEW
@given(data=st.data(), shape=shapes(), target=TARGETS)
def test_views_behind_chains_and_transposes(data: Any, shape: tuple[int, ...], target: Any) -> None:
    axes = data.draw(st.permutations(range(len(shape))))
    flat = data.draw(st.sampled_from([(1, -1), (-1,), (-1, shape[axes[-1]])]))
    new = tuple(math.prod(shape) // math.prod(abs(s) for s in flat) if s < 0 else s for s in flat)
    compare(
        lambda x: op.reshape(op.permute_dims(op.nn.relu(x), axes), new),
        lambda x: F.relu(x).permute(axes).reshape(new),
        shape,
        target=target,
    )


def test_a_view_leaves_the_axes_of_the_transpose_before_it() -> None:
    mod = module(lambda x: op.reshape(op.permute_dims(x), (1, 98304)), (128, 768))
    (func,) = functions(schedule_functions(mod, HOST)).values()
    loops = [int(loop.extent) for loop in walk(func.body, tirx.For)]
    assert sorted(loops) == sorted([128 // HOST.lanes, 768 // HOST.lanes, HOST.lanes, HOST.lanes])


@FEW
@given(data=st.data(), shape=shapes(3), target=TARGETS)
def test_concat_pad_slice(data: Any, shape: tuple[int, ...], target: Any) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    second = tuple(data.draw(SIZES) if a == axis else s for a, s in enumerate(shape))
    step = data.draw(st.integers(1, 3))
    widths = [data.draw(st.integers(0, 3)) for _ in range(2 * len(shape))]
    torch_widths = [w for a in reversed(range(len(shape))) for w in widths[2 * a : 2 * a + 2]]
    sliced = tuple(slice(None, None, step) if a == axis else slice(None) for a in range(len(shape)))
    compare(
        lambda x, y: op.strided_slice(
            op.nn.pad(op.concat([x, y], axis), widths), [axis], [0], [10**6], [step]
        ),
        lambda x, y: F.pad(torch.cat([x, y], axis), torch_widths)[sliced],
        *(shape, second),
        target=target,
    )


@FEW
@given(data=st.data(), shape=shapes(), target=TARGETS)
def test_softmax_along_any_axis(data: Any, shape: tuple[int, ...], target: Any) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    compare(lambda x: op.nn.softmax(x, axis), lambda x: x.softmax(axis), shape, target=target)


@FEW
@given(data=st.data(), shape=shapes(), target=TARGETS, keep=st.booleans())
def test_sums_over_any_axes(data: Any, shape: tuple[int, ...], target: Any, keep: bool) -> None:
    axes = sorted(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    compare(
        lambda x: op.nn.relu(op.mean(op.abs(x), axes, keep)),
        lambda x: x.abs().mean(axes, keep).relu(),
        shape,
        target=target,
    )


@FEW
@given(
    batch=st.integers(1, 3),
    rows=SIZES,
    depth=SIZES,
    columns=SIZES,
    flip=st.booleans(),
    target=TARGETS,
)
def test_matmul(batch: int, rows: int, depth: int, columns: int, flip: bool, target: Any) -> None:
    right = (batch, columns, depth) if flip else (batch, depth, columns)
    compare(
        lambda a, b: op.nn.relu(op.matmul(a, op.permute_dims(b, [0, 2, 1]) if flip else b)),
        lambda a, b: (a @ (b.transpose(1, 2) if flip else b)).relu(),
        *((batch, rows, depth), right),
        target=target,
    )


@FEW
@given(
    channels=st.integers(1, 9),
    size=st.tuples(st.integers(4, 33), st.integers(4, 33)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    ceil=st.booleans(),
    target=TARGETS,
)
def test_pooling(
    channels: int, size: tuple[int, int], kernel: int, stride: int, ceil: bool, target: Any
) -> None:
    pad = kernel // 2
    compare(
        lambda x: op.nn.max_pool2d(x, kernel, stride, pad, ceil_mode=ceil),
        lambda x: F.max_pool2d(x, kernel, stride, pad, ceil_mode=ceil),
        (1, channels, *size),
        target=target,
    )


@FEW
@given(
    groups=st.integers(1, 3),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(5, 20), st.integers(5, 20)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    target=TARGETS,
)
def test_convolution(
    groups: int,
    per_group: tuple[int, int],
    size: tuple[int, int],
    kernel: int,
    stride: int,
    target: Any,
) -> None:
    inputs, outputs = per_group
    compare(
        lambda x, w: op.nn.conv2d(x, w, strides=stride, padding=1, groups=groups),
        lambda x, w: F.conv2d(x, w, stride=stride, padding=1, groups=groups),
        *((1, groups * inputs, *size), (groups * outputs, inputs, kernel, kernel)),
        target=target,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (op.exp, torch.exp),
        (op.sigmoid, torch.sigmoid),
        (op.tanh, torch.tanh),
        (op.erf, torch.erf),
        (lambda x: op.log(op.abs(x)), lambda x: x.abs().log()),
        (lambda x: op.rsqrt(op.abs(x)), lambda x: x.abs().rsqrt()),
        (op.sinh, torch.sinh),
        (op.cosh, torch.cosh),
        (lambda x: op.power(x, tvm.relax.const(3.0, "float32")), lambda x: x**3),
    ],
    ids=["exp", "sigmoid", "tanh", "erf", "log", "rsqrt", "sinh", "cosh", "cube"],
)
def test_vector_math_is_accurate(ours: Any, theirs: Any) -> None:
    special = [0.0, np.inf, -np.inf, np.nan, 88.7, 89.5, -86.0, -104.0]
    steps = [*np.linspace(-86, 86, 3000), *np.linspace(-1e-3, 1e-3, 101), *special]
    values = np.array(steps, dtype="float32")
    scheduled = schedule_functions(module(ours, (len(values),)), HOST)
    (got,) = run(scheduled, HOST, [values])
    wanted = theirs(torch.from_numpy(values).double()).float().numpy()
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-37)


def test_no_library_call_is_left_in_a_vector_loop() -> None:
    mod = schedule_functions(module(lambda x: op.nn.gelu(op.exp(x)), (64, 100)), HOST)
    names = {
        getattr(c.op, "name", "") for f in functions(mod).values() for c in walk(f, tvm.ir.Call)
    }
    assert not names & {"tirx.exp", "tirx.erf"}


def loops(kind: Any, rows: int = 16, columns: int = 64) -> tirx.PrimFunc:
    """B = A + 1 with an outer serial loop and an inner loop of one kind."""

    @T.prim_func(s_tir=True)
    def func(a: T.Buffer((rows, columns), "float32"), b: T.Buffer((rows, columns), "float32")):
        for i, j in T.grid(rows, columns):
            with T.sblock("add"):
                x, y = T.axis.remap("SS", [i, j])
                b[x, y] = a[x, y] + T.float32(1)

    sch = s_tir.Schedule(func)
    inner = sch.get_loops(sch.get_sblock("add"))[-1]
    if kind is not None:
        getattr(sch, kind)(inner)
    return sch.mod["main"]


@pytest.mark.parametrize("kind", ["vectorize", "parallel", "unroll"])
def test_is_naive_accepts_scheduled_loops(kind: str) -> None:
    assert not is_naive(loops(kind))


def test_is_naive_finds_serial_nests_and_allows_short_ones() -> None:
    assert is_naive(loops(None))
    assert is_naive(loops(None, 65, 1))
    assert not is_naive(loops(None, 8, 8))


def test_is_naive_sees_one_bad_nest_among_good_ones() -> None:
    sch = s_tir.Schedule(functions(module(op.nn.softmax, (64, 128)))["softmax"])
    for block in ("T_softmax_maxelem", "T_softmax_exp", "T_softmax_expsum"):
        sch.parallel(sch.get_loops(sch.get_sblock(block))[0])
    assert is_naive(sch.mod["main"])
    sch.parallel(sch.get_loops(sch.get_sblock("T_softmax_norm"))[0])
    assert not is_naive(sch.mod["main"])


def test_attributes_and_one_schedule_for_equal_functions() -> None:
    mod = module(lambda x: op.nn.softmax(op.nn.softmax(x)), (17, 33))
    (func,) = functions(mod).values()
    twice = tvm.IRModule({**dict(mod.functions_items()), "again": func})
    calls = []

    def counting(func: Any, target: Any) -> None:
        calls.append(func)

    scheduled = functions(schedule_functions(twice, HOST, [counting, *rules_for(HOST)]))
    assert len(scheduled) == 2 and len(calls) == 1
    for func in scheduled.values():
        assert func.attrs["tirx.is_scheduled"] and func.attrs["pivot.schedule"] == "reduction"


def test_scheduled_functions_are_left_alone() -> None:
    func = loops(None).with_attr("tirx.is_scheduled", True)
    mod = schedule_functions(tvm.IRModule({"main": func}), HOST)
    assert mod["main"].same_as(func)


def broken(func: Any, target: Any) -> Any:
    raise RuntimeError("no")


def test_a_gpu_runs_no_function_on_the_host() -> None:
    target = resolve("cuda")
    # TVM's own rule for transpositions fails on this one.
    mod = module(lambda x: op.astype(op.reshape(x, (1, 98304)), "float16"), (768, 128))
    assert rules(schedule_functions(mod, target)) == ["cuda_rules"]
    with pytest.raises(CompileError, match="no schedule of it for GPUs"):
        schedule_functions(mod, target, [broken])


def test_a_failing_rule_leaves_the_function_to_the_next() -> None:
    scheduled = compare(op.nn.relu, torch.relu, (17, 49), using=[broken, *rules_for(HOST)])
    assert rules(scheduled) == ["elementwise"]


def test_where_no_rule_is_left_the_function_stays_as_it_is() -> None:
    scheduled = compare(op.nn.relu, torch.relu, (17, 49), using=[broken])
    assert rules(scheduled) == ["none"]


@pytest.mark.parametrize("target", [HOST, THREADED], ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("expression", "reference", "shape"),
    [
        (op.nn.softmax, lambda x: x.softmax(-1), (49, 100)),
        (
            lambda x: op.nn.max_pool2d(x, 3, 2, 1),
            lambda x: F.max_pool2d(x, 3, 2, 1),
            (2, 3, 17, 33),
        ),
        (lambda x: op.argmax(x, 1), lambda x: x.argmax(1), (17, 65)),
    ],
    ids=["softmax", "pool", "argmax"],
)
def test_the_fallback_alone_is_right(
    expression: Any, reference: Any, shape: Any, target: Any
) -> None:
    scheduled = compare(expression, reference, shape, target=target, using=[fallback.apply])
    assert rules(scheduled) == ["fallback"]
    assert not any(is_naive(func) for func in functions(scheduled).values())


def test_several_reductions_with_several_results_fall_back() -> None:
    compare(
        lambda x: op.topk(x, 5),
        lambda x: [part.to(x.dtype if i == 0 else torch.int32) for i, part in enumerate(x.topk(5))],
        (17, 49),
    )


def test_branch_points_and_strides() -> None:
    (func,) = functions(module(lambda x: op.nn.pad(x, [0, 0, 1, 2, 3, 4]), (5, 7, 9))).values()
    sch = s_tir.Schedule(func)
    (block,) = leaf_blocks(sch)
    assert isinstance(block, Block)
    assert block.extents == [5, 10, 16]
    assert [block.branch_points(axis) for axis in range(3)] == [[], [1, 8], [3, 12]]
    assert block.loads[0].strides == (63, 9, 1)
    assert block.collapses(0, 1) is False


def test_blocks_without_normal_form_are_not_ours() -> None:
    expression = module(lambda x: op.nn.adaptive_avg_pool2d(x, (5, 5)), (1, 3, 14, 14))
    (func,) = functions(expression).values()
    assert leaf_blocks(s_tir.Schedule(func)) is None
    assert contraction.apply(func, HOST) is None


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    lanes=st.sampled_from([4, 8, 16]),
    registers=st.sampled_from([16, 32]),
)
def test_tiles_fit_registers_and_results(
    rows: int, columns: int, lanes: int, registers: int
) -> None:
    tile = choose_tile(rows, columns, lanes, registers)
    assert tile.rows * tile.vectors + tile.vectors + 1 <= registers
    assert tile.rows <= rows and tile.width <= columns


def test_attention_gets_wide_tiles() -> None:
    tile = choose_tile(128, 128, 16, 32)
    assert tile.rows * tile.vectors >= 16 and 128 % tile.width == 0 and 128 % tile.rows == 0


def test_whole_tiles_cuts_every_piece() -> None:
    assert whole_tiles(100, 16) == [96]
    assert whole_tiles(64, 16) == []
    assert whole_tiles(100, 16, [10, 50]) == [10, 42, 50, 98]
