"""Operators of ONNX as torch computes them, one at a time, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from importer_oracle import onnxruntime_run
from onnx import TensorProto
from torch_oracle import Case, agree, case, close, data, ints, run, translate

from tvm_pivot.bench.runtimes import UnsupportedModelError

X, IMAGE = data(3, 5), data(2, 4, 9, 8)
TRUTH = X > 0
SAME = ("SAME_UPPER", "SAME_LOWER")

UNARY = """
    Abs Ceil Cos Erf Exp Floor HardSwish Identity Neg Relu Round Selu Sigmoid Sign Sin Softplus
    Tanh Elu LeakyRelu HardSigmoid Softmax LogSoftmax
"""
BINARY = "Add Sub Mul Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Sum"
ELEMENTWISE = [
    *(case(op, [X]) for op in UNARY.split()),
    *(case(op, [data(3, 5, positive=True)]) for op in ("Log", "Reciprocal", "Sqrt")),
    *(case(op, [X], opset=20) for op in ("Gelu", "Mish")),
    case("Gelu", [X], opset=20, approximate="tanh"),
    *(case(op, [X, data(5)]) for op in BINARY.split()),
    *(case(op, [X], [np.float32([0.5])]) for op in BINARY.split()),
    *(case(op, [X], [data(5)]) for op in ("Add", "Equal", "Max", "PRelu")),
    case("Max", [X, data(5), data(3, 1)]),
    case("Div", [ints(7, -7, 9)], [ints(2, 2, -4)]),
    case("Mod", [ints(7, -7, 9)], [ints(2, 4, -4)]),
    case("Mod", [X], [np.float32([0.3])], fmod=1),
    case("Pow", [X], [np.float32(2)]),
    case("Pow", [X], [ints(3)]),
    case("Pow", [ints(2, 3)], [np.float32([3, 2])]),
    case("And", [TRUTH, data(5) > 0]),
    case("Or", [TRUTH], [np.array(True)]),
    case("Not", [TRUTH]),
    case("Where", [TRUTH, X, data(5)]),
    case("Cast", [X], to=TensorProto.INT32),
    case("Cast", [ints(1, 0, 4)], to=TensorProto.BOOL),
    case("Clip", [X], [np.float32(0), np.float32(6)]),
    case("Clip", [X], [np.float32(-0.5), None]),
    case("Clip", [X], [None, np.float32(0.5)]),
    case("Clip", [X], [np.float32(0)]),
    case("Clip", [X], opset=9, min=-0.25, max=0.5),
    case("Elu", [X], alpha=0.5),
    case("LeakyRelu", [X], alpha=0.3),
    case("HardSigmoid", [3 * X], alpha=0.3, beta=0.4),
    case("HardSigmoid", [3 * X], alpha=1 / 6, beta=0.5),
    case("PRelu", [IMAGE], [data(4, 1, 1)]),
    case("PRelu", [IMAGE], [data(9, 8)]),
    case("Softmax", [IMAGE], axis=1),
    case("Softmax", [IMAGE], opset=11, axis=1),
    case("Softmax", [IMAGE], opset=11, axis=3),
    case("Dropout", [X]),
]
REDUCTIONS = [
    *(
        case(f"Reduce{op}", [IMAGE], axes=axes, keepdims=keep)
        for op in ("Mean", "Max", "Min", "Prod", "L2")
        for axes, keep in (([2, 3], 1), ([-1, 1], 0))
    ),
    case("ReduceMean", [IMAGE], axes=[2, 3], keepdims=0),
    case("ReduceMean", [IMAGE]),
    case("ReduceMean", [IMAGE], [ints(-1)], opset=18),
    case("ReduceSum", [IMAGE], [ints(3, 0)], keepdims=0),
    case("ReduceSum", [IMAGE], noop_with_empty_axes=1),
    case("ArgMax", [IMAGE], axis=1, keepdims=0),
    case("ArgMin", [IMAGE], axis=-1),
]
MOVES = [
    case("Reshape", [IMAGE], [ints(0, -1, 4)]),
    case("Flatten", [IMAGE]),
    case("Flatten", [IMAGE], axis=-1),
    case("Flatten", [IMAGE], axis=0),
    case("Squeeze", [data(1, 3, 1, 2)]),
    case("Squeeze", [data(1, 3, 1, 2)], [ints(-2)]),
    case("Squeeze", [data(1, 3, 1, 2)], opset=11, axes=[0]),
    case("Unsqueeze", [X], [ints(0, -1)]),
    case("Unsqueeze", [X], opset=11, axes=[1]),
    case("Transpose", [IMAGE]),
    case("Transpose", [IMAGE], perm=[0, 2, 3, 1]),
    case("Expand", [data(3, 1)], [ints(2, 1, 5)]),
    case("Tile", [X], [ints(2, 3)]),
    case("Concat", [X, data(3, 2)], axis=-1),
    case("Concat", [X], [data(2, 5)], axis=0),
    case("Split", [IMAGE], [ints(1, 3)], outputs=2, axis=1),
    case("Split", [IMAGE], outputs=3, axis=2),
    case("Split", [IMAGE], opset=11, outputs=2, axis=3, split=[5, 3]),
    case("Split", [IMAGE], opset=18, outputs=2, axis=2, num_outputs=2),
    case("Slice", [IMAGE], [ints(1, -7), ints(9, 2**62), ints(3, 2), ints(2, 3)]),
    case("Slice", [IMAGE], [ints(-1, 6), ints(-(2**62), 0), ints(2, 3), ints(-1, -2)]),
    case("Slice", [IMAGE], [ints(0), ints(1)]),
    case("Slice", [IMAGE], opset=9, starts=[1, 0], ends=[3, -1], axes=[1, 2]),
    case("Gather", [IMAGE], [np.array(-1)], axis=2),
    case("Gather", [IMAGE], [np.array([[0, -2], [3, 1]])], axis=1),
    case("Gather", [X, ints(2, -1, 0)]),
    case("Gather", [X, np.array([[4, -1]])], axis=1),
    case("Pad", [IMAGE], [ints(0, 0, 1, 2, 0, 0, 3, 0)]),
    case("Pad", [IMAGE], [ints(0, 1, 0, 0, 0, 2, 0, 0), np.float32(0.5)]),
    case("Pad", [IMAGE], [ints(0, 0, 1, 2, 0, 0, 3, 0)], mode="reflect"),
    case("Pad", [IMAGE], [ints(0, 0, 1, 2, 0, 0, 3, 0)], mode="edge"),
    case("Pad", [IMAGE], [ints(1, 2), None, ints(-1)], opset=18),
    case("Pad", [IMAGE], opset=9, pads=[0, 0, 1, 2, 0, 0, -1, 0], value=1.5),
    case("DepthToSpace", [data(1, 8, 2, 3)], blocksize=2),
    case("DepthToSpace", [data(1, 8, 2, 3)], blocksize=2, mode="CRD"),
]
KERNEL, BIAS = data(6, 4, 3, 2), data(6)
POOL: dict[str, Any] = {"kernel_shape": [3, 2], "strides": [2, 2]}
LAYERS = [
    case("Conv", [IMAGE], [KERNEL]),
    case("Conv", [IMAGE], [KERNEL, BIAS], pads=[1, 0, 1, 0], strides=[2, 1]),
    case("Conv", [IMAGE], [KERNEL, BIAS], pads=[2, 1, 0, 1], dilations=[2, 1]),
    *(case("Conv", [IMAGE], [KERNEL], auto_pad=mode, strides=[2, 1]) for mode in SAME),
    case("Conv", [IMAGE], [KERNEL], auto_pad="VALID"),
    case("Conv", [IMAGE], [data(8, 1, 3, 3), data(8)], group=4),
    case("Conv", [IMAGE, KERNEL]),
    case("Conv", [data(2, 3, 9)], [data(4, 3, 3)], pads=[1, 1]),
    case("Conv", [data(1, 2, 4, 5, 4)], [data(3, 2, 2, 2, 2)]),
    case("ConvTranspose", [IMAGE], [data(4, 3, 3, 2), data(3)], strides=[2, 2], pads=[1, 0, 1, 0]),
    case("ConvTranspose", [IMAGE], [data(4, 3, 3, 3)], strides=[2, 2], output_padding=[1, 1]),
    case("MaxPool", [IMAGE], **POOL),
    case("MaxPool", [IMAGE], **POOL, pads=[1, 1, 1, 1]),
    case("MaxPool", [IMAGE], **POOL, pads=[0, 0, 1, 1]),
    case("MaxPool", [IMAGE], **POOL, ceil_mode=1),
    case("MaxPool", [IMAGE], kernel_shape=[2, 2], dilations=[3, 2]),
    case("MaxPool", [IMAGE], kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
    case("MaxPool", [data(2, 3, 9)], kernel_shape=[2]),
    *(
        case("AveragePool", [IMAGE], **POOL, pads=pads, count_include_pad=counted)
        for pads in ([1, 1, 1, 1], [0, 0, 1, 1])
        for counted in (0, 1)
    ),
    *(case("AveragePool", [IMAGE], **POOL, auto_pad=mode) for mode in SAME),
    case("GlobalAveragePool", [IMAGE]),
    case("GlobalMaxPool", [IMAGE]),
    case("Gemm", [X], [data(5, 4), data(4)]),
    case("Gemm", [X], [data(4, 5), data(4)], transB=1, alpha=0.5, beta=2.0),
    case("Gemm", [data(5, 3)], [data(5, 4), data(3, 4)], transA=1),
    case("Gemm", [X, data(5, 4)], [np.float32(1.5)]),
    case("MatMul", [data(2, 3, 5)], [data(5, 4)]),
    case("MatMul", [data(2, 3, 5), data(2, 5, 4)]),
    case("MatMul", [data(5)], [data(5, 4)]),
    case("MatMul", [data(2, 3, 5)], [data(2, 5, 4)]),
    case("BatchNormalization", [IMAGE], [data(4), BIAS[:4], -BIAS[:4], data(4, positive=True)]),
    case("InstanceNormalization", [IMAGE], [data(4), BIAS[:4]], epsilon=1e-3),
    case("LayerNormalization", [IMAGE], [data(8), data(8)], epsilon=1e-3),
    case("LayerNormalization", [IMAGE], [data(9, 8)], axis=2),
    case("LRN", [IMAGE], size=3, alpha=0.1, beta=0.5, bias=2.0),
    case("Upsample", [IMAGE], [np.float32([1, 1, 2, 3])], opset=9),
    case("Resize", [IMAGE], [np.float32([1, 1, 2, 3])], opset=10),
    case("Resize", [IMAGE], [None, np.float32([1, 1, 2, 2])], mode="nearest"),
    case(
        "Resize",
        [IMAGE],
        [None, None, ints(2, 4, 13, 5)],
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ),
    case("Resize", [IMAGE], [None, None, ints(2, 4, 18, 4)], mode="linear"),
    case(
        "Resize",
        [IMAGE],
        [None, np.float32([1, 1, 2, 2])],
        mode="linear",
        coordinate_transformation_mode="align_corners",
    ),
    case("Resize", [IMAGE], [None, np.float32([1, 1, 2, 2])], mode="cubic"),
]


@pytest.mark.parametrize("one", [*ELEMENTWISE, *REDUCTIONS, *MOVES, *LAYERS], ids=str)
def test_an_operator_computes_what_onnx_runtime_does(one: Case, tmp_path: Path) -> None:
    model, feeds = one.model()
    agree(model, feeds, tmp_path)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (case("Det", [data(3, 3)]), "no translation to torch for Det"),
        (case("Pad", [IMAGE], [ints(0, 1, 0, 0, 0, 1, 0, 0)], opset=19, mode="wrap"), "mode wrap"),
        (case("Reshape", [IMAGE, ints(-1)]), "input 1 is not constant"),
        (case("MaxPool", [IMAGE], outputs=2, **POOL), "output 1"),
        (case("Resize", [IMAGE], [None, np.float32([1, 1, 1.3, 2])]), "leave fractions"),
        (case("MatMul", [X], [data(4, 4)]), "MatMul 'y0': RuntimeError"),
        (case("Selu", [X], alpha=1.0), "factors"),
    ],
    ids=str,
)
def test_what_is_not_translated_is_named(one: Case, message: str, tmp_path: Path) -> None:
    model, _ = one.model()
    with pytest.raises(UnsupportedModelError, match=message):
        translate(model, tmp_path)


def test_inputs_need_static_shapes_but_outputs_do_not(tmp_path: Path) -> None:
    model, feeds = case("Relu", [X]).model()
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    assert agree(model, feeds, tmp_path).outputs[0].shape == (3, 5)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"
    with pytest.raises(UnsupportedModelError, match="x0: the shape is not static"):
        translate(model, tmp_path)


def test_operators_of_other_domains_are_refused(tmp_path: Path) -> None:
    model, _ = case("Relu", [X]).model()
    model.graph.node[0].domain = "com.example"
    with pytest.raises(UnsupportedModelError, match=r"com\.example\.Relu"):
        translate(model, tmp_path)


# Recurrent layers: X [T, N, I], W [D, gates * H, I], R [D, gates * H, H], B [D, 2 * gates * H].
STEPS, BATCH, WIDTH, HIDDEN = 4, 2, 5, 3


def recurrent(op: str, direction: str, states: str, *, bias: bool = True) -> Case:
    gates, count = (4, 2) if op == "LSTM" else (3, 1)
    sides = 2 if direction == "bidirectional" else 1
    weights: list[np.ndarray | None] = [
        data(sides, gates * HIDDEN, WIDTH),
        data(sides, gates * HIDDEN, HIDDEN),
        data(sides, 2 * gates * HIDDEN) if bias else None,
        np.int32([STEPS] * BATCH),
    ]
    start = [data(sides, BATCH, HIDDEN) * (states == "constant")] * count
    attributes = {"linear_before_reset": 1} if op == "GRU" else {}
    attributes |= {"hidden_size": HIDDEN, "direction": direction}
    sequence = data(STEPS, BATCH, WIDTH)
    return case(op, [sequence], [*weights, *start], outputs=1 + count, **attributes)


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("states", ["zero", "constant"])
def test_recurrent_layers(op: str, direction: str, states: str, tmp_path: Path) -> None:
    model, feeds = recurrent(op, direction, states, bias=states == "zero").model()
    network = agree(model, feeds, tmp_path)
    kinds = {type(module) for module in network.module.children()}
    assert kinds == {getattr(torch.nn, op)}


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_layers_with_the_batch_first(op: str, direction: str, tmp_path: Path) -> None:
    """ONNX Runtime does not run these: the same with the batch second is the oracle."""
    one = recurrent(op, direction, "constant")
    model, feeds = one.model()
    first, *rest = onnxruntime_run(model, feeds)
    want = [first.transpose(2, 0, 1, 3), *(state.transpose(1, 0, 2) for state in rest)]
    states = [np.ascontiguousarray(state.transpose(1, 0, 2)) for state in one.constants[4:]]
    turned = case(
        op,
        [np.ascontiguousarray(one.inputs[0].transpose(1, 0, 2))],
        [*one.constants[:4], *states],
        outputs=one.outputs,
        layout=1,
        **one.attributes,
    )
    model, feeds = turned.model()
    close(run(translate(model, tmp_path).module, feeds), want)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("GRU", {"linear_before_reset": 0}, "linear_before_reset"),
        ("GRU", {"activations": ["Relu", "Tanh"]}, "activations"),
        ("LSTM", {"clip": 1.0}, "clip"),
        ("LSTM", {"input_forget": 1}, "coupled gates"),
    ],
)
def test_recurrent_layers_that_torch_has_not(
    op: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    one = recurrent(op, "forward", "zero")
    one.attributes |= change
    model, _ = one.model()
    with pytest.raises(UnsupportedModelError, match=message):
        translate(model, tmp_path)


def test_sequences_of_different_lengths_are_refused(tmp_path: Path) -> None:
    one = recurrent("LSTM", "forward", "zero")
    one.constants = [*one.constants[:3], np.int32([STEPS, 1])]
    with pytest.raises(UnsupportedModelError, match="different lengths"):
        translate(one.model()[0], tmp_path)
