"""`tvm_pivot.prune` at once: exact densities, whole blocks, and networks that still compile."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from prune_nets import NETS, Encoder, Mlp, Recurrent, Residual, example, make
from torch import nn

import tvm_pivot
from tvm_pivot import PivotError, PruneError


def matrices(net: nn.Module) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(".weight").removesuffix("_weight"): p.detach().flatten(1).numpy()
        for name, p in net.named_parameters()
        if p.ndim > 1
    }


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("block", ["8x1", "1x1", "4x1"])
def test_density_is_exact_and_blocks_are_whole(kind: type[nn.Module], block: str) -> None:
    net = make(kind)
    before = matrices(copy.deepcopy(net))
    report = tvm_pivot.prune(net, density=0.25, block=block)
    after = matrices(net)
    rows = int(block.split("x")[0])
    total = sum(after[layer.name].size for layer in report.layers)
    kept = sum(np.count_nonzero(after[layer.name]) for layer in report.layers)
    assert abs(kept - 0.25 * total) <= rows + len(report.layers)
    assert report.density == pytest.approx(kept / total)
    for layer in report.layers:
        mask = after[layer.name] != 0
        np.testing.assert_array_equal(after[layer.name][mask], before[layer.name][mask])
        assert layer.density == pytest.approx(mask.mean())
        exact = np.abs(before[layer.name].astype(np.float64))
        assert layer.retained == pytest.approx(exact[mask].sum() / exact.sum(), rel=1e-5)
        if "grouped" not in layer.name:
            ordered = mask[layer.rows.order]
            for first in range(0, len(ordered), rows):
                part = ordered[first : first + rows]
                assert (part == part[:1]).all()
    for skip in report.skipped:
        name = next(n for n in before if n == skip.name)
        np.testing.assert_array_equal(after[name], before[name])


def test_what_is_left_dense_is_told_with_reasons() -> None:
    report = tvm_pivot.prune(make(Residual), density=0.2, skip=["conv2"])
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert "the image" in reasons["stem"]
    assert "depthwise" in reasons["depthwise"]
    assert "asked" in reasons["conv2"]
    assert [layer.name for layer in report.layers] == ["conv1", "grouped", "head"]
    words = tvm_pivot.prune(make(Encoder), density=0.2)
    assert "looked up" in {skip.name: skip.reason for skip in words.skipped}["words"]
    text = str(report)
    assert "conv1" in text
    assert "dense: stem" in text


def test_a_tied_weight_stays_tied_and_dense() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16))
    net[1].weight = net[0].weight
    report = tvm_pivot.prune(net, density=0.5, block="4x1")
    assert net[1].weight is net[0].weight
    assert int(net[0].weight.count_nonzero()) == 64
    assert [layer.name for layer in report.layers] == ["2"]
    assert all("tied" in skip.reason for skip in report.skipped)


def test_choosing_rows_keeps_more_than_neighbours_and_never_less() -> None:
    for kind in NETS:
        for block in ("4x1", "8x1"):
            kept = []
            for pivot in (True, False):
                net = make(kind)
                tvm_pivot.prune(net, density=0.2, block=block, pivot=pivot, skip=["*grouped"])
                kept.append(sum(float(np.abs(m).sum()) for m in matrices(net).values()))
            assert kept[0] > kept[1], (kind, block)


def test_a_seed_gives_the_same_network_again() -> None:
    nets = [make(Residual), make(Residual)]
    for net in nets:
        tvm_pivot.prune(net, density=0.3, seed=5)
    for one, other in zip(*(matrices(net).values() for net in nets), strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_can_say_what_matters() -> None:
    net, x = make(Mlp), example(Mlp)
    with pytest.raises(PruneError, match="needs gradients"):
        tvm_pivot.prune(net, density=0.5, saliency="gradient")
    net = make(Mlp)
    torch.autograd.backward(net(x * (torch.arange(24) < 12)).square().mean())
    tvm_pivot.prune(net, density=0.4, block="1x1", saliency="gradient")
    first = matrices(net)["fc1"]
    assert not first[:, 12:].any(), "these inputs were zero"
    assert first[:, :12].any()


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("target", ["x86", "x86-avx2"])
def test_a_pruned_network_compiles_and_agrees_with_torch(
    kind: type[nn.Module], target: str
) -> None:
    net, x = make(kind).eval(), example(kind)
    tvm_pivot.prune(net, density=0.2, block="4x1")
    with torch.no_grad():
        want = net(x).numpy()
    compiled = tvm_pivot.build(net, target, example_inputs=x)
    np.testing.assert_allclose(compiled.run(x.numpy()), want, rtol=1e-4, atol=1e-5)


def test_relative_saliency_does_not_see_the_scale_of_rows() -> None:
    nets = [make(Mlp), make(Mlp)]
    with torch.no_grad():
        for weight in (p for p in nets[1].parameters() if p.ndim > 1):
            weight.mul_(2.0 ** (torch.arange(len(weight)) % 5 - 2)[:, None])
    for net in nets:
        tvm_pivot.prune(net, density=0.25, block="4x1", saliency="relative")
    for one, other in zip(*(matrices(net).values() for net in nets), strict=True):
        np.testing.assert_array_equal(one != 0, other != 0)


# ---- latencies ---------------------------------------------------------------------------------


def test_a_latency_is_predicted_to_be_reached() -> None:
    net, x = make(Residual).eval(), example(Residual)
    report = tvm_pivot.prune(net, latency=0.6, example_inputs=x, target="x86-avx512")
    assert report.predicted is not None
    assert 0.5 <= report.predicted <= 0.6001
    with pytest.raises(PruneError, match="cannot be reached"):
        tvm_pivot.prune(make(Residual), latency=0.001, example_inputs=x)


def test_auto_takes_shapes_that_the_target_likes() -> None:
    net, x = make(Mlp), example(Mlp)
    report = tvm_pivot.prune(net, density=0.25, block="auto", example_inputs=x, target="x86-avx2")
    assert {layer.block.cols for layer in report.layers} == {1}
    assert report.density == pytest.approx(0.25, abs=0.02)
    assert all(layer.cycles and layer.cycles > 0 for layer in report.layers)


def test_a_measured_latency_is_told() -> None:
    net, x = make(Mlp), torch.zeros(64, 24)
    report = tvm_pivot.prune(net, latency=0.9, example_inputs=x, measure=True)
    assert report.measured is not None
    assert report.measured > 0


# ---- blocks of several channels ----------------------------------------------------------------


def test_square_blocks_share_the_order_of_channels_between_layers() -> None:
    net, x = make(Residual).eval(), example(Residual)
    report = tvm_pivot.prune(net, density=0.3, block="4x4", example_inputs=x, skip=["grouped"])
    layers = {layer.name: layer for layer in report.layers}
    after = {name: matrix != 0 for name, matrix in matrices(net).items()}
    rows, channels = layers["conv1"].rows.order, layers["conv2"].channels
    assert channels is not None
    blocks = [set(rows[i : i + 4]) for i in range(0, 24, 4)]
    others = [set(channels.order[i : i + 4]) for i in range(0, 24, 4)]
    assert sorted(map(sorted, blocks)) == sorted(map(sorted, others))
    conv1, conv2 = layers["conv1"], layers["conv2"]
    assert conv1.channels is not None
    # What conv2 adds to is what conv1 reads: rows of one are columns of the other.
    residual = [set(conv1.channels.order[i : i + 4]) for i in range(0, 16, 4)]
    added = [set(conv2.rows.order[i : i + 4]) for i in range(0, 16, 4)]
    assert sorted(map(sorted, residual)) == sorted(map(sorted, added))
    planes = after["conv1"].reshape(24, 16, 9)[rows][:, conv1.channels.order]
    tiles = planes.reshape(6, 4, 4, 4, 9)
    assert (tiles == tiles[:, :1, :, :1]).all()


@pytest.mark.parametrize("kind", [Encoder, Recurrent])
def test_square_blocks_of_other_networks_compile(kind: type[nn.Module]) -> None:
    net, x = make(kind).eval(), example(kind)
    report = tvm_pivot.prune(net, density=0.3, block="4x4", example_inputs=x)
    assert report.density == pytest.approx(0.3, abs=0.02)
    with torch.no_grad():
        want = net(x).numpy()
    compiled = tvm_pivot.build(net, example_inputs=x)
    np.testing.assert_allclose(compiled.run(x.numpy()), want, rtol=1e-4, atol=1e-5)


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "either density= or latency="),
        ({"density": 0.1, "latency": 0.5}, "either density= or latency="),
        ({"density": 0.0}, "above 0"),
        ({"density": 1.5}, "at most 1"),
        ({"density": 0.1, "block": "8"}, "block is 'auto' or"),
        ({"density": 0.1, "block": "0x1"}, "block is 'auto' or"),
        ({"density": 0.1, "block": "8x4"}, "R x 1 or R x R"),
        ({"density": 0.1, "saliency": "size"}, "saliency is"),
        ({"density": 0.1, "measure": True}, "measure=True corrects latency="),
        ({"latency": 0.5}, "needs example_inputs"),
        ({"density": 0.1, "block": "4x4"}, "needs example_inputs"),
        ({"density": 0.1, "skip": ["*"]}, "no weight that can be pruned"),
    ],
)
def test_bad_requests_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PivotError, match=complaint):
        tvm_pivot.prune(make(Mlp), **arguments)


def test_only_torch_modules_are_pruned() -> None:
    with pytest.raises(PruneError, match=r"not a str"):
        tvm_pivot.prune("model.onnx", density=0.1)


def test_torch_is_imported_late_and_missed_politely() -> None:
    code = (
        "import sys, tvm_pivot\n"
        "tvm_pivot.prune, tvm_pivot.pruner, tvm_pivot.PruneReport\n"
        "assert 'torch' not in sys.modules\n"
        "import importlib.util as u; real = u.find_spec\n"
        "from tvm_pivot.prune import api\n"
        "api.find_spec = lambda name: None\n"
        "try: tvm_pivot.prune(None, density=0.1)\n"
        "except tvm_pivot.PivotError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'tvm-pivot[torch]'" in done.stdout


def test_the_package_is_callable_once_it_is_imported() -> None:
    code = (
        "import tvm_pivot.prune, torch\n"
        "report = tvm_pivot.prune(torch.nn.Linear(8, 8), density=0.5)\n"
        "print(report.density)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0.5", done.stderr
