"""The demo's shipped files are what they claim, and the demo notices wrong answers."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tvm_pivot
from tvm_pivot import demo
from tvm_pivot.demo import __main__ as program
from tvm_pivot.errors import UnsupportedTargetError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STEM = "conv1.weight"


@pytest.fixture(scope="module")
def graph() -> onnx.GraphProto:
    model = onnx.load(demo.MODEL)
    onnx.checker.check_model(model)
    return model.graph


@pytest.fixture(scope="module")
def weights(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Every weight (not bias) of a Conv or Gemm node by its name."""
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    return {n.input[1]: stored[n.input[1]] for n in layers}


def reference_session() -> Any:
    return pytest.importorskip("onnxruntime").InferenceSession(
        str(demo.MODEL), providers=["CPUExecutionProvider"]
    )


# ---- the shipped files -------------------------------------------------------------------------


def test_the_model_takes_and_gives_what_the_demo_expects(graph: onnx.GraphProto) -> None:
    def described(values: Any) -> list[tuple[str, int, list[int]]]:
        types = [(v.name, v.type.tensor_type) for v in values]
        return [(n, t.elem_type, [d.dim_value for d in t.shape.dim]) for n, t in types]

    assert described(graph.input) == [("x", onnx.TensorProto.FLOAT, [1, 3, 32, 32])]
    assert described(graph.output) == [("logits", onnx.TensorProto.FLOAT, [1, 10])]


def test_every_convolution_but_the_stem_consists_of_full_8x1_blocks(
    weights: dict[str, np.ndarray],
) -> None:
    pruned = {n: w for n, w in weights.items() if w.ndim == 4 and n != STEM}
    assert len(pruned) == 18
    for name, weight in pruned.items():
        live = weight.reshape(weight.shape[0] // 8, 8, -1) != 0
        assert np.array_equal(live.any(axis=1), live.all(axis=1)), name


def test_the_record_agrees_with_the_weights(weights: dict[str, np.ndarray]) -> None:
    facts = demo.load_facts()
    assert facts["block"] == "8x1"
    assert facts["density"].keys() == weights.keys()
    for name, weight in weights.items():
        assert np.count_nonzero(weight) / weight.size == pytest.approx(facts["density"][name])
    pruned = [w for n, w in weights.items() if facts["density"][n] < 1]
    kept = sum(np.count_nonzero(w) for w in pruned) / sum(w.size for w in pruned)
    assert kept == pytest.approx(facts["density_of_pruned_layers"])
    assert kept == pytest.approx(1 - facts["recipe"]["sparsity"], abs=1e-3)


def test_the_images_are_balanced_and_the_classes_named() -> None:
    images = demo.load_images()
    assert images.pixels.shape == (64, 32, 32, 3)
    assert images.pixels.dtype == np.uint8
    assert images.labels.shape == (64,)
    counts = np.bincount(images.labels, minlength=10)
    assert len(images.classes) == len(counts) == 10
    assert counts.max() - counts.min() <= 1


def test_the_images_are_the_first_of_the_test_set() -> None:
    archive = DATA / "cifar10_test_jpeg.npz"
    if not archive.exists():
        pytest.skip(f"needs {archive}, which does not ship with the package")
    images = demo.load_images()
    with np.load(archive) as stored:
        assert np.array_equal(images.labels, stored["labels"][:64])
        assert images.classes == tuple(stored["classes"])


def test_normalise_matches_its_definition() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    x = demo.normalise(pixels)
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    expected = (pixels[1, 5, 7, 2] / 255 - demo.MEAN[2]) / demo.STD[2]
    assert x[1, 2, 5, 7] == pytest.approx(expected, rel=1e-5)


def test_onnxruntime_reaches_the_recorded_accuracy() -> None:
    session = reference_session()
    images = demo.load_images()
    x = demo.normalise(images.pixels)
    answers = [int(session.run(None, {"x": one[None]})[0].argmax()) for one in x]
    recorded = demo.load_facts()["accuracy_percent"]["pruned_on_demo_images"]
    # Two nearly equal logits may swap on another machine: one image of slack.
    assert 100 * np.mean(answers == images.labels) == pytest.approx(recorded, abs=100 / 64 + 1e-6)
    assert recorded > 70


# ---- the demo's own judgement, with stand-ins for the compiler ---------------------------------


def fake_build(error: float) -> Callable[..., Any]:
    """A `build` whose sparse network is onnxruntime plus `error` on one logit."""
    session = reference_session()

    def build(model: object, *, target: str, sparse: bool = True) -> Any:
        def run(x: np.ndarray) -> np.ndarray:
            logits: np.ndarray = session.run(None, {"x": x})[0].copy()
            logits[0, 3] += error if sparse else 0
            return logits

        return SimpleNamespace(run=run, report="conv [8x1] sparse")

    return build


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")  # main() sets it: put the old value back afterwards
    monkeypatch.setenv("COLUMNS", "160")
    yield ["--rounds", "2", "--burst", "2"]


@pytest.mark.parametrize(("error", "code"), [(0.0, 0), (1e-4, 0), (0.5, 1), (math.nan, 1)])
def test_the_exit_code_tells_of_wrong_answers(
    error: float,
    code: int,
    quick: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tvm_pivot, "build", fake_build(error), raising=False)
    assert program.main(quick) == code
    shown = capsys.readouterr().out
    assert "conv [8x1] sparse" in shown  # not eaten as markup
    assert ("disagree" in shown) == (code == 1)


def test_without_onnxruntime_the_dense_build_is_the_judge(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tvm_pivot, "build", fake_build(0.5), raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes the import fail
    assert program.main(quick) == 1
    shown = capsys.readouterr().out
    assert "against tvm_pivot, dense build" in shown
    assert "pip install onnxruntime" in shown


def test_a_target_that_cannot_be_built_for_is_explained(
    quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(model: object, **_: object) -> None:
        raise UnsupportedTargetError("no such machine")

    monkeypatch.setattr(tvm_pivot, "build", build, raising=False)
    assert program.main([*quick, "--target", "abacus"]) == 2
    assert "no such machine" in capsys.readouterr().out


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_wrong_number_of_threads_is_refused(threads: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        program.main(["--threads", threads])
    assert exit_info.value.code == 2


def test_relative_error_is_the_worst_difference_over_the_range() -> None:
    reference = np.array([[-1, 3], [0, 1]], np.float32)
    answers = reference + np.array([[0, 0.5], [-1, 0]], np.float32)
    assert program.relative_error(answers, reference) == pytest.approx(0.25)


def test_runners_are_timed_in_turns() -> None:
    calls: list[str] = []

    def runner(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def run(x: np.ndarray) -> np.ndarray:
            assert x.shape == (1, 3, 32, 32)
            calls.append(name)
            return x

        return run

    images = np.zeros((2, 3, 32, 32), np.float32)
    times = program.measure({"a": runner("a"), "b": runner("b")}, images, rounds=2, burst=3)
    assert "".join(calls) == "aaabbb" + "aaaabbbb" + "bbbbaaaa"
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6}


# ---- the real thing ----------------------------------------------------------------------------


def test_the_demo_runs_and_its_answers_agree() -> None:
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "tvm_pivot.demo", "--rounds", "2", "--burst", "2"]
    wide = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env=wide
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"\b(\d+)/64", done.stdout) == ["64", "64"], done.stdout


# ---- the script that made the model ------------------------------------------------------------


def test_the_pruner_drops_the_weakest_blocks_and_never_revives_one() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("PIL")
    pytest.importorskip("safetensors")
    from benchmarks.make_demo_model import BlockPruner, ResNet20

    torch.manual_seed(0)
    net = ResNet20()
    pruner = BlockPruner(net)
    assert len(pruner.weights) == 18
    weight = pruner.weights["layer2.0.conv1"]
    before = weight.detach().clone().reshape(4, 8, -1)
    pruner.choose(0.5)
    half = weight.detach().reshape(4, 8, -1).ne(0)
    assert half.any(1).equal(half.all(1))
    norms, kept = before.norm(dim=1), half.any(1)
    assert norms[kept].min() >= norms[~kept].max()
    with torch.no_grad():
        weight.add_(1.0)  # an optimiser step that moves everything
    pruner.apply()
    pruner.choose(0.85)
    final = weight.detach().reshape(4, 8, -1).ne(0).any(1)
    assert final.sum() == round(final.numel() * 0.15)
    assert not (final & ~kept).any()
