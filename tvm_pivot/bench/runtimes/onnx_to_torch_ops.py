"""Translations of ONNX operators that compute element by element or reduce."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .onnx_to_torch_graph import Operator, Value, dtype, is_float, shape, torch_dtype

Translator = Callable[[Operator], Any]


def unary(function: Callable[..., Any]) -> Translator:
    """Translate to a function of the one input."""
    return lambda op: op.emit(function, op.input(0))


def _plain(value: Value, other: Value) -> Any:
    """A constant of one element as a number, where that leaves the result's shape alone."""
    if isinstance(value, Tensor) and isinstance(other, fx.Node) and value.numel() == 1:
        return value.item() if value.ndim <= len(shape(other)) else value
    return value


def binary(function: Callable[..., Any]) -> Translator:
    """Translate to a function of two inputs, which torch broadcasts as ONNX does."""

    def translate(op: Operator) -> Any:
        a, b = op.input(0), op.input(1)
        return op.emit(function, _plain(a, b), _plain(b, a))

    return translate


def variadic(function: Callable[..., Any]) -> Translator:
    """Translate to a chain of calls of a function of two inputs."""

    def translate(op: Operator) -> Any:
        result = op.input(0)
        for index in range(1, len(op.inputs)):
            result = op.emit(function, result, op.input(index))
        return result

    return translate


def _divide(op: Operator) -> Any:
    a, b = op.input(0), op.input(1)
    if is_float(a):
        return op.emit(operator.truediv, _plain(a, b), _plain(b, a))
    return op.emit(torch.div, a, b, rounding_mode="trunc")


def _modulo(op: Operator) -> Any:
    return op.emit(torch.fmod if op.get("fmod", 0) else torch.remainder, op.input(0), op.input(1))


def _power(op: Operator) -> Any:
    base, exponent = op.input(0), op.input(1)
    result = op.emit(torch.pow, base, _plain(exponent, base))
    if dtype(result) is dtype(base):
        return result
    return op.cast(result, dtype(base))


def _mean_of_inputs(op: Operator) -> Any:
    return op.emit(operator.truediv, variadic(operator.add)(op), float(len(op.inputs)))


def _clip(op: Operator) -> Any:
    limits = []
    for index, name in ((1, "min"), (2, "max")):
        value = op.get(name)
        if value is None:
            value = op.number(index)
        limits.append(value)
    low, high = limits
    x = op.input(0)
    if (low, high) == (None, None):
        return x
    if low == 0 and high is None:
        return op.emit(torch.relu, x)
    if (low, high) == (0.0, 6.0) and is_float(x):
        return op.emit(F.relu6, x)
    return op.emit(torch.clamp, x, low, high)


def _hard_sigmoid(op: Operator) -> Any:
    alpha, beta = op.get("alpha", 0.2), op.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return op.emit(F.hardsigmoid, op.input(0))
    line = op.emit(operator.add, op.emit(operator.mul, op.input(0), alpha), beta)
    return op.emit(torch.clamp, line, 0.0, 1.0)


def _selu(op: Operator) -> Any:
    if "alpha" in op.attributes or "gamma" in op.attributes:
        raise op.unsupported("other factors than the usual ones")
    return op.emit(F.selu, op.input(0))


def _prelu(op: Operator) -> Any:
    x, slope = op.input(0), op.input(1)
    rank, size = len(shape(x)), shape(slope)
    channels = shape(x)[1] if rank > 1 else 1
    if math.prod(size) == 1 or size == (channels,) + (1,) * (rank - 2):
        return op.emit(F.prelu, x, op.emit(torch.reshape, slope, (-1,)))
    return op.emit(torch.where, op.emit(operator.ge, x, 0), x, op.emit(operator.mul, x, slope))


def _softmax(function: Callable[..., Any]) -> Translator:
    def translate(op: Operator) -> Any:
        x, size = op.input(0), shape(op.input(0))
        axis = op.axis(op.get("axis", -1 if op.opset >= 13 else 1), len(size))
        if op.opset >= 13 or axis == len(size) - 1:
            return op.emit(function, x, axis)
        # Before opset 13 it is one softmax over all axes from this one on.
        rows = op.emit(torch.reshape, x, (*size[:axis], -1))
        return op.emit(torch.reshape, op.emit(function, rows, axis), size)

    return translate


def _cast(op: Operator) -> Any:
    wanted = torch_dtype(str(onnx.helper.tensor_dtype_to_np_dtype(op.get("to"))))
    return op.cast(op.input(0), wanted)


def _axes(op: Operator) -> tuple[int, ...]:
    """The axes that a reduction takes; none where it is to do nothing."""
    rank = len(shape(op.input(0)))
    axes = op.ints(1, "axes")
    if not axes:
        return () if op.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(op.axis(axis, rank) for axis in axes))


def _reduce(function: Callable[..., Any], *leading: Any) -> Translator:
    """Translate to a function that takes the input, `leading`, the axes and keepdim."""

    def translate(op: Operator) -> Any:
        axes = _axes(op)
        if not axes:
            return op.input(0)
        return op.emit(function, op.input(0), *leading, axes, keepdim=bool(op.get("keepdims", 1)))

    return translate


def _mean(op: Operator) -> Any:
    axes, size = _axes(op), shape(op.input(0))
    if len(size) == 4 and axes == (2, 3) and not op.get("keepdims", 1):
        # As people write it; XNNPACK averages images only where the axes are kept.
        mean = op.emit(torch.mean, op.input(0), axes, keepdim=True)
        return op.emit(torch.flatten, mean, 1)
    return _reduce(torch.mean)(op)


def _reduce_product(op: Operator) -> Any:
    x = op.input(0)
    for axis in reversed(_axes(op)):  # torch.prod takes one at a time
        x = op.emit(torch.prod, x, axis, keepdim=bool(op.get("keepdims", 1)))
    return x


def _arg(function: Callable[..., Any]) -> Translator:
    def translate(op: Operator) -> Any:
        if op.get("select_last_index", 0):
            raise op.unsupported("select_last_index")
        axis = op.axis(op.get("axis", 0), len(shape(op.input(0))))
        return op.emit(function, op.input(0), axis, keepdim=bool(op.get("keepdims", 1)))

    return translate


OPERATORS: dict[str, Translator] = {
    "Abs": unary(torch.abs),
    "Add": binary(operator.add),
    "And": binary(operator.and_),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Cast": _cast,
    "Ceil": unary(torch.ceil),
    "Clip": _clip,
    "Cos": unary(torch.cos),
    "Div": _divide,
    "Dropout": lambda op: op.input(0),
    "Elu": lambda op: op.emit(F.elu, op.input(0), op.get("alpha", 1.0)),
    "Equal": binary(operator.eq),
    "Erf": unary(torch.erf),
    "Exp": unary(torch.exp),
    "Floor": unary(torch.floor),
    "Gelu": lambda op: op.emit(F.gelu, op.input(0), approximate=op.get("approximate", "none")),
    "Greater": binary(operator.gt),
    "GreaterOrEqual": binary(operator.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": unary(F.hardswish),
    "Identity": lambda op: op.input(0),
    "LeakyRelu": lambda op: op.emit(F.leaky_relu, op.input(0), op.get("alpha", 0.01)),
    "Less": binary(operator.lt),
    "LessOrEqual": binary(operator.le),
    "Log": unary(torch.log),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Max": variadic(torch.maximum),
    "Mean": _mean_of_inputs,
    "Min": variadic(torch.minimum),
    "Mish": unary(F.mish),
    "Mod": _modulo,
    "Mul": binary(operator.mul),
    "Neg": unary(torch.neg),
    "Not": unary(torch.logical_not),
    "Or": binary(operator.or_),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": unary(torch.reciprocal),
    "ReduceL2": _reduce(torch.linalg.vector_norm, 2),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _mean,
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce_product,
    "ReduceSum": _reduce(torch.sum),
    "Relu": unary(torch.relu),
    "Round": unary(torch.round),
    "Selu": _selu,
    "Sigmoid": unary(torch.sigmoid),
    "Sign": unary(torch.sign),
    "Sin": unary(torch.sin),
    "Softmax": _softmax(torch.softmax),
    "Softplus": unary(F.softplus),
    "Sqrt": unary(torch.sqrt),
    "Sub": binary(operator.sub),
    "Sum": variadic(operator.add),
    "Tanh": unary(torch.tanh),
    "Where": lambda op: op.emit(torch.where, op.input(0), op.input(1), op.input(2)),
}
