"""Models with open sizes are given fixed ones before they are compared."""

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from tvm_pivot.bench.reference import Reference
from tvm_pivot.bench.runtimes.protocol import Port, ports
from tvm_pivot.bench.static_shapes import with_static_shapes
from tvm_pivot.errors import InputError, ModelImportError


def write(path: Path, inputs: list[object], outputs: list[object]) -> Path:
    """``y = relu(x @ W)`` with shapes as declared; the first size of x is the batch."""
    weight = np.cos(np.arange(12, dtype=np.float32)).reshape(4, 3)
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Relu", ["h"], ["y"])],
        "g",
        [oh.make_tensor_value_info("x", 1, inputs)],
        [oh.make_tensor_value_info("y", 1, outputs)],
        [onnx.numpy_helper.from_array(weight, "w")],
        value_info=[oh.make_tensor_value_info("h", 1, [inputs[0], 3])],
    )
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_static_model_is_used_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [2, 4], [2, 3])
    assert with_static_shapes(path, None, tmp_path / "fixed") == path
    assert not (tmp_path / "fixed").exists()


@pytest.mark.parametrize("shapes", [{"n": 5}, {"x": (5, 4)}])
@pytest.mark.parametrize("outputs", [["n", 3], ["m", 3], [None, 3]])
def test_sizes_given_fix_inputs_and_outputs(
    tmp_path: Path, shapes: dict[str, int], outputs: list[object]
) -> None:
    path = write(tmp_path / "m.onnx", ["n", 4], outputs)
    fixed = with_static_shapes(path, shapes, tmp_path / "fixed")
    assert fixed == tmp_path / "fixed" / "m.onnx"
    assert ports(fixed) == ((Port("x", (5, 4), "float32"),), (Port("y", (5, 3), "float32"),))
    onnx.checker.check_model(str(fixed), full_check=True)
    right = Reference.of(fixed, tmp_path)
    assert right.samples[0].expected["y"].shape == (5, 3)


def test_an_output_whose_shape_is_not_given_is_computed(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", [2, 4], ["anything", 3])
    _, (y,) = ports(with_static_shapes(path, None, tmp_path / "fixed"))
    assert y.shape == (2, 3)


def test_what_stays_open_or_matches_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", ["n", 4], ["n", 3])
    with pytest.raises(ModelImportError, match="n"):
        with_static_shapes(path, None, tmp_path)
    with pytest.raises(ModelImportError, match="batch"):
        with_static_shapes(path, {"n": 2, "batch": 2}, tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"m\.onnx"):
        with_static_shapes(tmp_path / "m.onnx", None, tmp_path)
    with pytest.raises(InputError, match=r"absent\.onnx"):
        with_static_shapes(tmp_path / "absent.onnx", None, tmp_path)
