"""Node tests that ONNX ships: computed right, or refused with a reason; `benchmarks/onnx_nodes.py`
runs all of them."""

import numpy as np
import pytest
from onnx import TensorProto, helper

import tvm_pivot
from benchmarks.onnx_nodes import cases, check, difference, known

EVERY = 24
CHOSEN = sorted(cases())[::EVERY]


@pytest.mark.parametrize("name", CHOSEN)
def test_right_or_refused(name: str) -> None:
    outcome, reason = check(cases()[name])
    assert outcome != "wrong" or known(name), reason


@pytest.mark.parametrize(
    "name",
    [
        "test_attention_23_boolmask_fullymasked_row_nan_robustness",
        "test_expand_dim_unchanged",
        "test_range_float_type_positive_delta",
        "test_compress_0",
        "test_layer_normalization_2d_axis1_expanded",
    ],
)
def test_what_once_was_wrong_is_right(name: str) -> None:
    assert check(cases()[name]) == ("right", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_batchnorm_epsilon_training_mode", "it is in training mode"),
        ("test_convtranspose_output_shape", "output_shape is not supported"),
        ("test_dropout_default_mask", "its mask is read"),
        ("test_if_seq", "'res' is not a tensor"),
        ("test_isinf_negative", "infinities of both signs"),
        ("test_layer_normalization_2d_axis1", "its mean or standard deviation is read"),
        ("test_nonmaxsuppression_limit_output_size", "how many boxes it selects"),
        ("test_roialign_mode_max", "only the mode 'avg' is supported"),
    ],
)
def test_what_would_be_wrong_is_refused(name: str, reason: str) -> None:
    outcome, message = check(cases()[name])
    assert outcome == "refused"
    assert reason in message


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.DOUBLE])
def test_rows_of_nothing_but_infinity(op: str, dtype: int) -> None:
    x, y = (
        helper.make_tensor_value_info(name, dtype, shape)
        for name, shape in (("x", [3, 40]), ("y", [3]))
    )
    node = helper.make_node(op, ["x"], ["y"], axes=[1], keepdims=0)
    graph = helper.make_graph([node], op, [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    value = np.random.default_rng(0).standard_normal((3, 40))
    value = value.astype(helper.tensor_dtype_to_np_dtype(dtype))
    value[0], value[1] = -np.inf, np.inf
    want = value.max(axis=1) if op == "ReduceMax" else value.min(axis=1)
    np.testing.assert_array_equal(tvm_pivot.build(model, threads=1).run(value), want)


def test_differences_are_seen() -> None:
    one = np.ones((2, 2), np.float32)
    assert difference(one, one) == ""
    assert difference(one, one * np.float32(1.01)).startswith("off by")
    assert difference(one, np.where([[True, False]] * 2, one, np.nan)).startswith("off by")
    assert "shape" in difference(one, one[0])
    assert "float64" in difference(one.astype(np.float64), one)
    assert difference(np.array([1]), np.array([2])) == "other values"
