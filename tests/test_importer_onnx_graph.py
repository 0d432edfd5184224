"""ONNX models: open shapes, shape arithmetic, old versions, and operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from importer_oracle import F32, I64, check, dense, make, random, value, weight
from onnx import helper, numpy_helper
from tvm import relax

from tvm_pivot.errors import ModelImportError
from tvm_pivot.importer import import_model

# --- ONNX: shapes


def test_symbolic_dimensions_are_bound_by_name_or_by_input() -> None:
    model = dense("batch")
    for shapes in ({"batch": 3}, {"x": (3, 80)}, {"x": [3, 80], "batch": np.int64(3)}):
        imported = check(model, {"x": random(3, 80)}, shapes=shapes)
        assert imported.outputs[0].shape == (3, 60)


def test_an_unbound_dimension_names_input_dimension_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    onnx.save(dense("batch"), path)
    with pytest.raises(ModelImportError) as error:
        import_model(path)
    for part in ("open.onnx", "'x'", "'batch'", 'shapes={"batch": 1}'):
        assert part in str(error.value)


def test_a_dimension_without_a_name_asks_for_the_whole_input() -> None:
    with pytest.raises(ModelImportError, match=r'shapes=\{"x": \(1, 80\)\}'):
        import_model(dense(None))
    with pytest.raises(ModelImportError, match=r'shapes=\{"x": \(1, 80\)\}'):
        import_model(dense(-1))
    check(dense(None), {"x": random(4, 80)}, shapes={"x": (4, 80)})


def test_an_input_without_rank_needs_its_shape() -> None:
    model = dense()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelImportError, match=r"'x' has no declared rank.*shapes="):
        import_model(model)
    assert import_model(model, shapes={"x": (7, 80)}).outputs[0].shape == (7, 60)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"bach": 1}, "'bach'.*not a symbolic dimension.*'batch'"),
        ({"z": (1, 80)}, "'z'.*not an input.*'x'"),
        ({"x": (1, 81)}, "axis 1 of input 'x' size 81.*contradicts 80"),
        ({"x": (1, 80, 1)}, r"3 axes.*declares 2: \(batch, 80\)"),
        ({"x": (2, 80), "batch": 3}, "'batch'.*size 2.*contradicts 3"),
        ({"batch": 0}, "must be positive"),
        ({"batch": -1}, "must be positive"),
        ({"batch": 1.5}, "must hold integers"),
        ({"batch": True}, "must hold integers"),
        ({"batch": "1"}, "must hold integers"),
        ({"batch": 2**40}, "more than 2147483647 elements"),
        ([1, 80], "must be a mapping"),
    ],
)
def test_wrong_shapes_are_explained(shapes: Any, message: str) -> None:
    with pytest.raises(ModelImportError, match=message):
        import_model(dense("batch"), shapes=shapes)


def shape_arithmetic() -> onnx.ModelProto:
    """x [batch, 6, 4] -> [batch, 2, 12] by way of Shape, Gather, Div, Cast and Concat."""
    ints = {"zero": 0, "one": [2], "two": 2, "minus": [-1], "first": 1}
    return make(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node("Gather", ["s", "zero"], ["n"]),
            helper.make_node("Gather", ["s", "first"], ["rows"]),
            helper.make_node("Constant", [], ["three"], value_int=3),
            helper.make_node("Div", ["rows", "three"], ["third"]),
            helper.make_node("Cast", ["third"], ["f"], to=F32),
            helper.make_node("Cast", ["f"], ["back"], to=I64),
            helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
            helper.make_node("Unsqueeze", ["back", "axes"], ["b1"]),
            helper.make_node("Concat", ["n1", "b1", "minus"], ["target"], axis=0),
            helper.make_node("Reshape", ["x", "target"], ["y"]),
        ],
        [value("x", ["batch", 6, 4])],
        [value("y", ["batch", "a", "b"])],
        (
            *(numpy_helper.from_array(np.array(v), k) for k, v in ints.items()),
            numpy_helper.from_array(np.array([0]), "axes"),
        ),
    )


def test_shape_arithmetic_is_evaluated() -> None:
    imported = check(shape_arithmetic(), {"x": random(3, 6, 4)}, shapes={"batch": 3})
    assert imported.outputs[0].shape == (3, 2, 12)


@pytest.mark.parametrize("fraction", [-7, 7])
def test_folded_integer_division_truncates(fraction: int) -> None:
    model = make(
        [helper.make_node("Div", ["a", "b"], ["q"]), helper.make_node("Mul", ["x", "q"], ["y"])],
        [value("x", [2], I64)],
        [value("y", [2], I64)],
        (
            numpy_helper.from_array(np.array([fraction]), "a"),
            numpy_helper.from_array(np.array([2]), "b"),
        ),
    )
    check(model, {"x": np.array([1, 5])})


@pytest.mark.parametrize("condition", [True, False])
def test_a_decided_if_becomes_its_branch(condition: bool) -> None:
    def branch(op: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], [value(op, [4])])

    model = make(
        [
            helper.make_node(
                "If", ["c"], ["t"], then_branch=branch("Abs"), else_branch=branch("Neg")
            ),
            helper.make_node("Relu", ["t"], ["y"]),
        ],
        [value("x", [4])],
        [value("y", [4])],
        (numpy_helper.from_array(np.array(condition), "c"),),
    )
    imported = check(model, {"x": random(4)})
    assert isinstance(imported.mod["main"].body.blocks[0], relax.DataflowBlock)


def test_a_declared_output_shape_makes_a_data_dependent_one_static() -> None:
    model = make(
        [helper.make_node("Slice", ["x", "start", "end"], ["y"])],
        [value("x", [8]), value("start", [1], I64), value("end", [1], I64)],
        [value("y", [3])],
    )
    feeds = {"x": random(8), "start": np.array([2]), "end": np.array([5])}
    assert check(model, feeds).outputs[0].shape == (3,)


def test_a_data_dependent_output_is_refused() -> None:
    model = make(
        [helper.make_node("NonZero", ["x"], ["y"])], [value("x", [3])], [value("y", [1, "n"], I64)]
    )
    with pytest.raises(ModelImportError, match=r"output 'y'.*depends on data.*NonZero"):
        import_model(model)


# --- ONNX: versions and operators


def old_network(opset: int) -> onnx.ModelProto:
    """Operators whose form changed over time: attributes became inputs, defaults moved."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "g", "h", "m", "v"], ["n"]),
        helper.make_node("Dropout", ["n"], ["d"], **({"ratio": 0.5} if opset < 12 else {})),
        helper.make_node("MaxPool", ["d"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Softmax", ["p"], ["s"], axis=1),  # over all axes from 1 on
        helper.make_node("Unsqueeze", ["s"], ["u"], axes=[0]),
        helper.make_node("Squeeze", ["u"], ["q"], axes=[0]),
    ]
    if opset < 10:
        nodes.append(helper.make_node("Slice", ["q"], ["y"], axes=[2], starts=[1], ends=[3]))
    else:
        nodes.append(helper.make_node("Identity", ["q"], ["y"]))
    weights = (
        weight("w", 4, 3, 3, 3),
        *(weight(name, 4) for name in "ghm"),
        numpy_helper.from_array(np.ones(4, "float32"), "v"),
    )
    outputs = [value("y", None)]
    outputs[0].type.tensor_type.shape.SetInParent()
    for size in (1, 4, 2 if opset < 10 else 4, 4):
        outputs[0].type.tensor_type.shape.dim.add().dim_value = size
    return make(nodes, [value("x", [1, 3, 8, 8])], outputs, weights, opset)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12])
def test_old_opsets(opset: int) -> None:
    check(old_network(opset), {"x": random(1, 3, 8, 8)})


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_new_opsets(opset: int) -> None:
    check(dense(opset=opset), {"x": random(2, 80)})


@pytest.mark.parametrize("opset", [0, 9999])
def test_an_opset_nobody_knows(opset: int) -> None:
    with pytest.raises(ModelImportError, match=r"opset.*can be read. Export the model"):
        import_model(dense(opset=opset))


def test_operators_that_onnx_defines_by_others_are_expanded() -> None:
    model = make(
        [helper.make_node("Celu", ["x"], ["y"], alpha=2.0)], [value("x", [9])], [value("y", [9])]
    )
    check(model, {"x": random(9)})


def test_model_local_functions_are_expanded() -> None:
    model = make(
        [helper.make_node("Twice", ["x"], ["y"], domain="mine")],
        [value("x", [3])],
        [value("y", [3])],
    )
    opsets = [helper.make_opsetid("", 17)]
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(helper.make_function("mine", "Twice", ["a"], ["b"], body, opsets))
    model.opset_import.append(helper.make_opsetid("mine", 1))
    check(model, {"x": random(3)})


@pytest.mark.parametrize(
    ("node", "remedy"),
    [
        (helper.make_node("Det", ["x"], ["y"], name="n1"), "replace it"),
        (helper.make_node("Nonsense", ["x"], ["y"], name="n1"), "replace it"),
        (helper.make_node("Relu", ["x"], ["y"], name="n1", domain="acme"), "standard ONNX"),
    ],
)
def test_an_unsupported_operator_is_named(
    tmp_path: Path, node: onnx.NodeProto, remedy: str
) -> None:
    model = make([node], [value("x", [1, 2, 2])], [value("y", [1])])
    model.opset_import.append(helper.make_opsetid("acme", 1))
    path = tmp_path / "strange.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelImportError, match=remedy) as error:
        import_model(path)
    for part in ("strange.onnx", node.op_type, "'n1'", "not supported"):
        assert part in str(error.value)


def test_a_node_the_frontend_fails_on_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = dense()
    model.graph.initializer[0].CopyFrom(weight("w", 81, 60))
    path = tmp_path / "wrong.onnx"
    onnx.save(model, path)
    with pytest.raises(
        ModelImportError, match=r"wrong\.onnx: MatMul node 'mm'.*check its"
    ) as error:
        import_model(path)
    assert error.value.__cause__ is not None
    assert "Error converting" not in capfd.readouterr().out


def test_a_node_without_a_name_is_known_by_its_output() -> None:
    model = dense()
    model.graph.initializer[0].CopyFrom(weight("w", 81, 60))
    model.graph.node[0].name = ""
    with pytest.raises(ModelImportError, match=r"MatMul node without a name, of output \['m'\]"):
        import_model(model)
