"""Rewrites that give torch the functions its own users call instead of their pieces in ONNX."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .onnx_to_torch_graph import Builder, shape

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def fuse(builder: Builder) -> None:
    """Rewrite a finished graph: biases, batch norms after convolutions, GELU, layer norms."""
    for node in list(builder.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.add:
            _bias(builder, node)
        elif node.target is F.batch_norm:
            _batch_norm(builder, node)
        elif node.target is torch.erf:
            _gelu(builder, node)
        elif node.target is torch.sqrt:
            _layer_norm(builder, node)


def _replace(builder: Builder, node: fx.Node, function: Any, *args: Any, **kwargs: Any) -> None:
    """Let a call of `function` take a step's place."""
    with builder.graph.inserting_before(node):
        new: fx.Node = builder.emit(function, *args, **kwargs)
    node.replace_all_uses_with(new)
    builder.graph.erase_node(node)


def _only_user(node: Any, function: Any = None) -> fx.Node | None:
    """The one step that uses a step, if it is one and calls `function`."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return user if function is None or user.target is function else None


def _args(node: fx.Node) -> tuple[Any, ...]:
    """A step's arguments, for which fx has a type too wide to work with."""
    return node.args


def _operand(node: fx.Node, other: Any) -> Any:
    """What a step of two operands takes besides `other`."""
    first, second = _args(node)
    return second if first is other else first


def _is_call(node: Any, function: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is function


def _close(value: Any, wanted: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, wanted, rel_tol=1e-4)


def _bias(builder: Builder, node: fx.Node) -> None:
    """linear(x, w) + b -> linear(x, w, b)."""
    for linear in _args(node):
        if not _is_call(linear, F.linear) or len(linear.args) != 2 or _only_user(linear) is None:
            continue
        features = shape(linear)[-1]
        bias = builder.value_of(_operand(node, linear))
        if bias is None or bias.ndim == 0 or bias.ndim > len(shape(linear)):
            continue
        if bias.numel() == bias.shape[-1] == features:
            _replace(builder, node, F.linear, *linear.args, bias.reshape(features))
            return


def _batch_norm(builder: Builder, node: fx.Node) -> None:
    """batch_norm(conv(x, w)) -> conv(x, w')."""
    conv = _args(node)[0]
    if not any(_is_call(conv, function) for function in _CONVOLUTIONS) or _only_user(conv) is None:
        return
    x, kernel, offset, *rest = _args(conv)
    kernel, offset = builder.value_of(kernel), builder.value_of(offset)
    if kernel is None or (offset is None and conv.args[2] is not None):
        return
    mean, variance, weight, bias = (builder.value_of(arg) for arg in _args(node)[1:5])
    if mean is None or variance is None:
        return
    fused = fuse_conv_bn_weights(kernel, offset, mean, variance, _args(node)[7], weight, bias)
    _replace(builder, node, conv.target, x, *(tensor.detach() for tensor in fused), *rest)


def _gelu(builder: Builder, erf: fx.Node) -> None:
    """x * 0.5 * (1 + erf(x / sqrt(2))), multiplied in any order -> gelu(x)."""
    inner = _args(erf)[0]
    divided = _is_call(inner, operator.truediv) and _close(inner.args[1], math.sqrt(2))
    scaled = _is_call(inner, operator.mul) and _close(inner.args[1], math.sqrt(0.5))
    last = _only_user(erf, operator.add)
    if not (divided or scaled) or last is None or not _close(_operand(last, erf), 1.0):
        return
    x = inner.args[0]
    factors: list[Any] = []
    while len(factors) < 2:
        user = _only_user(last, operator.mul)
        if user is None:
            return
        factors += _factors(_operand(user, last), x)
        last = user
    if len(factors) == 2 and x in factors and any(_close(factor, 0.5) for factor in factors):
        _replace(builder, last, F.gelu, x)


def _factors(value: Any, x: Any) -> list[Any]:
    """The factors of a product of numbers and `x`."""
    if value is not x and _is_call(value, operator.mul):
        return [factor for arg in value.args for factor in _factors(arg, x)]
    return [value]


def _layer_norm(builder: Builder, root: fx.Node) -> None:
    """d / sqrt(mean(d**2) + epsilon) * w + b, where d = x - mean(x) -> layer_norm(x, w, b)."""
    total, last = _args(root)[0], _only_user(root, operator.truediv)
    if last is None or not _is_call(total, operator.add):
        return
    variance, epsilon = total.args
    difference = _args(last)[0]
    if not isinstance(epsilon, float) or not _is_call(difference, operator.sub):
        return
    x, mean = difference.args
    if not _is_call(variance, torch.mean) or not _is_square(variance.args[0], difference):
        return
    axes = _trailing_axes(variance)
    if axes is None or axes != _trailing_axes(mean) or mean.args[0] is not x:
        return
    size = shape(x)[-axes:]
    affine: list[Tensor | None] = [None, None]
    for position, function in enumerate((operator.mul, operator.add)):
        user = _only_user(last, function)
        value = None if user is None else builder.value_of(_operand(user, last))
        if user is None or value is None or tuple(value.shape) != size:
            break
        affine[position], last = value, user
    _replace(builder, last, F.layer_norm, x, size, *affine, epsilon)


def _is_square(node: Any, of: Any) -> bool:
    if _is_call(node, torch.pow):
        return bool(node.args == (of, 2))
    return _is_call(node, operator.mul) and node.args == (of, of)


def _trailing_axes(mean: Any) -> int | None:
    """How many last axes a mean is taken over, all kept; None for anything else."""
    if not _is_call(mean, torch.mean) or not mean.kwargs.get("keepdim"):
        return None
    rank, axes = len(shape(mean)), mean.args[1]
    return len(axes) if tuple(axes) == tuple(range(rank - len(axes), rank)) else None
