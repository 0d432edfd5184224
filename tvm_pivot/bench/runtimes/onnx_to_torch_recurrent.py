"""Translations of ONNX LSTM and GRU to torch's modules, which order their gates differently."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .onnx_to_torch_graph import Operator, Value, shape

# Where each of torch's gates is in ONNX. LSTM: ifgo from iofc; GRU: rzn from zrh.
_LSTM_GATES, _LSTM_ACTIVATIONS = (0, 2, 3, 1), ("Sigmoid", "Tanh", "Tanh")
_GRU_GATES, _GRU_ACTIVATIONS = (1, 0, 2), ("Sigmoid", "Tanh")


def _lstm(op: Operator) -> Any:
    peepholes = op.constant(7)
    if op.get("input_forget", 0) or (peepholes is not None and bool(peepholes.any())):
        raise op.unsupported("peepholes and coupled gates")
    _check(op, _LSTM_ACTIVATIONS)
    x, module = _module(op, nn.LSTM, _LSTM_GATES)
    # torch's states have the batch second whatever the layout is.
    states = [_state(op, index) for index in (5, 6)]
    given = [_batch_second(op, s) for s in states if s is not None]
    if len(given) == 1:
        raise op.unsupported("only one of the initial states")
    result = op.builder.emit_module(module, x, *([tuple(given)] if given else []))
    last = op.emit(operator.getitem, result, 1)
    sequence = _sequence(op, op.emit(operator.getitem, result, 0))
    ends = (_batch_second(op, op.emit(operator.getitem, last, index)) for index in range(2))
    return (sequence, *ends)


def _gru(op: Operator) -> Any:
    if not op.get("linear_before_reset", 0):
        raise op.unsupported("linear_before_reset = 0, which torch does not compute")
    _check(op, _GRU_ACTIVATIONS)
    x, module = _module(op, nn.GRU, _GRU_GATES)
    state = _state(op, 5)
    given = [] if state is None else [_batch_second(op, state)]
    result = op.builder.emit_module(module, x, *given)
    last = _batch_second(op, op.emit(operator.getitem, result, 1))
    return _sequence(op, op.emit(operator.getitem, result, 0)), last


def _check(op: Operator, activations: tuple[str, ...]) -> None:
    """Refuse what torch's modules cannot do."""
    directions = 2 if op.get("direction", "forward") == "bidirectional" else 1
    if tuple(op.get("activations", activations * directions)) != activations * directions:
        raise op.unsupported(f"activations {op.get('activations')}")
    if "clip" in op.attributes:
        raise op.unsupported("clip")
    lengths = op.ints(4)
    if lengths is not None and set(lengths) != {
        shape(op.input(0))[1 if op.get("layout", 0) else 0]
    }:
        raise op.unsupported("sequences of different lengths")


def _module(
    op: Operator, cell: type[nn.LSTM] | type[nn.GRU], gates: tuple[int, ...]
) -> tuple[Value, nn.Module]:
    """The input as the module is to see it, and the module."""
    weights = [op.constant(index) for index in (1, 2, 3)]
    if weights[0] is None or weights[1] is None:
        raise op.unsupported("no weights")
    hidden, direction = shape(weights[1])[-1], op.get("direction", "forward")
    module = cell(
        shape(weights[0])[-1],
        hidden,
        bias=weights[2] is not None,
        batch_first=bool(op.get("layout", 0)),
        bidirectional=direction == "bidirectional",
    ).requires_grad_(False)
    order = [gate * hidden + i for gate in gates for i in range(hidden)]
    for number, suffix in enumerate(("l0", "l0_reverse")[: shape(weights[0])[0]]):
        for name, tensor in zip(("weight_ih", "weight_hh"), weights[:2], strict=True):
            _set(module, f"{name}_{suffix}", tensor, number, order)
        if weights[2] is not None:
            half = len(order)
            for name, part in (
                ("bias_ih", weights[2][:, :half]),
                ("bias_hh", weights[2][:, half:]),
            ):
                _set(module, f"{name}_{suffix}", part, number, order)
    x = op.input(0)
    if direction == "reverse":
        x = op.emit(torch.flip, x, (1 if op.get("layout", 0) else 0,))
    return x, module.eval()


def _set(
    module: nn.Module, name: str, tensor: Tensor | None, direction: int, order: list[int]
) -> None:
    assert tensor is not None
    module.get_parameter(name).copy_(tensor[direction][order])


def _state(op: Operator, index: int) -> Value | None:
    """An initial state; None for zeros, which torch assumes."""
    state = op.optional(index)
    if isinstance(state, Tensor) and not bool(state.any()):
        return None
    return state


def _batch_second(op: Operator, state: Value) -> Any:
    """Swap batch and direction of a state where the operator has the batch first."""
    return op.emit(torch.transpose, state, 0, 1) if op.get("layout", 0) else state


def _sequence(op: Operator, y: Value) -> Any:
    """[T, N, D*H] -> [T, D, N, H], or [N, T, D*H] -> [N, T, D, H] where the batch is first."""
    directions = 2 if op.get("direction", "forward") == "bidirectional" else 1
    first, second, width = shape(y)
    batch_first = op.get("layout", 0)
    if op.get("direction", "forward") == "reverse":
        y = op.emit(torch.flip, y, (1 if batch_first else 0,))
    if directions == 1 and not batch_first:
        return op.emit(torch.reshape, y, (first, 1, second, width))
    split = op.emit(torch.reshape, y, (first, second, directions, width // directions))
    return split if batch_first else op.emit(torch.permute, split, (0, 2, 1, 3))


RECURRENT: dict[str, Callable[[Operator], Any]] = {"GRU": _gru, "LSTM": _lstm}
