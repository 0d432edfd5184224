"""The GPU check without a GPU: its cases, what it writes, and that nothing of a rival ends it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import emulated_gpu

import tvm_pivot
from benchmarks.gpu import check, rivals
from benchmarks.gpu.cases import LAYERS, NETWORKS, Layer, Network

__all__ = ["emulated_gpu"]

SMALL = Layer(64, 96, 5, 8, 4, 0.25, "float32")


def test_cases_have_names_of_their_own() -> None:
    keys = [case.key for case in (*NETWORKS, *LAYERS)]
    assert len(set(keys)) == len(keys)


def test_a_layer_keeps_whole_blocks_and_is_the_same_everywhere() -> None:
    weight = SMALL.weight()
    np.testing.assert_array_equal(weight, SMALL.weight())
    blocks = (weight != 0).reshape(8, 8, 24, 4)
    kept = blocks.any(axis=(1, 3))
    assert np.all(blocks.all(axis=(1, 3)) == kept)
    assert 0.1 < kept.mean() < 0.4
    np.testing.assert_array_equal(SMALL.module().weight.detach().numpy(), weight)


class Fake:
    """A session that repeats its input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def run(self, x: Any) -> Any:
        """Its input, times a factor."""
        return x * np.float32(self.factor)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (1.5, 0.5), (np.nan, np.inf)])
def test_errors_are_relative_and_nan_is_never_right(
    factor: float, expected: float, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    ends = np.concatenate([x, np.roll(x, 2, -1)])
    np.savez(tmp_path / "a.npz", x=ends, y=ends)
    case: Any = Network("mlp", "dense", "float32", 3)
    session: Any = Fake(factor)
    assert check.error(case, session, tmp_path / "a.pivot") == pytest.approx(expected)


@pytest.fixture
def bundle(emulated_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one layer that is right, one that is not, and one that cannot be loaded."""
    right, wrong, broken = (
        SMALL,
        Layer(64, 96, 6, 8, 4, 0.25, "float32"),
        Layer(*[8] * 5, 1, "float32"),
    )
    monkeypatch.setattr(check, "NETWORKS", ())
    monkeypatch.setattr(check, "LAYERS", (right, wrong, broken))
    (tmp_path / "cases").mkdir()
    for layer, factor in ((right, 1.0), (wrong, 1.01)):
        module = layer.module()
        module.weight.data *= factor
        net = tvm_pivot.build(
            module, target="cuda", example_inputs=(torch.zeros(layer.pixels, 96),), pivot_seconds=0
        )
        net.export(tmp_path / "cases" / f"{layer.key}.pivot")
    (tmp_path / "cases" / f"{broken.key}.pivot").write_text("nothing")
    (tmp_path / "tensor_cores").mkdir()
    (tmp_path / "tensor_cores/cases.json").write_text(json.dumps([{"name": "kernel"}]))
    return tmp_path


def test_what_is_wrong_is_told_and_the_rest_goes_on(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bundle / "out.json"
    assert check.main(["--json", str(out)], bundle) == 1
    found = json.loads(out.read_text())
    right, wrong, broken = found["cases"].values()
    assert right["right"] and right["error"] < 1e-5
    assert not wrong["right"] and 0.005 < wrong["error"] < 0.02
    assert "failed" in broken and "right" not in broken
    assert "no GPU" in right["rivals"]["torch"]["failed"]
    assert found["tensor_cores"]["kernel"]["failed"] and found["left"] == []
    assert {"device", "driver", "date", "torch", "triton", "tvm"} <= found["machine"].keys()
    assert "3 wrong" in capsys.readouterr().out


def test_one_case_can_be_chosen(bundle: Path) -> None:
    out = bundle / "out.json"
    assert check.main(["--json", str(out), "--only", SMALL.key], bundle) == 0
    assert list(json.loads(out.read_text())["cases"]) == [SMALL.key]


def test_without_time_everything_is_left_the_first_cases_last(bundle: Path) -> None:
    out = bundle / "out.json"
    assert check.main(["--json", str(out), "--minutes", "-1"], bundle) == 0
    left = json.loads(out.read_text())["left"]
    words = [name.rpartition(", ")[2] for name in left]
    assert words == ["dense"] * 3 + ["kernel"] + ["sparse"] * 3 + ["compiled"] * 3


def in_turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    for run in runs.values():
        run()
    return {name: 1e-3 * (2 if name == "rival" else 1) for name in runs}


def test_a_rivals_failure_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "interleaved", in_turns)
    exact = torch.from_numpy(SMALL.input() @ SMALL.weight().T)

    def found(make: Callable[[], Any], same: bool = True) -> dict[str, Any]:
        rival = rivals.Rival("one", rivals.DENSE, make, same)
        return check.beside(rival, lambda: None, SMALL, tmp_path)

    good = found(lambda: lambda: exact)
    assert good["error"] < 1e-6 and (good["rival_ms"], good["ours_ms"]) == (2.0, 1.0)
    assert "computes something else" in found(lambda: lambda: 2 * exact)["failed"]
    assert found(lambda: lambda: 2 * exact, same=False)["rival_ms"] == 2.0
    assert found(lambda: 1 / 0)["failed"].startswith("ZeroDivisionError")
    assert "out of memory" in found(lambda: lambda: raising("out of memory"))["failed"]
    results = {"cases": {"a": {"rivals": {"one": good}, "error": 0.0, "ours_ms": 1.0}}}
    (_, line) = check.table(results | {"tensor_cores": {}})
    assert line == "    one: 2.000 ms, ours is 2.00x as fast"


def raising(text: str) -> Any:
    raise RuntimeError(text)


@pytest.mark.parametrize(("block", "triton"), [((16, 16), "triton"), ((8, 1), "not 8x1")])
def test_rivals_of_a_layer(block: tuple[int, int], triton: str) -> None:
    layer = Layer(64, 96, 5, *block, 0.25, "float32")
    weight, x = torch.from_numpy(layer.weight()), torch.from_numpy(layer.input())
    made = {rival.name: rival for rival in rivals.layer_rivals(weight, x, block, "default")}
    assert {name.rpartition(", ")[2] for name in made if "dense" in name} == {"TF32 off", "TF32 on"}
    assert {"torch 2:4", "torch BSR", "Triton blocks, TF32 on", "torch.compile, TF32 off"} <= set(
        made
    )
    exact = (x.double() @ weight.double().T).numpy()
    square = ["torch BSR"] if block[0] == block[1] else []  # of others torch has none on CPUs
    for name in ("torch dense, TF32 off", "torch dense, TF32 on", *square):
        np.testing.assert_allclose(made[name].make()().numpy(), exact, atol=1e-4)
    with pytest.raises((ModuleNotFoundError, ValueError), match=triton):
        made["Triton blocks, TF32 off"].make()
    halves = [r.name for r in rivals.layer_rivals(weight.half(), x.half(), block, "default")]
    assert "torch dense" in halves and not any("TF32" in name for name in halves)


def test_rivals_of_a_network() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    made = list(rivals.network_rivals(lambda: (module, x), torch.float32, "default"))
    assert [r.stage for r in made] == [rivals.DENSE, rivals.SPARSE, rivals.COMPILED] * 2
    got = made[0].make()()
    np.testing.assert_allclose(got.numpy(), module(x).detach().numpy(), atol=1e-5)
