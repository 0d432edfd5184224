"""Constants, structure and whole networks in canonical form."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_nets import (
    RandomNet,
    assert_same_function,
    batch_norm,
    calls,
    chained,
    checked,
    conv,
    f32,
    load_onnx,
    make,
    normal,
    ops,
)
from tvm import relax
from tvm.ir import Expr

from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.graph import array_of, live_bindings

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


# --- constants ----------------------------------------------------------------------------------


def test_operators_on_constants_are_evaluated() -> None:
    w = f32(normal(5, 3))

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        shifted = relax.op.add(relax.op.permute_dims(w), relax.op.full((1, 5), f32(2.0)))
        pieces = relax.op.split(relax.op.concat([shifted, shifted], 0), 2, 0)
        return relax.op.matmul(
            x, bb.emit(relax.op.take(pieces[1], relax.const([2, 0, 1], "int64"), 0))
        )

    mod = make(body, (4, 3))
    out = canonicalize(mod)
    assert ops(out) == ["matmul"]
    expected = (array_of(w).T + 2)[[2, 0, 1]]
    np.testing.assert_array_equal(array_of(calls(out, "matmul")[0].args[1]), expected)
    assert_same_function(mod, out)


def test_shapes_are_constants() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        shape = bb.emit(relax.op.shape_to_tensor(bb.emit(relax.op.shape_of(x))))
        rows = bb.emit(relax.op.take(shape, relax.const([0], "int64"), 0))
        return relax.op.add(x, relax.op.astype(rows, "float32"))

    out = checked(body, (4, 3))
    assert ops(out) == ["add"]
    assert float(array_of(calls(out, "add")[0].args[1]).item()) == 4


def test_large_repetitions_are_not_stored() -> None:
    out = canonicalize(
        make(chained(lambda x: relax.op.add(x, relax.op.zeros((1024, 1024), "float32"))), (1, 1))
    )
    assert ops(out) == ["zeros", "add"]


def test_out_of_range_take_is_left_to_tvm() -> None:
    w = f32(normal(3, 2))
    out = canonicalize(
        make(
            chained(lambda x: relax.op.add(x, relax.op.take(w, relax.const([7], "int64"), 0))),
            (1, 2),
        )
    )
    assert ops(out) == ["take", "add"]


def test_float64_and_int64_constants_keep_their_type() -> None:
    def body(bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        doubled = relax.op.add(
            relax.const(np.ones(2), "float64"), relax.const(np.ones(2), "float64")
        )
        long = relax.op.add(relax.const([1, 2], "int64"), relax.const([3, 4], "int64"))
        return [x, doubled, long]

    out = checked(body, (2,))
    assert [str(f.dtype) for f in out["main"].ret_ty.fields] == ["float32", "float64", "int64"]
    assert ops(out) == []


def test_hundreds_of_megabytes_fold_quickly() -> None:
    big = relax.const(np.zeros((6144, 4096), "float32"), "float32")  # 100 MB

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        y = bb.emit(relax.op.matmul(x, bb.emit(relax.op.permute_dims(big))))
        return bb.emit(relax.op.matmul(y, big))

    mod = make(body, (1, 4096))
    start = time.process_time()
    out = canonicalize(mod)
    assert time.process_time() - start < 10
    assert ops(out) == ["matmul", "matmul"]


# --- structure ----------------------------------------------------------------------------------


def test_one_dataflow_block_without_dead_code() -> None:
    params = [relax.Var("x", relax.TensorType((2, 3), "float32"))]
    bb = relax.BlockBuilder()
    with bb.function("main", params, attrs={"num_input": 1}):
        with bb.dataflow():
            y = bb.emit_output(relax.op.nn.relu(params[0]))
            bb.emit(relax.op.exp(params[0]))
        z = bb.emit(relax.op.tanh(y))
        bb.emit_func_output(relax.op.sigmoid(z))
    out = canonicalize(bb.get())
    blocks = out["main"].body.blocks
    assert len(blocks) == 1 and isinstance(blocks[0], relax.DataflowBlock)
    assert ops(out) == ["nn.relu", "tanh", "sigmoid"]
    assert int(out["main"].attrs["num_input"]) == 1
    assert [p.name for p in out["main"].params] == ["x"]
    assert_same_function(bb.get(), out)


def test_the_module_given_is_not_changed() -> None:
    mod = make(chained(conv(normal(4, 3, 1, 1)), batch_norm(4)), (1, 3, 2, 2))
    before = mod.script()
    canonicalize(mod)
    assert mod.script() == before


def test_result_may_be_an_input_or_a_constant() -> None:
    out = checked(lambda bb, x: [x, f32(normal(2)), relax.op.add(x, f32(0.0))], (2,))
    assert ops(out) == []
    assert len(live_bindings(out["main"])) <= 1


def test_branches_come_back_unchanged() -> None:
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    c = relax.Var("c", relax.TensorType((), "bool"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x, c]):
        branch = relax.If(c, relax.op.nn.relu(x), relax.op.exp(x))
        bb.emit_func_output(bb.emit(branch))
    mod = bb.get()
    tvm.ir.assert_structural_equal(canonicalize(mod), relax.transform.Normalize()(mod))


def test_impure_functions_come_back_unchanged() -> None:
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [x], pure=False):
        bb.emit(relax.op.print(x, format="{}"))
        bb.emit_func_output(bb.emit(relax.op.add(x, f32(0.0))))
    mod = bb.get()
    tvm.ir.assert_structural_equal(canonicalize(mod), relax.transform.Normalize()(mod))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.integers(0, 2**16))
def test_random_networks_keep_their_function(choose: random.Random, seed: int) -> None:
    mod = RandomNet(choose, seed, steps=8).build()
    out = canonicalize(mod)
    assert_same_function(mod, out)
    assert ops(canonicalize(out)) == ops(out)


# --- real networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet5_dns.onnx", "lenet300_dns.onnx"])
def test_lenet(name: str) -> None:
    mod = load_onnx(DATA / name)
    out = canonicalize(mod)
    assert "permute_dims" not in ops(out)
    assert_same_function(mod, out)


def test_ultraface_has_no_batch_norm_left() -> None:
    mod = load_onnx(DATA / "ultraface_rfb320.onnx", opset=17)
    out = canonicalize(mod)
    found = set(ops(out))
    assert not found & {"nn.batch_norm", "divide", "subtract"} - {"subtract"}
    assert len(calls(out, "nn.conv2d")) == len(calls(mod, "nn.conv2d"))
    relax.analysis.well_formed(out)


def test_torch_networks() -> None:
    torch = pytest.importorskip("torch")
    from torch import nn
    from tvm.relax.frontend.torch import from_exported_program

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    nets = [
        (
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            (1, 3, 8, 8),
        ),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)), (3, 4)),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
        (nn.LSTM(4, 6, batch_first=True), (2, 3, 4)),
    ]
    for norm in (nets[0][0][1], nets[1][0][1]):
        nn.init.normal_(norm.bias)
    expected = [["nn.conv2d", "add", "clip"], ["matmul", "add", "matmul", "add"]]
    for i, (net, shape) in enumerate(nets):
        exported = torch.export.export(net.eval(), (torch.zeros(shape),))
        mod = from_exported_program(exported, keep_params_as_input=False)
        out = canonicalize(mod)
        assert_same_function(mod, out)
        weights = [array_of(c.args[1]) for c in calls(out, "matmul")]
        assert all(w is None or w.ndim == 2 for w in weights)
        if i < len(expected):
            assert ops(out) == expected[i]
