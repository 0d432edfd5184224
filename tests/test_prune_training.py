"""The pruner inside a training loop: its schedule, its masks, and going on after a break."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from prune_nets import NETS, Mlp, Residual, example, make, train_steps
from torch import nn

import tvm_pivot
from tvm_pivot import PruneError
from tvm_pivot.prune.settings import cubic


def test_the_schedule_is_zhu_and_guptas() -> None:
    assert cubic(0.0, 0.1) == 1.0
    assert cubic(0.5, 0.1) == pytest.approx(0.1 + 0.9 / 8)
    assert cubic(1.0, 0.1) == cubic(7.0, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", NETS)
def test_density_falls_to_what_was_asked_and_stays(kind: type[nn.Module]) -> None:
    net, x = make(kind), example(kind)
    pruner = tvm_pivot.pruner(net, density=0.25, block="4x1", steps=20, every=2)
    seen = [pruner.density]
    train_steps(net, x, 20, lambda: (pruner.step(), seen.append(pruner.density)))
    assert seen[0] == 1.0
    assert all(after <= before + 0.02 for before, after in pairwise(seen))
    assert seen[2] == pytest.approx(0.25 + 0.75 * 0.8**3, abs=0.03)
    assert seen[-1] == pytest.approx(0.25, abs=0.02)
    assert len(set(seen[12:])) == 1
    net.eval()
    with torch.no_grad():
        before = net(x)
    report = pruner.finalize()
    with torch.no_grad():
        assert torch.equal(net(x), before)
    assert report.density == seen[-1]


def test_finalize_leaves_plain_parameters_and_the_same_objects() -> None:
    net, x = make(Residual), example(Residual)
    names = list(net.state_dict())
    weight = net.conv1.weight
    pruner = tvm_pivot.pruner(net, density=0.3, steps=10)
    assert "conv1.parametrizations.weight.0.mask" in net.state_dict()
    train_steps(net, x, 10, pruner.step)
    pruner.finalize()
    assert list(net.state_dict()) == names or set(net.state_dict()) == set(names)
    assert net.conv1.weight is weight
    assert type(net.conv1) is nn.Conv2d
    assert all(type(p) is nn.Parameter for p in net.parameters())
    with pytest.raises(PruneError, match="finalized"):
        pruner.step()
    with pytest.raises(PruneError, match="finalized"):
        pruner.finalize()


def test_finalize_in_the_middle_prunes_what_is_missing() -> None:
    net, x = make(Mlp), example(Mlp)
    pruner = tvm_pivot.pruner(net, density=0.2, block="8x1", steps=100)
    train_steps(net, x, 3, pruner.step)
    assert pruner.density > 0.5
    assert pruner.finalize().density == pytest.approx(0.2, abs=0.01)


def test_dropped_weights_learn_while_they_may_come_back_and_rest_later() -> None:
    net, x = make(Mlp), example(Mlp)
    pruner = tvm_pivot.pruner(net, density=0.3, steps=20, every=1, ramp=0.4, settle=0.5)
    train_steps(net, x, 5, pruner.step)

    def gradient_of_dropped() -> float:
        net.zero_grad()
        torch.autograd.backward(net(x).square().mean())
        own: Any = net.fc2.parametrizations.weight
        assert int((~own[0].mask).sum()) > 0
        assert not net.fc2.weight.detach()[~own[0].mask].any()
        return float(own.original.grad[~own[0].mask].abs().sum())

    assert gradient_of_dropped() > 0
    train_steps(net, x, 10, pruner.step)
    assert gradient_of_dropped() == 0


@pytest.mark.parametrize("every", [1, 3])
def test_blocks_that_will_go_shrink_while_density_falls_and_others_stay(every: int) -> None:
    net = make(Mlp)
    before = {name: p.detach().clone() for name, p in net.named_parameters() if p.ndim > 1}
    pruner = tvm_pivot.pruner(net, density=0.25, block="8x1", steps=60, every=every, ramp=0.5)
    seen: dict[str, list[torch.Tensor]] = {name: [weight] for name, weight in before.items()}
    for _ in range(60):  # without an optimiser: nothing else moves a weight
        pruner.step()
        for name, weights in seen.items():
            own: Any = net.get_submodule(name.removesuffix(".weight")).parametrizations.weight
            weights.append(own.original.detach().clone())
    pruner.finalize()
    after = dict(net.named_parameters())
    for name, weights in seen.items():
        stays = after[name] != 0
        assert torch.equal(after[name][stays], before[name][stays])
        sizes = torch.stack([weight.abs()[~stays] for weight in weights])
        assert (sizes[1:] <= sizes[:-1]).all()
        assert torch.equal(sizes[31], sizes[-1]), "the ramp is over"
        assert float(sizes[-1].square().sum() / sizes[0].square().sum()) < 0.05
        assert float((sizes[-1] / sizes[0]).min()) > 1e-5, "no more than the worst block shrinks"


@pytest.mark.parametrize("stop", [3, 8, 13])
@pytest.mark.parametrize("saliency", ["magnitude", "gradient"])
def test_training_goes_on_after_a_break_as_if_there_was_none(stop: int, saliency: Any) -> None:
    x = example(Residual)

    def start() -> tuple[nn.Module, Any]:
        net = make(Residual)
        return net, tvm_pivot.pruner(
            net, density=0.3, block="4x1", steps=16, every=2, saliency=saliency
        )

    net, pruner = start()
    train_steps(net, x, stop, pruner.step)
    saved = copy.deepcopy((net.state_dict(), pruner.state_dict()))
    train_steps(net, x, 16 - stop, pruner.step)  # with a fresh optimiser, as after a break
    again, other = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.density == pytest.approx(1.0) if stop == 1 else other.density < 1
    train_steps(again, x, 16 - stop, other.step)
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    one, two = pruner.finalize(), other.finalize()
    assert [layer.rows.order.tolist() for layer in one.layers] == [
        layer.rows.order.tolist() for layer in two.layers
    ]


def test_the_state_of_another_model_is_refused() -> None:
    pruner = tvm_pivot.pruner(make(Mlp), density=0.3, steps=4)
    other = tvm_pivot.pruner(make(Residual), density=0.3, steps=4)
    with pytest.raises(PruneError, match="other layers"):
        other.load_state_dict(pruner.state_dict())


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(PruneError, match="steps must be"):
        tvm_pivot.pruner(make(Mlp), density=0.3, steps=0)
    with pytest.raises(PruneError, match="ramp <= settle"):
        tvm_pivot.pruner(make(Mlp), density=0.3, steps=9, ramp=0.8, settle=0.5)


def test_square_blocks_while_training_stay_tied() -> None:
    net, x = make(Residual), example(Residual)
    pruner = tvm_pivot.pruner(
        net, density=0.3, block="4x4", steps=12, every=3, example_inputs=x, skip=["grouped"]
    )
    train_steps(net, x, 12, pruner.step)
    layers = {layer.name: layer for layer in pruner.finalize().layers}
    rows, channels = layers["conv1"].rows.order, layers["conv2"].channels
    assert channels is not None
    blocks = sorted(sorted(rows[i : i + 4]) for i in range(0, 24, 4))
    assert blocks == sorted(sorted(channels.order[i : i + 4]) for i in range(0, 24, 4))
