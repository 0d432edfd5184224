"""Converting: what runs side by side, which processes are kept, what a build tells of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bench_runtimes
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

import tvm_pivot
from tvm_pivot.bench import conversion
from tvm_pivot.bench.conversion import Converted, convert_all, report_of
from tvm_pivot.bench.measure import compare
from tvm_pivot.bench.models import ModelInput, describe_model
from tvm_pivot.bench.rounds import Plan
from tvm_pivot.bench.specs import RuntimeSpec, resolve


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the conversions of `bench_runtimes` leave their marks."""
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv("TEST_CONVERSIONS", str(folder))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> list[ModelInput]:
    """Two networks of two layers, half of the rows of one of them zero."""
    rng = np.random.default_rng(0)
    found = []
    for name in ("a", "b"):
        first, second = (rng.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
        first[:, 16:] = 0  # [inputs, outputs] in this file
        second[rng.random(second.shape) < 0.75] = 0
        graph = helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "first"], ["h"]),
                helper.make_node("Sigmoid", ["h"], ["s"]),
                helper.make_node("MatMul", ["s", "second"], ["y"]),
            ],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 32])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 32])],
            [
                numpy_helper.from_array(first, "first"),
                numpy_helper.from_array(second, "second"),
            ],
        )
        opsets = [helper.make_opsetid("", 17)]
        path = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
        found.append(ModelInput(name, "net", "half", path))
    return found


def spec(name: str) -> RuntimeSpec:
    (found,) = resolve([f"{bench_runtimes.__file__}:{name}"])
    return found


def test_small_files_are_converted_side_by_side(
    models: list[ModelInput], place: Path, tmp_path: Path
) -> None:
    done = convert_all([(m, spec("Meets")) for m in models], ["fp32"], tmp_path / "made", jobs=2)
    assert [made.detail for made in done.values()] == ["", ""]


def test_large_files_are_converted_alone_in_an_environment_of_their_own(
    models: list[ModelInput], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_LARGE_BYTES", 0)
    done = convert_all([(m, spec("Alone")) for m in models], ["fp32"], tmp_path / "made", jobs=2)
    assert [made.detail for made in done.values()] == ["", ""]


def test_a_process_is_kept_for_the_next_model_and_no_longer(
    models: list[ModelInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_CONVERSIONS", str(tmp_path / "list"))
    wanted = [(m, spec("Converts")) for m in models]
    before = set(psutil.Process().children(recursive=True))
    counts: list[int] = []

    def count(_: str) -> None:
        counts.append(len(set(psutil.Process().children(recursive=True)) - before))

    convert_all(wanted, ["fp32", "bf16"], tmp_path / "made", progress=count)
    # a in fp32; a in bf16, which needs another; b in fp32; b in bf16, when fp32 is over.
    assert counts == [0, 1, 2, 1]


def test_facts_are_those_of_the_build_where_there_is_one(
    models: list[ModelInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models[0]
    looked = describe_model(model)
    weights = 2 * 32 * 32
    onnx_weights = [numpy_helper.to_array(t) for t in onnx.load(str(model.path)).graph.initializer]
    kept = sum(int(np.count_nonzero(w)) for w in onnx_weights)
    assert looked.density == pytest.approx(kept / weights)
    assert (looked.flops_dense, looked.flops_kept) == (2 * 4 * weights, 2 * 4 * kept)

    def refuse(*_: object) -> None:
        raise AssertionError("analysed again")

    monkeypatch.setattr(tvm_pivot, "inspect", refuse)
    plan = Plan(rounds=1, turn_ms=1, most_calls=3, lead_ms=0, warm_ms=0, noise=False)
    found = compare([model], ["pivot"], plan=plan)
    assert found.results[0].status == "ok", found.results[0].detail
    assert found.models == (looked,)


def test_no_report_without_an_artifact(models: list[ModelInput]) -> None:
    model = models[0]
    key = (model.name, "pivot", "fp32")
    assert report_of(model, {}) is None
    assert report_of(model, {key: Converted("failed", detail="no room")}) is None
    # An adapter of a user's own may have the name, and deploy what it likes.
    assert report_of(model, {key: Converted("ok", files=(model.path,))}) is None


def test_a_description_computes_the_digest_of_its_file_once(models: list[ModelInput]) -> None:
    model = models[0]
    first = model.sha256
    model.path.write_bytes(b"else")
    assert model.sha256 == first
    assert replace(model).sha256 == (
        # printf else | sha256sum
        "7dd530c4d36da47cd33396718ef1fa1e8c0f7d91ee551d7fdc1c73aa65edb454"
    )
