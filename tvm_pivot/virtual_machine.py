"""TVM's virtual machine for a compiled network, with the network's memory bound to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from . import runtime
from .errors import PivotError
from .memory import ALIGNMENT, BIND, Array, Bytes, Memory, new_pages

_ffi = runtime.ffi()


def as_tensor(array: Array) -> Any:
    """A tensor that is the array itself, which must be writeable and begin at `ALIGNMENT`."""
    return _ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)


class Weights:
    """A network's weights as tensors, which its virtual machines share.

    Attributes:
        memory: what else the network needs.
        data: all weights in one piece.
        tensors: each of them.
    """

    def __init__(self, memory: Memory, data: Bytes) -> None:
        """Wrap `memory.weight_bytes` bytes that begin at `ALIGNMENT` and stay as they are."""
        self.memory, self.data = memory, data
        self.tensors = [as_tensor(array) for array in memory.weights_in(data)]

    def __contains__(self, address: int) -> bool:
        """Whether a weight lies at that address."""
        start: int = self.data.__array_interface__["data"][0]
        return start <= address < start + max(self.data.nbytes, 1)


def bound(memory: Memory | None, data: Bytes | None) -> Weights | None:
    """The weights of a network, if it takes any.

    Raises:
        PivotError: it does and there are none, or not of its size, or the other way round.
    """
    if memory is None and data is None:
        return None
    if memory is None or data is None or data.nbytes != memory.weight_bytes:
        raise PivotError("the weights are not those that the manifest describes")
    return Weights(memory, data)


class VirtualMachine:
    """A virtual machine, with buffers of its own for one thread.

    Attributes:
        module: the `tvm_ffi.Module` that it is, for tools that watch its calls.
        run: runs the network on tensors in the order of its inputs.
        arity: how many inputs it takes, where `main` takes nothing else; else None.
        weights: what it shares with others; None where the library holds them.
    """

    def __init__(self, module: Any, weights: Weights | None, *, cuda: bool = False) -> None:
        """Start one for the module of a compiled network.

        Raises:
            PivotError: the module has no ``main``, or takes other memory than `weights` says.
        """
        self.module, self.weights = runtime.start(module, cuda), weights
        self.arity: int | None = None
        self.run: Callable[..., Any]
        try:
            if weights is None:
                self.run = self.module["main"]
                self.arity = int(self.module["get_function_arity"]("main"))
            else:
                self.run = self._bound(weights)
        except Exception as e:  # of several types, of TVM
            what = "has no function 'main'" if weights is None else "takes other memory"
            raise PivotError(f"the library {what}: {e}") from e

    def _bound(self, weights: Weights) -> Callable[..., Any]:
        data = new_pages(weights.memory.buffer_bytes)
        buffers = map(as_tensor, weights.memory.buffers_in(data))
        closure = self.module[BIND](*weights.tensors, *buffers)
        return partial(self.module["invoke_closure"], closure)
