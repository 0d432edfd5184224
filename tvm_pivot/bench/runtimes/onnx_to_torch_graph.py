"""A torch.fx graph under construction, and one ONNX operator as its translators see it.

What depends on no input of the network is computed at once instead of being written into the
graph: so weights are transposed and shape arithmetic disappears without a pass for either.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from .protocol import UnsupportedModelError

# A constant, or a step of the graph; a step's meta["val"] is its result on the device "meta".
Value: TypeAlias = Tensor | fx.Node


class Builder:
    """Writes a torch.fx graph step by step and knows the shape of each step's result.

    Attributes:
        graph: the steps so far.
        attributes: the constants and modules that the graph refers to, by name.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor | nn.Module] = {}
        self._names: dict[int, str] = {}
        self._seen: list[Tensor] = []

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
        """Append an input of the network."""
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return node

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Append a call, or make it now where no argument is a step of the graph.

        Args:
            function: takes and returns tensors, or tuples of them.
            args: its arguments: steps and constants, also inside lists, tuples and slices.
            kwargs: the same.

        Returns:
            The step, or what the function returned.
        """
        if not _has_step((args, kwargs)):
            with torch.no_grad():
                return function(*args, **kwargs)
        node = self.graph.call_function(function, self._steps(args), self._steps(kwargs))
        node.meta["val"] = function(*_without_data(node.args), **_without_data(node.kwargs))
        return node

    def emit_method(self, method: str, value: Value, *args: Any) -> Any:
        """Append a call of a tensor's method, or make it now. `args` are no tensors."""
        if isinstance(value, Tensor):
            return getattr(value, method)(*args)
        node = self.graph.call_method(method, (value, *args))
        node.meta["val"] = getattr(value.meta["val"], method)(*args)
        return node

    def emit_module(self, module: nn.Module, *args: Any) -> fx.Node:
        """Append a call of a module, which becomes part of the network."""
        name = f"module_{len(self.attributes)}"
        self.attributes[name] = module
        node = self.graph.call_module(name, self._steps(args))
        node.meta["val"] = copy.deepcopy(module).to("meta")(*_without_data(node.args))
        return node

    def constant(self, tensor: Tensor) -> fx.Node:
        """Append a step that fetches `tensor`, which is stored once however often it is used."""
        name = self._names.get(id(tensor))
        if name is None:
            name = self._names[id(tensor)] = f"constant_{len(self.attributes)}"
            self._seen.append(tensor)  # so that its id stays its own
            self.attributes[name] = _stored(tensor)
        node = self.graph.get_attr(name)
        node.meta["val"] = torch.empty_like(tensor, device="meta")
        return node

    def output(self, values: Sequence[Value]) -> None:
        """End the graph: it returns one tensor, or a tuple of them."""
        steps = self._steps(tuple(values))
        self.graph.output(steps[0] if len(steps) == 1 else steps)

    def value_of(self, step: Any) -> Tensor | None:
        """The tensor that a step fetches; None for anything else."""
        if isinstance(step, fx.Node) and step.op == "get_attr":
            found = self.attributes[str(step.target)]
            return found.detach() if isinstance(found, Tensor) else None
        return None

    def module(self) -> fx.GraphModule:
        """The graph as a module, with what it refers to and nothing else."""
        # fx asks the module, which is not made yet, whether calls of modules matter.
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        return fx.GraphModule(dict(self.attributes), self.graph, "OnnxModule").eval()

    def _steps(self, args: Any) -> Any:
        return map_aggregate(args, lambda a: self.constant(a) if isinstance(a, Tensor) else a)


def _stored(tensor: Tensor) -> Tensor:
    """A tensor as a module keeps it: with memory of its own size, a parameter if it can be one."""
    tensor = tensor.detach().contiguous()
    if tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.clone()
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


def _has_step(args: Any) -> bool:
    found: list[fx.Node] = []
    map_aggregate(args, lambda a: found.append(a) if isinstance(a, fx.Node) else None)
    return bool(found)


def _without_data(args: Any) -> Any:
    return map_aggregate(args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)


@dataclass(frozen=True)
class Operator:
    """One ONNX node.

    Attributes:
        type: e.g. ``"Conv"``.
        name: in the file, for messages.
        opset: version of the standard operators.
        inputs: None where an optional one is left out.
        outputs: how many the node has.
        attributes: by name, as Python values and tensors.
        builder: where to write its translation.
    """

    type: str
    name: str
    opset: int
    inputs: tuple[Value | None, ...]
    outputs: int
    attributes: Mapping[str, Any]
    builder: Builder

    def emit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See `Builder.emit`."""
        return self.builder.emit(function, *args, **kwargs)

    def cast(self, value: Value, wanted: torch.dtype) -> Any:
        """`value` in another dtype."""
        return self.builder.emit_method("to", value, wanted)

    def unsupported(self, reason: str) -> UnsupportedModelError:
        """The error to raise for a use of the operator that is not translated."""
        return UnsupportedModelError(f"{self.type} {self.name!r}: {reason}")

    def get(self, attribute: str, default: Any = None) -> Any:
        """The value of an attribute."""
        return self.attributes.get(attribute, default)

    def optional(self, index: int) -> Value | None:
        """An input, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def input(self, index: int) -> Value:
        """An input that the operator cannot do without."""
        value = self.optional(index)
        if value is None:
            raise self.unsupported(f"input {index} is missing")
        return value

    def constant(self, index: int) -> Tensor | None:
        """An input that must not depend on the network's inputs; None where it is left out."""
        value = self.optional(index)
        if isinstance(value, fx.Node):
            raise self.unsupported(f"input {index} is not constant")
        return value

    def ints(self, index: int, attribute: str = "") -> list[int] | None:
        """Integers that are an attribute in old opsets and an input in new ones."""
        if attribute in self.attributes:
            return [int(i) for i in self.attributes[attribute]]
        value = self.constant(index)
        return None if value is None else [int(i) for i in value.flatten().tolist()]

    def number(self, index: int) -> Any:
        """The value of a constant input of one element; None where it is left out."""
        value = self.constant(index)
        return None if value is None else value.item()

    def axis(self, axis: int, rank: int) -> int:
        """`axis` counted from the front."""
        if not -rank <= axis < max(rank, 1):
            raise self.unsupported(f"axis {axis} of a tensor of rank {rank}")
        return axis % rank if rank else 0


def shape(value: Value) -> tuple[int, ...]:
    """The static shape of a constant or of a step's result."""
    return tuple((value if isinstance(value, Tensor) else value.meta["val"]).shape)


def dtype(value: Value) -> torch.dtype:
    """The dtype of a constant or of a step's result."""
    found: torch.dtype = (value if isinstance(value, Tensor) else value.meta["val"]).dtype
    return found


def is_float(value: Value) -> bool:
    """Whether a constant or a step's result has a floating-point dtype."""
    return dtype(value).is_floating_point


def tensor(array: npt.NDArray[Any]) -> Tensor:
    """A torch tensor with a copy of an array's values.

    Raises:
        UnsupportedModelError: torch has no such dtype.
    """
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise UnsupportedModelError(f"constants of type {array.dtype}") from error


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a NumPy dtype's name.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedModelError(f"tensors of type {name}")
    return found
