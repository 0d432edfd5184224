"""The command line, from the outside: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import tiny
from typer.testing import CliRunner

import tvm_pivot
from tvm_pivot import cli, cli_common
from tvm_pivot.errors import InputError
from tvm_pivot.report import Report

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``x [batch, 32] -> relu(x W)``, W [32, 64] with one 8x1 block of 64 kept."""
    weight = np.zeros((32, 64), np.float32)
    weight[:4, :8] = 0.5
    graph = oh.make_graph(
        [
            oh.make_node("MatMul", ["x", "w"], ["h"], name="fc"),
            oh.make_node("Relu", ["h"], ["y"], name="act"),
        ],
        "mlp",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 32])],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path_factory.mktemp("cli") / "mlp.onnx"
    made = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=10)
    onnx.save(made, path)
    return path


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    """`model`, compiled by the command line."""
    path = model.with_suffix(".pivot")
    done = call("build", model, "-o", path, "--shape", "batch=1")
    assert done.exit_code == 0, done.stderr
    return path


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def refused(*words: str | Path, code: int = 1) -> str:
    """The one line on stderr of a command that must fail."""
    done = call(*words)
    assert (done.exit_code, done.stdout) == (code, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_inspect(model: Path) -> None:
    done = call("inspect", model, "--shape", "batch=1")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == str(tvm_pivot.inspect(str(model), shapes={"batch": 1})) + "\n"
    assert "not compiled" in done.stdout


def test_inspect_json(model: Path) -> None:
    done = call("inspect", model, "--json", "--shape", "batch=1")
    report = Report.from_json(done.stdout)
    assert report == tvm_pivot.inspect(str(model), shapes={"batch": 1})
    assert report.compile_seconds is None


def test_build_writes_an_artifact_and_a_summary(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlp.pivot"
    done = call("build", model, "--output", path, "--shape", "batch=1")
    assert done.exit_code == 0, done.stderr
    assert f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB, in " in done.stdout
    assert done.stdout.startswith(str(tvm_pivot.load(path).report))


def test_build_and_run_a_directory(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mlp"
    done = call("build", model, "--output", f"{path}/", "--shape", "batch=1")
    assert done.exit_code == 0, done.stderr
    size = sum(file.stat().st_size for file in path.iterdir())
    assert f"wrote {path}, {size / 1e6:.2f} MB, in " in done.stdout
    assert call("run", path, "--random").exit_code == 0
    assert "it has no manifest.json" in refused("run", tmp_path, "--random")


def test_build_json_debug_dir_and_dense(model: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "mlp.pivot", tmp_path / "debug"
    words = ("--shape", "batch=1", "--json", "--dense", "--debug-dir", folder)
    done = call("build", model, "-o", path, *words)
    data = json.loads(done.stdout)
    assert sorted(data) == ["artifact", "bytes", "report", "seconds"]
    assert (data["artifact"], data["bytes"]) == (str(path), path.stat().st_size)
    report = Report.from_json(json.dumps(data["report"]))
    assert [layer.mode for layer in report.layers] == ["dense"]
    assert data["seconds"] >= (report.compile_seconds or 0) > 0
    assert list(folder.iterdir())


def test_build_refuses_a_bad_output_before_it_compiles(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvm_pivot, "build", None)
    message = refused("build", model, "-o", tmp_path / "absent" / "x.pivot")
    assert message.startswith("tvm-pivot: cannot write ")


def test_build_shows_phases_on_a_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []

    class Status:
        def __enter__(self) -> Status:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self, phase: str) -> None:
            phases.append(phase)

    class Terminal:
        is_terminal = True

        def status(self, first: str) -> Status:
            return Status()

    monkeypatch.setattr(cli_common, "messages", Terminal())
    assert call("build", model, "-o", tmp_path / "x.pivot", "--shape", "batch=1").exit_code == 0
    assert phases[0] == "import"
    assert len(phases) > 3


def test_run_prints_outputs_and_latency(artifact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    out = tmp_path / "y.npz"
    words = ("--input", tmp_path / "x.npy", "--output", out, "--repeat", "5", "--threads", "1")
    done = call("run", artifact, *words)
    assert done.exit_code == 0, done.stderr
    right = tvm_pivot.load(artifact).run(X)
    first, second = done.stdout.splitlines()
    low, mean, high = (f"{v:.6g}" for v in (right.min(), right.mean(dtype=float), right.max()))
    assert first == f"y: float32 [1, 64]  min {low}, mean {mean}, max {high}"
    assert second.startswith("latency: min 0.")
    assert second.endswith("ms (5 runs, 1 threads)")
    with np.load(out) as written:
        assert written.files == ["y"]
        np.testing.assert_array_equal(written["y"], right)


def test_run_json(artifact: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", x=X)
    done = call("run", artifact, "-i", tmp_path / "all.npz", "--json", "--repeat", "3")
    data = json.loads(done.stdout)
    (y,) = data["outputs"]
    assert (y["name"], y["shape"], y["dtype"]) == ("y", [1, 64], "float32")
    latency = data["latency_ms"]
    assert 0 < latency["min"] <= latency["median"]
    assert latency["runs"] == 3


def test_run_compiles_a_model_by_itself(model: Path, artifact: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "model.npy", tmp_path / "artifact.npy"]
    call("run", model, "--random", "--seed", "3", "--shape", "batch=1", "-o", paths[0])
    call("run", artifact, "--random", "--seed", "3", "-o", paths[1])
    a, b = (np.load(path) for path in paths)
    assert a.shape == (1, 64)
    np.testing.assert_array_equal(a, b)
    call("run", artifact, "--random", "--seed", "4", "-o", paths[1])
    assert not np.array_equal(a, np.load(paths[1]))


def test_an_artifact_may_have_any_name(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed.bin"
    path.write_bytes(artifact.read_bytes())
    assert call("run", path, "--random").exit_code == 0


@pytest.fixture(scope="module")
def two_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.two_by_two().export(tmp_path_factory.mktemp("cli") / "two.pivot")


def test_run_with_several_inputs(two_inputs: Path, tmp_path: Path) -> None:
    a, b = np.full((2, 3), 3, np.float32), np.ones((2, 3), np.float32)
    np.save(tmp_path / "a=1.npy", a)
    np.save(tmp_path / "b.npy", b)
    out = tmp_path / "out.npz"
    inputs = ("-i", f"a={tmp_path}/a=1.npy"), ("-i", f"b={tmp_path}/b.npy")
    for words in (inputs, inputs[::-1]):
        done = call("run", two_inputs, *words[0], *words[1], "-o", out)
        assert done.exit_code == 0, done.stderr
        with np.load(out) as written:
            np.testing.assert_array_equal(written["sum"], a + b)
            np.testing.assert_array_equal(written["difference"], a - b)


def test_run_refuses_unclear_inputs(two_inputs: Path, artifact: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("1, 2")
    a = tmp_path / "a.npy"
    give = "give the inputs with --input, or make them up with --random"
    assert give in refused("run", two_inputs)
    assert give in refused("run", two_inputs, "--random", "-i", a)
    assert f"write name={a}, with a name of a, b" in refused("run", two_inputs, "-i", a)
    assert "input 'b' is missing" in refused("run", two_inputs, "-i", f"a={a}")
    assert "there is no input 'c'" in refused("run", two_inputs, "-i", f"c={a}")
    assert "expected float32 [1, 32], got float32 [2, 3]" in refused("run", artifact, "-i", a)
    assert "No such file" in refused("run", artifact, "-i", tmp_path / "absent.npy")
    for name in ("objects.npy", "text.npy"):
        assert f"cannot read {tmp_path / name}" in refused("run", artifact, "-i", tmp_path / name)
    assert "need a .npz file" in refused("run", two_inputs, "--random", "-o", tmp_path / "y.npy")
    assert "must end in .npz or .npy" in refused("run", artifact, "--random", "-o", "y.txt")
    assert "threads must be" in refused("run", artifact, "--random", "--threads", "0")


def test_other_refusals(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    assert str(text) in refused("inspect", text)
    assert "absent.onnx" in refused("inspect", tmp_path / "absent.onnx")
    assert "absent.pivot: No such file" in refused("run", tmp_path / "absent.pivot", "--random")
    assert "batch" in refused("inspect", model)
    assert "unknown target 'z80'; known: x86" in refused("inspect", model, "--target", "z80")
    assert "write batch=1 or" in refused("inspect", model, "--shape", "batch=one")


def test_usage_errors_end_with_2(model: Path) -> None:
    for words in (["frobnicate"], ["build", str(model)], ["run", str(model), "--repeat", "0"]):
        assert call(*words).exit_code == 2


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    done = call("--debug", "inspect", tmp_path / "absent.onnx")
    assert isinstance(done.exception, tvm_pivot.PivotError)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (None, None),
        ([], None),
        (["batch=1"], {"batch": 1}),
        (["x=1x3x224x224", "n=2"], {"x": (1, 3, 224, 224), "n": 2}),
        (["a=b=4x0"], {"a=b": (4, 0)}),
    ],
)
def test_shapes(texts: list[str] | None, expected: Any) -> None:
    assert cli_common.parse_shapes(texts) == expected


@pytest.mark.parametrize("text", ["x", "x=", "=1", "x=1x", "x=-1", "x=1.5", "x=1,2", "x=a"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(InputError, match="write batch=1 or x=1x3x224x224"):
        cli_common.parse_shapes([text])


def test_outputs_may_have_any_name_and_hold_no_numbers(tmp_path: Path) -> None:
    results = {"file": np.array([np.nan, 1.0]), "a/b": np.zeros((0,)), "flag": np.array([True])}
    cli._write_outputs(tmp_path / "y.npz", results)
    with np.load(tmp_path / "y.npz") as written:
        assert written.files == list(results)
        for name, y in results.items():
            np.testing.assert_array_equal(written[name], y)
    assert cli._statistics(results["file"]) == {"min": None, "mean": None, "max": None}
    assert cli._statistics(results["a/b"]) == {"min": None, "mean": None, "max": None}
    assert cli._statistics(results["flag"]) == {"min": 1.0, "mean": 1.0, "max": 1.0}
    with pytest.raises(InputError, match="cannot write"):
        cli._write_outputs(tmp_path / "absent" / "y.npz", results)


def fresh(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the installed program in a process of its own."""
    return subprocess.run(
        [sys.executable, *words], cwd=Path(__file__).parent, capture_output=True, text=True
    )


def test_python_m_and_version() -> None:
    done = fresh(["-m", "tvm_pivot", "--version"])
    assert done.stdout.startswith(f"tvm-pivot {tvm_pivot.__version__} (TVM 0.27")
    assert "inspect" in fresh(["-m", "tvm_pivot", "--help"]).stdout


def test_help_does_not_wait_for_tvm() -> None:
    """Neither the import nor the whole of ``--help`` loads what takes long; no clock is asked."""
    heavy = "{'tvm', 'tvm_ffi', 'torch', 'numpy', 'onnx'} & sys.modules.keys()"
    assert fresh(["-c", f"import sys, tvm_pivot.cli; print({heavy})"]).stdout == "set()\n"
    code = (
        "import atexit, sys; from tvm_pivot.cli import main; "
        f"atexit.register(lambda: print({heavy})); sys.argv = ['tvm-pivot', '--help']; main()"
    )
    done = fresh(["-c", code])
    assert "Usage:" in done.stdout and done.stdout.endswith("set()\n")
