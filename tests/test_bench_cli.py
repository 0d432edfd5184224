"""`tvm-pivot bench` as a user types it, and the tables it prints."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from tvm_pivot import cli
from tvm_pivot.bench import environments, table
from tvm_pivot.bench.results import (
    Comparison,
    LayerTime,
    Machine,
    ModelFacts,
    Noise,
    PerLayer,
    Roofline,
    Setting,
)
from tvm_pivot.bench.results import Result as Measured
from tvm_pivot.bench.runtimes import ADAPTERS

# A runtime of a user's own, one per cent off.
OWN = """
from tvm_pivot.bench.runtimes.onnxruntime import OnnxRuntime

class Own(OnnxRuntime):
    name, title = "own", "My own"

    def outputs(self):
        return {name: 1.01 * y for name, y in super().outputs().items()}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``relu(x @ W)`` with three quarters of W pruned in blocks of 8 outputs, 64 inputs."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 128)).astype(np.float32)
    weight *= np.repeat(rng.random((64, 16)) < 0.25, 8, axis=1)
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["h"]), oh.make_node("Relu", ["h"], ["y"])],
        "g",
        [oh.make_tensor_value_info("x", 1, [64, 64])],
        [oh.make_tensor_value_info("y", 1, [64, 128])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    made = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("models") / "pruned.onnx"
    onnx.save(made, path)
    return path


def call(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, words)])


def test_one_table_with_every_runtime_and_the_files(model: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    own = tmp_path / "own.py"
    own.write_text(OWN)
    runtimes = f"pivot,onnxruntime,{own}:Own"
    done = call(
        model, "--runtimes", runtimes, "--threads", "1", "--rounds", 2,
        "--json", out, "--html", page, "--per-layer",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tvm_pivot" in done.stdout and "ONNX Runtime" in done.stdout
    assert "noise: pivot measured twice" in done.stdout
    assert "dense_sparse" not in done.stdout, "steps are called by their layers"
    data = json.loads(out.read_text())
    found = {r["runtime"]: r for r in data["results"]}
    for name in ("pivot", "onnxruntime"):
        assert found[name]["status"] == "ok"
        assert found[name]["threads"] == 1
        assert found[name]["precision"] == "fp32"
        assert found[name]["version"]
        assert 0 < found[name]["min_ms"] <= found[name]["median_ms"]
        assert 0 <= found[name]["max_error"] < 1e-5
    (wrong,) = (r for name, r in found.items() if name not in ("pivot", "onnxruntime"))
    assert wrong["status"] == "wrong"
    assert wrong["median_ms"] is None
    assert wrong["max_error"] == pytest.approx(0.01, rel=0.1)
    assert Comparison.from_json(out.read_bytes()).models[0].pattern == "8x1 blocks"
    assert "<html" in page.read_text() and "pruned" in page.read_text()


def test_a_missing_runtime_is_listed_with_its_command(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no environment is there
    done = call(model, "--runtimes", "pivot,deepsparse", "--rounds", 2)
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if "missing" in line)
    assert "DeepSparse" in line
    assert "tvm-pivot bench --install deepsparse" in line


def test_list_shows_every_runtime_and_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = call("--list")
    assert done.exit_code == 0
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("│")}
    assert set(ADAPTERS) <= set(rows)
    assert "yes" in rows["pivot"]
    assert "--install executorch" in rows["executorch"]


def test_install_asks_for_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(environments, "install", lambda names, say: asked.append(list(names)))
    assert call("--install", "litert,deepsparse").exit_code == 0
    assert asked == [["litert", "deepsparse"]]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "name an ONNX file"),
        (("absent.onnx",), "absent.onnx"),
        (("MODEL", "--threads", "0"), "--threads 0"),
        (("MODEL", "--threads", "1,,2"), "--threads 1,,2"),
        (("MODEL", "--runtimes", "pivot,pivot"), "different names"),
        (("MODEL", "--runtimes", "fastest"), "fastest"),
        (("MODEL", "--precision", "fp64"), "fp64"),
        (("MODEL", "--html", "absent/report.html"), "there is no directory"),
    ],
)
def test_mistakes_are_one_line(model: Path, words: tuple[str, ...], complaint: str) -> None:
    done = call(*(model if word == "MODEL" else word for word in words))
    assert done.exit_code == 1
    assert complaint in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def _comparison() -> Comparison:
    facts = ModelFacts("net [1]", "net", "8x1@0.1", "0" * 64, "8x1 blocks", 0.1, 1000, 100)
    ours = Measured(
        "net [1]", "pivot", "tvm_pivot", "ok", "0.1", 1, "fp32", median_ms=2.0, min_ms=1.9
    )
    slower = replace(ours, runtime="a", title="A", median_ms=5.0, min_ms=4.0)
    faster = replace(ours, runtime="b", title="B", median_ms=1.0, min_ms=0.9)
    failed = replace(
        ours, runtime="c", title="C", median_ms=None, min_ms=None, status="failed", detail="[boom]"
    )
    layer = LayerTime(
        "conv1", "conv2d", "8x1 blocks", 0.1, "sparse", 0.5, 4.0, 10**6, 10**5, 0.25, "compute", 0.8
    )
    roofline = Roofline(1, 250.0, 200.0, 100.0, 30.0, 1 << 20, 1 << 25)
    return Comparison(
        "2026-01-01T00:00:00+00:00", "tvm-pivot bench", Machine("CPU", 2, (), 8.0, "Linux", "3.11"),
        "reference", (Setting("fp32", "0.001"),), (facts,), (ours, slower, faster, failed),
        (Noise("net [1]", "pivot", 1, "fp32", 1.02),),
        (PerLayer("net [1]", 1, roofline, 1.0, (layer,)),),
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_says_who_is_faster_and_why_one_is_absent(width: int) -> None:
    text = io.StringIO()
    table.show(_comparison(), Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    order = [line.split()[1] for line in lines if line.startswith("│") and " ms" not in line]
    assert order[:3] == ["B", "tvm_pivot", "A"], "fastest first"
    assert any("A 0.1" in line and "2.50x" in line for line in lines)
    assert any("B 0.1" in line and "0.50x" in line for line in lines)
    assert "  C: failed. [boom]" in lines
    assert any("1.020" in line for line in lines)
    assert any("net [1]" in line for line in lines), "a name is no markup"
    assert max(map(len, lines)) <= width


def test_the_layers_of_a_profile_are_shown_beside_their_limit() -> None:
    text = io.StringIO()
    table.show(_comparison(), Console(file=text, width=160))
    (line,) = (line for line in text.getvalue().splitlines() if "conv1" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == [
        "conv1", "8x1 blocks", "10.0 %", "sparse", "0.5000", "50.0 %", "4.0000", "0.80", "1.0",
        "0.10", "0.2500", "50 %", "compute",
    ]  # fmt: skip
