"""Every family of operators: scheduled by its own rule, right, and free of naive loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from schedule_oracle import HOST, THREADED, compare, functions, module, rules
from tvm import relax
from tvm.relax import op

from tvm_pivot.relay_passes.schedule_functions import schedule_functions
from tvm_pivot.schedules.analysis import is_naive

TARGETS = [HOST, THREADED]


def weights(n: int) -> np.ndarray:
    return np.linspace(0.5, 1.5, n).astype("float32")


def constant(n: int) -> Any:
    return relax.const(weights(n))


def exact(n: int) -> torch.Tensor:
    return torch.from_numpy(weights(n)).double()


def scalar(value: float) -> Any:
    return relax.const(value, "float32")


ELEMENTWISE = {
    "gelu": (op.nn.gelu, F.gelu, (1, 17, 49)),
    "batch norm": (
        lambda x, s, b: op.nn.relu(x * s + b),
        lambda x, s, b: torch.relu(x * s + b),
        *((2, 31, 7, 7), (1, 31, 1, 1), (1, 31, 1, 1)),
    ),
    "row bias": (lambda x, b: x + b, lambda x, b: x + b, (197, 100), (100,)),
    "silu twice": (lambda x: op.nn.silu(op.nn.silu(x)), lambda x: F.silu(F.silu(x)), (33, 65)),
    "chain": (
        lambda x: op.nn.silu(op.exp(op.tanh(op.sigmoid(x)))),
        lambda x: F.silu(torch.exp(torch.tanh(torch.sigmoid(x)))),
        (17, 5),
    ),
    "hard swish": (
        lambda x: x * op.clip(x + scalar(3), 0, 6) / scalar(6),
        F.hardswish,
        (1, 7, 9, 9),
    ),
    "transpose": (lambda x: op.permute_dims(x, [1, 0]), lambda x: x.t(), (100, 197)),
    "nhwc": (
        lambda x: op.permute_dims(x, [0, 2, 3, 1]),
        lambda x: x.permute(0, 2, 3, 1),
        (2, 17, 9, 7),
    ),
    "heads": (
        lambda x: op.permute_dims(op.reshape(x, (1, 49, 4, 17)), [0, 2, 3, 1]),
        lambda x: x.reshape(1, 49, 4, 17).permute(0, 2, 3, 1),
        (1, 49, 68),
    ),
    "transposed add": (
        lambda x, y: op.permute_dims(x, [1, 0]) + y,
        lambda x, y: x.t() + y,
        *((33, 100), (100, 33)),
    ),
    "pixel shuffle": (
        lambda x: op.reshape(
            op.permute_dims(op.reshape(x, (1, 3, 2, 2, 9, 7)), [0, 1, 4, 2, 5, 3]), (1, 3, 18, 14)
        ),
        lambda x: F.pixel_shuffle(x, 2),
        (1, 12, 9, 7),
    ),
    "concat rows": (
        lambda x, y: op.concat([x, y], 0),
        lambda x, y: torch.cat([x, y]),
        (7, 9),
        (1, 9),
    ),
    "concat columns": (
        lambda x, y, z: op.concat([x, y, z], 1),
        lambda x, y, z: torch.cat([x, y, z], 1),
        *((17, 100), (17, 49), (17, 1)),
    ),
    "many parts": (
        lambda *xs: op.concat(list(xs), 1),
        lambda *xs: torch.cat(xs, 1),
        *[(7, 3)] * 30,
    ),
    "pad": (
        lambda x: op.nn.pad(x, [0, 0, 1, 2, 3, 1], pad_value=0.5),
        lambda x: F.pad(x, (3, 1, 1, 2), value=0.5),
        (3, 17, 49),
    ),
    "strided slice": (
        lambda x: op.strided_slice(x, [1, 2], [2, 1], [50, 49], [3, 2]),
        lambda x: x[:, 2:50:3, 1:49:2],
        (5, 56, 56),
    ),
    "split": (
        lambda x: op.split(x, [17, 49], 1),
        lambda x: list(x.split([17, 32, 51], 1)),
        (9, 100),
    ),
    "take": (
        lambda x, i: op.take(x, i, axis=0, mode="clip"),
        lambda x, i: x[i],
        *((30, 77), ("int64", 19)),
    ),
    "where": (
        lambda x, y: op.where(op.greater(x, y), x, y),
        lambda x, y: torch.maximum(x, y),
        *((49, 33), (49, 33)),
    ),
    "lower triangle": (op.tril, torch.tril, (49, 100)),
    "nearest": (
        lambda x: op.image.resize2d(
            x,
            (14, 34),
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        ),
        lambda x: F.interpolate(x, scale_factor=2),
        (1, 3, 7, 17),
    ),
    "bilinear": (
        lambda x: op.image.resize2d(
            x, (13, 33), method="linear", coordinate_transformation_mode="half_pixel"
        ),
        lambda x: F.interpolate(x, (13, 33), mode="bilinear"),
        (1, 3, 7, 17),
    ),
    "one element": (op.nn.relu, torch.relu, (1, 1)),
}

REDUCTIONS = {
    "softmax 128": (op.nn.softmax, lambda x: x.softmax(-1), (3, 16, 128)),
    "softmax 197": (op.nn.softmax, lambda x: x.softmax(-1), (5, 197)),
    "softmax of pairs": (op.nn.softmax, lambda x: x.softmax(-1), (1, 443, 2)),
    "softmax of pairs, threads": (op.nn.softmax, lambda x: x.softmax(-1), (2, 4421, 2)),
    "softmax of threes": (op.nn.softmax, lambda x: x.softmax(-1), (5, 7, 3)),
    "softmax of fours": (op.nn.softmax, lambda x: x.softmax(-1), (3, 9, 5, 4)),
    "log softmax of pairs": (op.nn.log_softmax, lambda x: x.log_softmax(-1), (3, 100, 2)),
    "mean of pairs": (lambda x: op.mean(x, -1), lambda x: x.mean(-1), (3, 100, 2)),
    "argmax of threes": (lambda x: op.argmax(x, -1), lambda x: x.argmax(-1), (3, 100, 3)),
    "norm of threes": (
        lambda x: x * op.rsqrt(op.sum(x * x, -1, keepdims=True)),
        lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True)),
        (70, 3),
    ),
    "softmax 7": (op.nn.softmax, lambda x: x.softmax(-1), (64, 7)),
    "softmax of one row": (op.nn.softmax, lambda x: x.softmax(-1), (1, 1000)),
    "softmax of channels": (lambda x: op.nn.softmax(x, 1), lambda x: x.softmax(1), (1, 21, 9, 33)),
    "log softmax": (op.nn.log_softmax, lambda x: x.log_softmax(-1), (17, 100)),
    "layer norm, gelu": (
        lambda x: op.nn.gelu(op.nn.layer_norm(x, constant(100), constant(100), axes=[-1])),
        lambda x: F.gelu(F.layer_norm(x, (100,), exact(100), exact(100))),
        (1, 17, 100),
    ),
    "rms norm": (
        lambda x: x * op.rsqrt(op.mean(x * x, -1, keepdims=True) + scalar(1e-5)),
        lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5),
        (49, 768),
    ),
    "group norm": (
        lambda x: op.nn.group_norm(
            x, constant(12), constant(12), num_groups=3, channel_axis=1, axes=[2, 3]
        ),
        lambda x: F.group_norm(x, 3, exact(12), exact(12)),
        (2, 12, 7, 9),
    ),
    "instance norm": (
        lambda x: op.nn.instance_norm(x, constant(6), constant(6), channel_axis=1, axes=[2, 3]),
        lambda x: F.instance_norm(x, weight=exact(6), bias=exact(6)),
        (2, 6, 17, 5),
    ),
    "global mean": (
        lambda x: op.mean(x, [2, 3], True),
        lambda x: x.mean((2, 3), True),
        (2, 64, 7, 7),
    ),
    "mean of tokens": (lambda x: op.mean(x, 1), lambda x: x.mean(1), (2, 49, 100)),
    "mean of all": (op.mean, torch.mean, (17, 49)),
    "sum of two axes": (lambda x: op.sum(x, [0, 2]), lambda x: x.sum((0, 2)), (8, 31, 100)),
    "product": (lambda x: op.prod(x, 1), lambda x: x.prod(1), (100, 17)),
    "variance": (lambda x: op.variance(x, 1), lambda x: x.var(1, unbiased=False), (49, 1000)),
    "argmax": (lambda x: op.argmax(x, 1), lambda x: x.argmax(1), (8, 1000)),
    "argmax of channels": (lambda x: op.argmax(x, 1), lambda x: x.argmax(1), (1, 21, 9, 33)),
    "max pool": (
        lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1)),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        (1, 7, 17, 49),
    ),
    "max pool, ceil": (
        lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        (1, 7, 28, 12),
    ),
    "max pool, one channel": (
        lambda x: op.nn.max_pool2d(x, (3, 3), (1, 1), (1, 1, 1, 1)),
        lambda x: F.max_pool2d(x, 3, 1, 1),
        (1, 1, 100, 33),
    ),
    "average pool": (
        lambda x: op.nn.avg_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1)),
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        (2, 5, 28, 31),
    ),
    "max pool nhwc": (
        lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), layout="NHWC"),
        lambda x: F.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1),
        (1, 17, 9, 31),
    ),
    "max pool 1d": (
        lambda x: op.nn.max_pool1d(x, 3, 2, (1, 1)),
        lambda x: F.max_pool1d(x, 3, 2, 1),
        (1, 17, 100),
    ),
    "max pool 3d": (
        lambda x: op.nn.max_pool3d(x, (3, 3, 3), (2, 2, 2), (1, 1, 1, 1, 1, 1)),
        lambda x: F.max_pool3d(x, 3, 2, 1),
        (1, 3, 8, 9, 17),
    ),
}

CONTRACTIONS = {
    "scores": (
        lambda q, k: op.matmul(q, k) * scalar(0.125),
        lambda q, k: q @ k / 8,
        *((3, 128, 64), (3, 64, 128)),
    ),
    "masked scores": (
        lambda q, k, m: op.matmul(q, k) * scalar(0.125) + m,
        lambda q, k, m: q @ k / 8 + m,
        *((1, 3, 49, 32), (1, 3, 32, 49), (1, 1, 1, 49)),
    ),
    "odd": (op.matmul, torch.matmul, (2, 197, 17), (2, 17, 100)),
    "narrow": (op.matmul, torch.matmul, (17, 100), (100, 7)),
    "one row": (op.matmul, torch.matmul, (1, 100), (100, 77)),
    "shared": (
        lambda x, w, b: op.nn.relu(op.matmul(x, w) + b),
        lambda x, w, b: torch.relu(x @ w + b),
        *((2, 31, 49), (49, 65), (65,)),
    ),
    "transposed result": (
        lambda x, w: op.permute_dims(op.matmul(x, w), [1, 0]),
        lambda x, w: (x @ w).t(),
        *((31, 49), (49, 65)),
    ),
    "conv": (
        lambda x, w: op.nn.relu(op.nn.conv2d(x, w, padding=1)),
        lambda x, w: F.conv2d(x, w, padding=1).relu(),
        *((1, 8, 14, 17), (12, 8, 3, 3)),
    ),
    "strided conv": (
        lambda x, w: op.nn.conv2d(x, w, strides=2),
        lambda x, w: F.conv2d(x, w, stride=2),
        *((2, 4, 15, 17), (6, 4, 3, 3)),
    ),
    "depthwise conv": (
        lambda x, w: op.nn.conv2d(x, w, padding=1, groups=16),
        lambda x, w: F.conv2d(x, w, padding=1, groups=16),
        *((1, 16, 14, 14), (16, 1, 3, 3)),
    ),
    "grouped conv": (
        lambda x, w: op.nn.conv2d(x, w, dilation=2, groups=2),
        lambda x, w: F.conv2d(x, w, dilation=2, groups=2),
        *((1, 8, 14, 17), (6, 4, 3, 3)),
    ),
    "transposed conv": (
        lambda x, w: op.nn.conv2d_transpose(x, w, strides=2, padding=1),
        lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1),
        *((1, 6, 7, 9), (6, 4, 4, 4)),
    ),
    "conv 3d": (
        lambda x, w: op.nn.conv3d(x, w, padding=1),
        lambda x, w: F.conv3d(x, w, padding=1),
        *((1, 3, 5, 7, 17), (5, 3, 3, 3, 3)),
    ),
    "conv 1d": (
        lambda x, w: op.nn.conv1d(x, w, padding=1),
        lambda x, w: F.conv1d(x, w, padding=1),
        *((1, 7, 100), (9, 7, 3)),
    ),
}

OTHERS = {
    "cumsum": (lambda x: op.cumsum(x, 1), lambda x: x.cumsum(1), (17, 100)),
    "top k": (lambda x: op.topk(x, 3, ret_type="values"), lambda x: x.topk(3).values, (17, 100)),
    "sort": (lambda x: op.sort(x, 1), lambda x: x.sort(1).values, (17, 100)),
    "adaptive pool": (
        lambda x: op.nn.adaptive_avg_pool2d(x, (5, 5)),
        lambda x: F.adaptive_avg_pool2d(x, 5),
        (1, 17, 14, 14),
    ),
    "scatter": (
        lambda x, i, u: op.scatter_elements(x, i, u, axis=0),
        lambda x, i, u: x.scatter(0, i, u),
        *((8, 9), ("int64", 1, 9), (1, 9)),
    ),
    "gather": (
        lambda x, i: op.gather_elements(x, i, axis=0),
        lambda x, i: torch.gather(x, 0, i),
        *((8, 100), ("int64", 5, 100)),
    ),
    "reduced axis of one": (lambda x: op.nn.softmax(x), lambda x: x.softmax(-1), (49, 1)),
}

FAMILIES = {
    "elementwise": ELEMENTWISE,
    "reduction": REDUCTIONS,
    "contraction": CONTRACTIONS,
}
ALL = [
    pytest.param(*case, id=f"{family}: {name}")
    for family, cases in (*FAMILIES.items(), ("other", OTHERS))
    for name, case in cases.items()
]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("case", [pytest.param(p.values, id=p.id) for p in ALL])
def test_agrees_with_torch_in_float64(case: Any, target: Any) -> None:
    compare(*case, target=target)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_own_rule_and_no_naive_loops(family: str) -> None:
    for name, (expression, _, *shapes) in FAMILIES[family].items():
        for target in TARGETS:
            scheduled = schedule_functions(module(expression, *shapes), target)
            assert family in rules(scheduled), name
            assert "fallback" not in rules(scheduled), name
            for function, func in functions(scheduled).items():
                assert not is_naive(func), f"{name}: {function}"


@pytest.mark.parametrize("name", ["softmax 197", "layer norm, gelu", "max pool"])
def test_unscheduled_functions_are_naive(name: str) -> None:
    expression, _, *shapes = REDUCTIONS[name]
    assert all(is_naive(func) for func in functions(module(expression, *shapes)).values())
