"""Damaged and hostile ONNX files: an error that helps, never a crash, hang or huge allocation.

The files are imported by this file run as a program, so that a crash fails a test and nothing else.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from importer_damage import F32, I64, MODELS, build, convolutional, ints, mutants, output
from onnx import TensorProto, helper, numpy_helper

MAX_GROWTH_MB = 600  # of the worker's memory, over its whole batch
SLOWEST = 20.0  # seconds for one file, on a busy machine


def worker(folder: Path) -> None:
    """Import every model of a folder; one JSON line each, before (name) and after (outcome)."""
    from tvm_pivot.errors import ModelImportError
    from tvm_pivot.importer import import_model

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sorted(folder.glob("*.onnx")):
        print(json.dumps({"start": path.name}), flush=True)
        began = time.monotonic()
        try:
            imported = import_model(path)
            sizes = [n for s in (*imported.inputs, *imported.outputs) for n in s.shape]
            outcome, message = "imported", str(all(isinstance(n, int) and n >= 0 for n in sizes))
        except ModelImportError as error:
            outcome, message = "refused", str(error)
        except Exception as error:
            outcome, message = "raw", repr(error)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024
        took = time.monotonic() - began
        line = {"name": path.name, "outcome": outcome, "message": message[:600]}
        print(json.dumps({**line, "grown": grown, "took": took}), flush=True)


def import_all(folder: Path) -> list[dict[str, Any]]:
    """Import the folder's models in a process of their own and check what holds for all."""
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    tail = done.stderr[-1500:]
    assert done.returncode == 0, (
        f"exit {done.returncode} at {lines[-1:]}, files in {folder}: {tail}"
    )
    results = [line for line in lines if "name" in line]
    assert len(results) == len(list(folder.glob("*.onnx")))
    for result in results:
        assert result["outcome"] != "raw", result
        assert result["took"] < SLOWEST, result
        if result["outcome"] == "refused":
            assert result["name"] in result["message"], result
        else:
            assert result["message"] == "True", result
    assert max(result["grown"] for result in results) < MAX_GROWTH_MB
    return results


@pytest.mark.parametrize("name", sorted(MODELS))
def test_mutated_models(name: str, tmp_path: Path) -> None:
    data = bytes(MODELS[name]().SerializeToString())
    (tmp_path / "intact.onnx").write_bytes(data)
    for file, mutant in mutants(data, name, 300):
        (tmp_path / file).write_bytes(mutant)
    results = {result["name"]: result for result in import_all(tmp_path)}
    assert results["intact.onnx"]["outcome"] == "imported"
    counts = [result["outcome"] for result in results.values()]
    assert counts.count("refused") > 80, "the damage does too little to test anything"
    assert counts.count("imported") > 5, "the damage leaves nothing to import"


def test_mutated_real_model(tmp_path: Path, shared_data: Path) -> None:
    data = (shared_data / "lenet5_dns.onnx").read_bytes()
    for file, mutant in mutants(data, "lenet", 30):
        (tmp_path / file).write_bytes(mutant)
    import_all(tmp_path)


def test_every_truncation(tmp_path: Path) -> None:
    data = bytes(convolutional(17).SerializeToString())
    for length in range(0, len(data), max(1, len(data) // 150)):
        (tmp_path / f"cut_{length:06}.onnx").write_bytes(data[:length])
    # Cut between two fields of the file, what is left is readable, but lacks the opset.
    assert {result["outcome"] for result in import_all(tmp_path)} == {"refused"}


# --- attacks, one by one


def fill_of(op: str, *constants: onnx.TensorProto) -> onnx.ModelProto:
    names = [tensor.name for tensor in constants]
    first = ["x"] if op in ("Expand", "Tile", "Pad") else []
    node = helper.make_node(op, [*first, *names], ["y"], name="node '{op}_0'")
    dtype = I64 if op == "Range" else F32
    return build([node], list(constants), [1], [output("y", 1, dtype=dtype)], 13)


def chain(length: int) -> onnx.ModelProto:
    names = ["x", *(f"t{i}" for i in range(length - 1)), "y"]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in itertools.pairwise(names)]
    return build(nodes, [], [4], [output("y", 4)], 17)


def functions(calls: dict[str, list[str]], start: str) -> onnx.ModelProto:
    """Local functions of one input and output, each a chain of calls."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]

    def body(callees: list[str]) -> list[onnx.NodeProto]:
        names = ["a", *(f"t{i}" for i in range(len(callees) - 1)), "b"]
        return [
            helper.make_node(callee, [i], [o], domain="" if callee == "Relu" else "f")
            for callee, i, o in zip(callees, names, names[1:], strict=False)
        ]

    model = build(
        [helper.make_node(start, ["x"], ["y"], domain="f")], [], [4], [output("y", 4)], 17
    )
    model.opset_import.append(helper.make_opsetid("f", 1))
    model.functions.extend(
        helper.make_function("f", name, ["a"], ["b"], body(callees), opsets)
        for name, callees in calls.items()
    )
    return model


def nested_ifs(depth: int) -> onnx.ModelProto:
    numbers = itertools.count()

    def branch(level: int) -> onnx.GraphProto:
        name = f"o{next(numbers)}"
        if level == depth:
            node = helper.make_node("Neg", ["x"], [name])
        else:
            inner = branch(level + 1)
            node = helper.make_node("If", ["c"], [name], then_branch=inner, else_branch=inner)
        return helper.make_graph([node], name, [], [output(name, 4)])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch(1), else_branch=branch(1))
    condition = numpy_helper.from_array(np.array(True), "c")
    return build([node], [condition], [4], [output("y", 4)], 17)


def odd_input(**change: Any) -> onnx.ModelProto:
    model = convolutional(17)
    tensor = model.graph.input[0].type.tensor_type
    if "elem_type" in change:
        tensor.elem_type = change["elem_type"]
    if "dim" in change:
        tensor.shape.dim[0].dim_value = change["dim"]
    return model


def renamed(name: str) -> onnx.ModelProto:
    model = convolutional(17)
    model.graph.input[0].name = name
    model.graph.node[0].input[0] = name
    return model


def gap(position: int) -> onnx.ModelProto:
    inputs = ["x", "x"]
    inputs[position] = ""
    node = helper.make_node("Concat", inputs, ["y"], axis=0)
    return build([node], [], [2], [output("y", 4)], 17)


def doubling(levels: int) -> onnx.ModelProto:
    calls = {f"f{i}": [f"f{i - 1}"] * 2 for i in range(1, levels)}
    return functions({"f0": ["Relu", "Relu"], **calls}, f"f{levels - 1}")


ATTACKS: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "fill_1d": (lambda: fill_of("ConstantOfShape", ints("s", [2**40])), "ConstantOfShape_0"),
    "fill_2d": (
        lambda: fill_of("ConstantOfShape", ints("s", [2**20, 2**20])),
        "ConstantOfShape_0",
    ),
    "fill_negative": (lambda: fill_of("ConstantOfShape", ints("s", [-5])), ""),
    "range": (
        lambda: fill_of("Range", ints("a", 0), ints("b", 2**40), ints("c", 1)),
        "Range_0",
    ),
    "range_step_0": (lambda: fill_of("Range", ints("a", 0), ints("b", 9), ints("c", 0)), ""),
    "expand": (lambda: fill_of("Expand", ints("s", [2**40])), "Expand_0"),
    "tile": (lambda: fill_of("Tile", ints("s", [2**40])), "Tile_0"),
    "pad": (lambda: fill_of("Pad", ints("s", [0, 2**40])), "Pad_0"),
    "input_2_40": (lambda: odd_input(dim=2**40), "input 'x'"),
    "input_string": (lambda: odd_input(elem_type=TensorProto.STRING), "input 'x' is not a tensor"),
    "input_complex": (lambda: odd_input(elem_type=TensorProto.COMPLEX64), "input 'x' is not"),
    "input_typeless": (lambda: odd_input(elem_type=0), "input 'x' is not a tensor"),
    "gap_first": (lambda: gap(0), "Concat_0"),
    "gap_last": (lambda: gap(1), "Concat_0"),
    "self_call": (lambda: functions({"f": ["f"]}, "f"), "f.f calls itself"),
    "mutual_call": (lambda: functions({"f": ["g"], "g": ["f"]}, "f"), "calls itself"),
    "billion_laughs": (lambda: doubling(60), "nodes"),
}


def test_attacks_are_refused_with_a_reason(tmp_path: Path) -> None:
    for name, (make, _) in ATTACKS.items():
        onnx.save(make(), tmp_path / f"{name}.onnx")
    for result in import_all(tmp_path):
        expected = ATTACKS[result["name"].removesuffix(".onnx")][1]
        if expected:
            assert result["outcome"] == "refused", result
            assert expected in result["message"], result


def test_unusual_models_are_imported(tmp_path: Path) -> None:
    models = {
        "chain": chain(1000),
        "nested_ifs": nested_ifs(6),
        "functions": doubling(4),
        "utf8": renamed("entrée/ 0:\n"),
        "digits": renamed("0"),
        "keyword": renamed("class"),
    }
    for name, model in models.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
    for result in import_all(tmp_path):
        assert result["outcome"] == "imported", result


def test_duplicate_weights_are_refused(tmp_path: Path) -> None:
    model = convolutional(17)
    model.graph.initializer.append(model.graph.initializer[0])
    onnx.save(model, tmp_path / "twice.onnx")
    (result,) = import_all(tmp_path)
    assert result["outcome"] == "refused" and "2 weights are named 'w'" in result["message"]


def test_sparse_weights_of_absurd_shape_or_indices(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.ones(1, "float32"), "s")
    for name, dims, index in (("big", [2**40], 0), ("outside", [4], 4), ("negative", [4], -1)):
        node = helper.make_node("Add", ["x", "s"], ["y"])
        model = build([node], [], [4], [output("y", 4)], 17)
        indices = numpy_helper.from_array(np.array([index]))
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dims))
        onnx.save(model, tmp_path / f"{name}.onnx")
    for result in import_all(tmp_path):
        assert result["outcome"] == "refused" and "'s'" in result["message"], result


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "empty", "text"])
def test_paths_that_hold_no_model(kind: str, tmp_path: Path) -> None:
    from tvm_pivot.errors import ModelImportError
    from tvm_pivot.importer import import_model

    path = tmp_path / "thing.onnx"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"once upon a time")
    with pytest.raises(ModelImportError, match=r"thing\.onnx"):
        import_model(path)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
