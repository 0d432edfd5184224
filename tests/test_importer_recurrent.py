"""ONNX's LSTM, GRU and RNN: unrolled results against ONNX Runtime's, names, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importer_oracle import check, make, onnxruntime_run, random, run, value, weight
from onnx import helper, numpy_helper

from tvm_pivot import build
from tvm_pivot.errors import ModelImportError
from tvm_pivot.importer import import_model
from tvm_pivot.importer_onnx_recurrent import MAX_STEPS

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(
    kind: str,
    steps: int = 3,
    batch: int = 2,
    width: int = 5,
    hidden: int = 4,
    *,
    direction: str = "forward",
    bias: bool = True,
    states: str = "",
    density: float = 1.0,
    outputs: str = "Y Y_h Y_c",
    layout: int = 0,
    seed: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one recurrent node; `states` is "", "input" or "weight": initial states as."""
    count = 2 if direction == "bidirectional" else 1
    rng = np.random.default_rng(seed)

    def draw(name: str, *shape: int) -> onnx.TensorProto:
        array = rng.standard_normal(shape) * (rng.random(shape) < density) / np.sqrt(shape[-1])
        return numpy_helper.from_array(array.astype("float32"), name)

    rows = GATES[kind] * hidden
    weights = [draw("cell.W", count, rows, width), draw("cell.R", count, rows, hidden)]
    names = ["x", "cell.W", "cell.R", "cell.B" * bias, ""]
    if bias:
        weights.append(draw("cell.B", count, 2 * rows))
    inputs = [value("x", [batch, steps, width] if layout else [steps, batch, width])]
    if states:
        shape = (batch, count, hidden) if layout else (count, batch, hidden)
        for name in ["h0", "c0"][: 1 + (kind == "LSTM")]:
            names.append(name)
            if states == "input":
                inputs.append(value(name, shape))
            else:
                weights.append(weight(name, *shape))
    wanted = [name for name in outputs.split() if kind == "LSTM" or name != "Y_c"]
    positions = ["Y", "Y_h", "Y_c"][: 2 + (kind == "LSTM")]
    node = helper.make_node(
        kind,
        names,
        [name if name in wanted else "" for name in positions],
        name="cell",
        hidden_size=hidden,
        direction=direction,
        **({"layout": layout} if layout else {}),
        **attributes,
    )
    ranks = {"Y": 4, "Y_h": 3, "Y_c": 3}
    results = [value(name, [None] * ranks[name]) for name in wanted]
    return make([node], inputs, results, tuple(weights))


def feeds_for(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        item.name: random(*(dim.dim_value for dim in item.type.tensor_type.shape.dim))
        for item in model.graph.input
    }


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["LSTM", "GRU", "RNN"]),
    steps=st.integers(1, 5),
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    hidden=st.integers(1, 9),
    direction=st.sampled_from(["forward", "reverse", "bidirectional"]),
    bias=st.booleans(),
    states=st.sampled_from(["", "input", "weight"]),
    density=st.sampled_from([1.0, 0.3]),
    outputs=st.sampled_from(["Y Y_h Y_c", "Y", "Y_h", "Y_c Y_h"]),
    reset=st.integers(0, 1),
)
def test_any_cell_computes_what_onnxruntime_does(kind: str, reset: int, **options: Any) -> None:
    attributes = {"linear_before_reset": reset} if kind == "GRU" else {}
    model = recurrent(kind, **options, **attributes)
    check(model, feeds_for(model))


@pytest.mark.parametrize("states", ["", "input"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batch_first_layout(kind: str, states: str) -> None:
    """ONNX Runtime does not read layout 1, so the same cell in layout 0 is the reference."""
    options: dict[str, Any] = {"direction": "bidirectional", "states": states}
    plain, turned = (recurrent(kind, layout=layout, **options) for layout in (0, 1))
    feeds = feeds_for(plain)
    want = onnxruntime_run(plain, feeds)
    got = run(
        import_model(turned), *(np.ascontiguousarray(a.swapaxes(0, 1)) for a in feeds.values())
    )
    for ours, theirs, axes in zip(got, want, [(2, 0, 1, 3), (1, 0, 2), (1, 0, 2)], strict=False):
        np.testing.assert_allclose(ours, theirs.transpose(axes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "activations"),
    [("RNN", ["Relu"]), ("LSTM", ["sigmoid", "relu", "TANH"]), ("GRU", ["Sigmoid", "Relu"])],
)
def test_named_activations(kind: str, activations: list[str]) -> None:
    model = recurrent(kind, activations=activations)
    check(model, feeds_for(model))


def test_sequence_lengths_of_the_full_length() -> None:
    model = recurrent("LSTM", steps=3, batch=2)
    model.graph.node[0].input[4] = "lengths"
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 3], "int32"), "lengths"))
    check(model, feeds_for(model))


def test_weights_that_are_computed() -> None:
    """As exporters leave them: joined from torch's own parameters, and too large to fold."""
    model = recurrent("GRU", width=80, hidden=64, linear_before_reset=1, direction="bidirectional")
    node = model.graph.node[0]
    for position in (1, 2, 3):
        name = node.input[position]
        part = helper.make_node("Neg", [name], [f"{name}/negative"])
        node.input[position] = f"{name}/negative"
        model.graph.node.insert(0, part)
    check(model, feeds_for(model))


@pytest.mark.parametrize("opset", [7, 9, 11, 14, 22])
def test_old_and_new_opsets(opset: int) -> None:
    model = recurrent("LSTM")
    model.opset_import[0].version = opset
    if opset > 20:
        model.ir_version = 10
    check(model, feeds_for(model))


@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_cells_that_torch_exports(cell: type[torch.nn.RNNBase], tmp_path: Path) -> None:
    net = cell(6, 70, num_layers=2, bidirectional=True, batch_first=True).eval()
    x = torch.from_numpy(random(2, 4, 6))
    path = tmp_path / "cell.onnx"
    names = ["y", "h", "c"][: 2 + (cell is torch.nn.LSTM)]
    torch.onnx.export(
        net, (x,), str(path), input_names=["x"], output_names=names, dynamo=False, opset_version=17
    )
    check(path, {"x": x.numpy()})


# --- reports


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_pruned_cell_compiles_to_sparse_kernels_that_share_weights(
    kind: str, tmp_path: Path
) -> None:
    sizes = []
    for steps in (8, 12):  # the input weights have the same plan in both
        model = recurrent(kind, steps, 1, 128, 128, density=0.05, outputs="Y")
        net = build(model, target="x86")
        feeds = feeds_for(model)
        np.testing.assert_allclose(
            net.run(*feeds.values()), onnxruntime_run(model, feeds)[0], rtol=1e-4, atol=1e-5
        )
        layers = net.report.layers
        assert all(layer.mode == "sparse" for layer in layers)
        assert layers[0].name.startswith("cell_W")
        assert all(layer.name.startswith("cell_R") for layer in layers[1:])
        assert len(layers) == 1 + (steps - 1) * (1 if kind == "LSTM" else 2)
        sizes.append(net.export(tmp_path / "cell.pivot").stat().st_size)
    kept = int(np.count_nonzero(numpy_helper.to_array(model.graph.initializer[1])))
    # Four more steps: their code, and not four times the weights.
    assert sizes[1] - sizes[0] < 2 * 4 * kept, "each step has weights of its own"


# --- refusals


@pytest.mark.parametrize(
    ("kind", "attributes", "complaint"),
    [
        ("LSTM", {"clip": 1.0}, "clip"),
        ("LSTM", {"input_forget": 1}, "coupled gates"),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, "HardSigmoid.*Relu, Sigmoid, Tanh"),
        ("RNN", {"activations": ["Tanh", "Tanh"]}, "activations"),
        ("LSTM", {"direction": "sideways"}, "sideways"),
        ("LSTM", {"hidden_size": 3}, "hidden_size"),
        ("RNN", {"steps": MAX_STEPS + 1}, f"{MAX_STEPS + 1} steps"),
    ],
)
def test_what_is_not_supported_is_named(
    kind: str, attributes: dict[str, Any], complaint: str
) -> None:
    options = dict(attributes)
    hidden_size = options.pop("hidden_size", None)
    model = recurrent(kind, **options)
    if hidden_size:
        next(a for a in model.graph.node[0].attribute if a.name == "hidden_size").i = hidden_size
    with pytest.raises(ModelImportError, match=rf"{kind} node 'cell'.*{complaint}"):
        import_model(model)


def test_peepholes_are_refused() -> None:
    model = recurrent("LSTM", states="weight")
    model.graph.node[0].input.append("p")
    model.graph.initializer.append(weight("p", 1, 12))
    with pytest.raises(ModelImportError, match=r"LSTM node 'cell'.*peepholes"):
        import_model(model)


@pytest.mark.parametrize("constant", [True, False])
def test_shorter_sequences_are_refused(constant: bool) -> None:
    model = recurrent("LSTM", steps=3, batch=2)
    model.graph.node[0].input[4] = "lengths"
    if constant:
        lengths = numpy_helper.from_array(np.array([3, 2], "int32"), "lengths")
        model.graph.initializer.append(lengths)
    else:
        model.graph.input.append(value("lengths", [2], onnx.TensorProto.INT32))
    with pytest.raises(ModelImportError, match=r"LSTM node 'cell'.*sequence_lens"):
        import_model(model)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_weights_of_another_shape_are_refused(position: int) -> None:
    model = recurrent("GRU")
    name = model.graph.node[0].input[position]
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(weight(name, 1, *(5,) * (len(tensor.dims) - 1)))
    with pytest.raises(ModelImportError, match=r"GRU node 'cell'.*has shape"):
        import_model(model)
