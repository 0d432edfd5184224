"""ONNX models: how weights, inputs and outputs, and external data come in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from importer_oracle import I64, check, constants, dense, make, random, run, value, weight
from onnx import helper, numpy_helper

from tvm_pivot.errors import ModelImportError
from tvm_pivot.importer import import_model
from tvm_pivot.tensors import TensorSpec


def test_path_and_proto_give_the_same_model(tmp_path: Path) -> None:
    model = dense()
    path = tmp_path / "dense.onnx"
    onnx.save(model, path)
    before = model.SerializeToString()
    from_path = check(path, {"x": random(2, 80)})
    from_proto = check(model, {"x": random(2, 80)})
    from_text = import_model(os.fspath(path))
    assert model.SerializeToString() == before
    assert from_path.source == str(path)
    assert from_path.inputs == (TensorSpec("x", (2, 80), "float32"),)
    assert from_path.outputs == (TensorSpec("y", (2, 60), "float32"),)
    tvm.ir.assert_structural_equal(from_path.mod, from_proto.mod)
    tvm.ir.assert_structural_equal(from_path.mod, from_text.mod)


def test_weights_become_constants() -> None:
    assert {(80, 60), (60,)} <= set(constants(import_model(dense())))


def test_initializers_listed_as_inputs_are_weights() -> None:
    model = dense()
    model.graph.input.extend([value("w", [80, 60]), value("b", [60])])
    model.ir_version = 3
    check(model, {"x": random(2, 80)})


def test_weights_that_are_not_listed_as_inputs_of_an_old_ir() -> None:
    model = dense()
    model.ir_version = 3
    assert [spec.name for spec in import_model(model).inputs] == ["x"]


def test_several_inputs_and_outputs_keep_names_and_order() -> None:
    model = make(
        [
            helper.make_node("Add", ["b.in", "1/a"], ["sum:0"]),
            helper.make_node("Gather", ["sum:0", "ids"], ["rows"], axis=0),
        ],
        [value("b.in", [4, 3]), value("ids", [2], I64), value("1/a", [4, 3])],
        [value("rows", [2, 3]), value("sum:0", [4, 3])],
    )
    ids = np.array([3, 1])
    imported = check(model, {"b.in": random(4, 3), "ids": ids, "1/a": random(4, 3)})
    assert [spec.name for spec in imported.outputs] == ["rows", "sum:0"]
    assert [spec.dtype for spec in imported.inputs] == ["float32", "int64", "float32"]


def test_unused_inputs_stay() -> None:
    model = dense()
    model.graph.input.insert(0, value("unused", [5], I64))
    check(model, {"unused": np.arange(5), "x": random(2, 80)})


def test_outputs_that_are_inputs_weights_or_shapes() -> None:
    model = make(
        [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Neg", ["x"], ["n"])],
        [value("x", [2, 3])],
        [value("s", [2], I64), value("x", [2, 3]), value("w", [70, 70]), value("n", [2, 3])],
        (weight("w", 70, 70),),
    )
    imported = import_model(model)
    shape, same, kept, negated = run(imported, random(2, 3))
    assert shape.tolist() == [2, 3] and shape.dtype == np.int64
    np.testing.assert_array_equal(same, random(2, 3))
    np.testing.assert_array_equal(kept, numpy_helper.to_array(model.graph.initializer[0]))
    np.testing.assert_array_equal(negated, -random(2, 3))


def test_sparse_initializers_are_made_dense() -> None:
    want = np.zeros((80, 60), "float32")
    want[[3, 70], [59, 2]] = [1.5, -2.0]
    for indices in (np.array([[3, 59], [70, 2]]), np.array([3 * 60 + 59, 70 * 60 + 2])):
        model = dense()
        del model.graph.initializer[0]
        values = numpy_helper.from_array(np.array([1.5, -2.0], "float32"), "w")
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(indices), [80, 60])
        )
        x = random(2, 80)
        bias = numpy_helper.to_array(model.graph.initializer[0])
        np.testing.assert_allclose(
            run(import_model(model), x)[0], np.maximum(x @ want + bias, 0), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("dtype", ["float64", "int64", "float16", "int8"])
def test_weights_keep_their_type(dtype: str) -> None:
    big, small = np.full((70, 70), 3, dtype), np.array([2], dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = make(
        [helper.make_node("Sub", ["x", "big"], ["d"]), helper.make_node("Sub", ["d", "s"], ["y"])],
        [value("x", [70, 70], kind)],
        [value("y", [70, 70], kind)],
        (numpy_helper.from_array(big, "big"), numpy_helper.from_array(small, "s")),
    )
    imported = import_model(model)
    assert imported.outputs[0].dtype == dtype
    x = np.arange(4900).reshape(70, 70) % 100
    np.testing.assert_array_equal(run(imported, x.astype(dtype))[0], (x - 5).astype(dtype))


def test_large_constant_nodes_are_weights() -> None:
    model = dense()
    tensor = model.graph.initializer[0]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    del model.graph.initializer[0]
    assert (80, 60) in constants(check(model, {"x": random(2, 80)}))


# --- ONNX: external data


def external(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(dense(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


def edit(path: Path, **entries: str) -> None:
    """Change external-data entries of the first weight in a saved model."""
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)
    check(path, {"x": random(2, 80)})
    monkeypatch.chdir(tmp_path)
    check(Path("model.onnx"), {"x": random(2, 80)})
    check(onnx.load(path), {"x": random(2, 80)})  # onnx.load has read the data


def test_missing_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "model.data").unlink()
    with pytest.raises(ModelImportError, match=r"model\.onnx: weight 'w'.*'model\.data'.*missing"):
        import_model(path)


def test_truncated_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ModelImportError, match=r"weight 'w' needs bytes.*has 1000.*truncated"):
        import_model(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "link", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = external(folder)
    (tmp_path / "secret").write_bytes(bytes(80 * 60 * 4))
    (folder / "link").symlink_to(tmp_path / "secret")
    edit(path, location=location)
    with pytest.raises(ModelImportError, match=r"weight 'w'.*outside the model's folder") as error:
        import_model(path)
    assert repr(location) in str(error.value)


@pytest.mark.parametrize(
    "entries",
    [{"offset": "-4"}, {"length": "many"}, {"length": "9" * 30}, {"location": "a\0b"}],
)
def test_external_data_entries_that_make_no_sense(tmp_path: Path, entries: dict[str, str]) -> None:
    path = external(tmp_path)
    edit(path, **entries)
    with pytest.raises(ModelImportError, match=r"model\.onnx: weight 'w'.*export the model again"):
        import_model(path)


def test_external_data_without_a_path(tmp_path: Path) -> None:
    model = onnx.load(external(tmp_path), load_external_data=False)
    with pytest.raises(ModelImportError, match=r"'w'.*'model\.data'.*onnx\.load\(path\)"):
        import_model(model)


# --- real models


@pytest.mark.parametrize("name", ["lenet5_dns", "lenet300_dns", "ultraface_rfb320"])
def test_real_models(name: str, shared_data: Path) -> None:
    path = shared_data / f"{name}.onnx"
    spec = import_model(path).inputs[0]
    check(path, {spec.name: random(*spec.shape)})
