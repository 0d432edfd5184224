"""Softmax with one division per sum: any axis, rows with minus infinity, and what it becomes."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from relax_nets import inputs_for, make
from tvm import relax, te, tirx
from tvm.relax import op

import tvm_pivot
from tvm_pivot.relay_passes.legalize_softmax import legalize_softmax, softmax

EPS = float(np.finfo(np.float32).eps)


def expected(x, axis):
    x = x.astype(np.float64)
    power = np.exp(x - x.max(axis=axis, keepdims=True))
    return power / power.sum(axis=axis, keepdims=True)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
@settings(max_examples=25, deadline=None)
def test_any_axis_of_any_shape(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = (data.draw(st.sampled_from([1.0, 60.0])) * rng.standard_normal(shape)).astype(np.float32)
    if shape[axis] > 1:  # what attention masks out
        x[tuple(0 if i == axis else slice(None) for i in range(len(shape)))] = -np.inf
    source = te.placeholder(shape, "float32", name="x")
    func = te.create_prim_func([source, softmax(source, axis)])
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    tvm.compile(func.with_attr("global_symbol", "main"), target="llvm")(tvm.runtime.tensor(x), out)
    np.testing.assert_allclose(out.numpy(), expected(x, axis), rtol=64 * EPS, atol=EPS)


def legalised(dtype):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 40), dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(op.nn.softmax(x, -1))
        builder.emit_func_output(output)
    mod = relax.transform.LegalizeOps({"relax.nn.softmax": legalize_softmax})(builder.get())
    (func,) = (f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc))
    return str(func)


def test_a_row_is_divided_once():
    divisions = [line.strip() for line in legalised("float32").splitlines() if " / " in line]
    assert len(divisions) == 1 and divisions[0].startswith("share[")


def test_other_types_are_left_to_tvm():
    assert "T_softmax_norm" in legalised("float16")


@pytest.mark.parametrize("axis", [1, -1])
def test_in_a_network(axis):
    mod = make(lambda builder, x: builder.emit(op.nn.softmax(x, axis)), (2, 5, 33))
    (x,) = inputs_for(mod)
    got = np.asarray(tvm_pivot.build(mod).run(x)).reshape(x.shape)
    np.testing.assert_allclose(got, expected(x, axis), rtol=64 * EPS, atol=EPS)
