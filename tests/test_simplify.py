"""Clamps, views and arithmetic: one spelling each, and what must not be rewritten."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from relax_nets import (
    add,
    assert_same_function,
    calls,
    chained,
    checked,
    f32,
    inputs_for,
    make,
    normal,
    ops,
    run,
    times,
)
from tvm import relax
from tvm.ir import Expr

from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.graph import ints

# --- clamps -------------------------------------------------------------------------------------


def maximum(bound: float) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.maximum(f32(bound), x)


def minimum(bound: float) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.minimum(x, f32(bound))


def relu(x: Expr) -> Expr:
    return relax.op.nn.relu(x)


def clip(low: float, high: float) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.clip(x, low, high)


CLAMPS = {
    "maximum with zero": ([maximum(0)], "nn.relu"),
    "clip without an upper end": ([clip(0, float("inf"))], "nn.relu"),
    "clip at the largest float": ([clip(0, 3.4028234663852886e38)], "nn.relu"),
    "where positive": (
        [lambda x: relax.op.where(relax.op.greater(x, f32(0)), x, f32(0))],
        "nn.relu",
    ),
    "where negative": (
        [lambda x: relax.op.where(relax.op.less_equal(x, f32(0)), f32(0), x)],
        "nn.relu",
    ),
    "relu twice": ([relu, relu], "nn.relu"),
    "relu6 by minimum": ([relu, minimum(6)], "clip"),
    "relu6 by maximum last": ([minimum(6), maximum(0)], "clip"),
    "clip with whole numbers": ([clip(0, 6)], "clip"),
    "clip of a clip": ([clip(-1, 1), clip(0, 3)], "clip"),
    "lone maximum": ([maximum(0.5)], "maximum"),
    "lone minimum": ([minimum(0.5)], "minimum"),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps_have_one_spelling(name: str) -> None:
    steps, expected = CLAMPS[name]
    assert ops(checked(chained(*steps), (4, 25))) == [expected]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: relax.op.where(relax.op.greater(x, f32(0)), x, f32(1)),
        lambda x: relax.op.where(relax.op.greater(x, f32(0)), f32(0), x),
        lambda x: relax.op.where(relax.op.greater(x, f32(1)), x, f32(0)),
    ],
    ids=["other value", "mirrored", "other bound"],
)
def test_other_selections_stay(other: Callable[[Expr], Expr]) -> None:
    assert "where" in ops(checked(chained(other), (4, 25)))


def test_maximum_with_a_vector_is_no_clamp() -> None:
    assert ops(checked(chained(lambda x: relax.op.maximum(x, f32(normal(5)))), (4, 5))) == [
        "maximum"
    ]


def test_compiled_clips_of_the_onnx_frontend_are_recognised() -> None:
    onnx = pytest.importorskip("onnx")
    from tvm.relax.frontend.onnx import from_onnx

    for opset in (10, 17):
        bounds = {"min": 0.0, "max": 6.0} if opset < 11 else {}
        names = ["x"] if opset < 11 else ["x", "low", "high"]
        node = onnx.helper.make_node("Clip", names, ["y"], **bounds)
        values = [onnx.helper.make_tensor(n, 1, [], [v]) for n, v in (("low", 0.0), ("high", 6.0))]
        ends = [onnx.helper.make_tensor_value_info(n, 1, (2, 3)) for n in "xy"]
        graph = onnx.helper.make_graph(
            [node], "g", ends[:1], ends[1:], values if opset > 10 else []
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        mod = from_onnx(model)
        assert ops(mod)[-1] == "call_tir"
        out = canonicalize(mod)
        assert ops(out) == ["clip"]
        assert [g.name_hint for g in out.get_global_vars()] == ["main"]
        assert_same_function(mod, out)


@pytest.mark.parametrize(
    ("pads", "value", "mode", "known"),
    [
        ([0, 2, 0, 0, 0, 2, 0, 0], 0.0, "constant", True),
        ([0, 0, 1, 1, 0, 0, 2, 1], 0.5, "constant", True),
        ([0, 3, 0, 0, 0, 0, 0, 4], 0.0, "constant", True),
        ([0, 1, 0, 0, 0, 4, 0, 0], 0.0, "constant", False),
        ([0, 0, 1, 1, 0, 0, 1, 1], 0.0, "reflect", False),
    ],
    ids=["both ends", "odd", "one end", "neither", "reflected"],
)
def test_compiled_pads_of_the_onnx_frontend_are_recognised(
    pads: list[int], value: float, mode: str, known: bool
) -> None:
    onnx = pytest.importorskip("onnx")
    from tvm.relax.frontend.onnx import from_onnx

    tensors = [
        onnx.helper.make_tensor("pads", 7, [8], pads),
        onnx.helper.make_tensor("value", 1, [], [value]),
    ]
    names = ["x", "pads", "value"] if mode == "constant" else ["x", "pads"]
    node = onnx.helper.make_node("Pad", names, ["y"], mode=mode)
    out = [n + a + b for n, a, b in zip((2, 3, 4, 5), pads[:4], pads[4:], strict=True)]
    ends = [
        onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", (2, 3, 4, 5)), ("y", out))
    ]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    mod = from_onnx(model)
    raised = canonicalize(mod)
    assert ops(raised) == ["nn.pad" if known else "call_tir"]
    assert_same_function(mod, raised)


def test_other_compiled_functions_stay() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        return bb.emit_te(lambda t: tvm.topi.maximum(t, 2 * t), x, primfunc_name_hint="maximum")

    mod = make(body, (3, 4))
    out = canonicalize(mod)
    assert ops(out) == ["call_tir"]
    assert len(out.get_global_vars()) == len(mod.get_global_vars())
    assert_same_function(mod, out)


# --- views and arithmetic -----------------------------------------------------------------------


VIEWS = {
    "flatten": ((2, 3, 4), [relax.op.flatten], ["reshape"]),
    "reshapes in a row": (
        (2, 3, 4),
        [lambda x: relax.op.reshape(x, (6, 4)), lambda x: relax.op.expand_dims(x, 0)],
        ["reshape"],
    ),
    "there and back": (
        (2, 3),
        [lambda x: relax.op.expand_dims(x, 0), lambda x: relax.op.squeeze(x, [0])],
        [],
    ),
    "around an activation": (
        (2, 3),
        [lambda x: relax.op.reshape(x, (3, 2)), relu, lambda x: relax.op.reshape(x, (2, 3))],
        ["nn.relu"],
    ),
    "permutations that cancel": (
        (2, 3, 4),
        [
            lambda x: relax.op.permute_dims(x, [1, 2, 0]),
            lambda x: relax.op.permute_dims(x, [2, 0, 1]),
        ],
        [],
    ),
    "permutations that join": (
        (2, 3, 4),
        [lambda x: relax.op.permute_dims(x, [1, 2, 0]), lambda x: relax.op.permute_dims(x)],
        ["permute_dims"],
    ),
    "permutation of an axis of extent one": (
        (2, 1, 4),
        [lambda x: relax.op.permute_dims(x, [1, 0, 2])],
        ["reshape"],
    ),
    "casts and broadcasts to what is": (
        (2, 3),
        [lambda x: relax.op.astype(x, "float32"), lambda x: relax.op.broadcast_to(x, (2, 3))],
        [],
    ),
    "whole slice": ((2, 3), [lambda x: relax.op.strided_slice(x, [1], [0], [9])], []),
    "reversing slice": (
        (2, 3),
        [lambda x: relax.op.strided_slice(x, [1], [2], [-4], [-1])],
        ["strided_slice"],
    ),
    "concatenation of one": ((2, 3), [lambda x: relax.op.concat([x], 0)], []),
    "dropout": ((2, 3), [lambda x: relax.op.nn.dropout(x, 0.5)[0]], []),
    "division": ((2, 3), [lambda x: relax.op.divide(x, f32(4.0))], ["multiply"]),
    "division by almost nothing": (
        (2, 3),
        [lambda x: relax.op.divide(x, f32([1e-39, 1.0, 2.0]))],
        ["divide"],
    ),
    "division by zero": ((2, 3), [lambda x: relax.op.divide(x, f32([0.0, 1.0, 2.0]))], ["divide"]),
    "subtraction": ((2, 3), [lambda x: relax.op.subtract(x, f32(normal(3)))], ["add"]),
    "subtraction from a constant": (
        (2, 3),
        [lambda x: relax.op.subtract(f32(1.0), x)],
        ["subtract"],
    ),
    "neutral operands": ((2, 3), [add(0.0), times(1.0)], []),
    "neutral operand that broadcasts": ((2, 1), [add(np.zeros((2, 3)))], ["add"]),
    "constant repeated by hand": (
        (2, 3),
        [lambda x: relax.op.add(x, relax.op.broadcast_to(f32(normal(3)), (2, 3)))],
        ["add"],
    ),
    "global average": (
        (2, 3, 4, 4),
        [lambda x: relax.op.nn.avg_pool2d(x, (4, 4), layout="NCHW")],
        ["mean"],
    ),
    "adaptive average": ((2, 3, 4, 4), [lambda x: relax.op.nn.adaptive_avg_pool2d(x, 1)], ["mean"]),
    "adaptive average of parts": (
        (2, 3, 4, 4),
        [lambda x: relax.op.nn.adaptive_avg_pool2d(x, 2)],
        ["nn.adaptive_avg_pool2d"],
    ),
    "padded average": (
        (2, 3, 2, 2),
        [lambda x: relax.op.nn.avg_pool2d(x, (4, 4), padding=1, count_include_pad=True)],
        ["nn.avg_pool2d"],
    ),
    "mean over negative axes": ((2, 3, 4), [lambda x: relax.op.mean(x, [-1, -2])], ["mean"]),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("name", VIEWS)
def test_views_and_arithmetic(name: str) -> None:
    shape, steps, expected = VIEWS[name]
    mod = make(chained(*steps), shape)
    out = canonicalize(mod)
    assert ops(out) == expected
    with np.errstate(all="ignore"):
        for e, a in zip(run(mod, *inputs_for(mod)), run(out, *inputs_for(mod)), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-6)


@pytest.mark.parametrize("index", [-1, -3, [-1, 0, 1], [[2, -2]], [-3, -1]])
def test_indices_that_count_from_the_end(index: object) -> None:
    picked = np.asarray(index, "int64")
    data = normal(2, 3, 4)
    mod = make(lambda bb, x: bb.emit(relax.op.take(x, relax.const(picked), 1, "fast")), (2, 3, 4))
    (got,) = run(canonicalize(mod), data)
    np.testing.assert_array_equal(got, data.take(picked, 1))


def test_mean_axes_count_from_the_front() -> None:
    out = checked(chained(lambda x: relax.op.mean(x, [-1, 1])), (2, 3, 4))
    assert ints(calls(out, "mean")[0].attrs.axis) == (1, 2)
