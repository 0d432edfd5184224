"""Timing every call that a network's virtual machine makes, inside whole runs.

A call-back reads the clock before and after each call. It is a C call-back: a Python function
would have all tensors of the call converted for it, which takes longer than many calls. What is
left of its cost in a time, about 0.2 us, is taken off: the time of the network's shortest built-in
call, which itself does next to nothing. Its effect on caches is not, so the sum of all calls can be
a few per cent off the time of a run that nothing watches.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import tvm
import tvm_ffi

from ..errors import PivotError
from ..session import Session
from ..virtual_machine import VirtualMachine, Weights
from .reference import make_inputs
from .runtimes.arrays import aligned_copy
from .runtimes.protocol import Port

_BUILTIN = "vm.builtin."
# TVMFFISafeCallType: (handle, arguments, how many, result) -> 0 for success.
_SAFE_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p
)


@dataclass(frozen=True)
class Call:
    """A call that the virtual machine makes in each run.

    Attributes:
        function: its name.
        weights: bytes of the constants that it is given, tables of a sparse layer included.
        activations: bytes of the other tensors that it is given, to read or to write.
        constants: bytes of each constant by its address.
    """

    function: str
    weights: int
    activations: int
    constants: dict[int, int] = field(repr=False)

    @property
    def builtin(self) -> bool:
        """Whether it is the virtual machine's own: allocating, freeing, reshaping."""
        return self.function.startswith(_BUILTIN)


class Watch:
    """A session, and beside it a virtual machine whose calls are timed.

    Attributes:
        calls: in the order they end; a call that makes others is not among them.
    """

    def __init__(self, session: Session) -> None:
        """Run `session` on random inputs and see what it calls.

        Raises:
            PivotError: it failed while running.
        """
        ports = tuple(Port(s.name, tuple(s.shape), s.dtype) for s in session.inputs)
        self._session = session
        self._inputs = [aligned_copy(array) for array in make_inputs(ports)[0].values()]
        self._tensors = [tvm.runtime.tensor(array) for array in self._inputs]
        session.run(*self._inputs)  # sets this thread's pool
        machine = session.virtual_machine()
        self._main = machine.run
        events = self._observe(machine)
        # Of a call that makes no other, the event that follows its beginning is its end.
        self._begins = [i for i, (a, b) in enumerate(pairwise(events)) if a.before and not b.before]
        self._events = len(events)
        begins = [events[i] for i in self._begins]
        self.calls = _calls(begins, self._tensors, events, machine.weights)
        self._stamps: list[float] = []
        machine.module.set_instrument(_clock(self._stamps))
        self._times: list[list[float]] = []

    def run(self) -> float:
        """Run three times: untimed, to find the caches warm; timed as a whole by `Session.run`,
        unwatched; and with every call timed, for `seconds`.

        Returns:
            Seconds of the second run.

        Raises:
            PivotError: the network takes another path each time.
        """
        self._session.run(*self._inputs)
        begin = time.perf_counter()
        self._session.run(*self._inputs)
        total = time.perf_counter() - begin
        self._stamps.clear()
        self._main(*self._tensors)
        if len(self._stamps) != self._events:
            raise PivotError("the network takes another path each time: its steps have no time")
        self._times.append([self._stamps[i + 1] - self._stamps[i] for i in self._begins])
        return total

    def seconds(self, runs: int) -> list[float]:
        """Median seconds of each of `calls` over the last `runs` runs."""
        found = [median(times) for times in self.times(runs)]
        cost = min((s for s, c in zip(found, self.calls, strict=True) if c.builtin), default=0.0)
        return [max(s - cost, 0.0) for s in found]

    def times(self, runs: int) -> list[tuple[float, ...]]:
        """Seconds of each of `calls` in each of the last `runs` runs."""
        return list(zip(*self._times[-runs:], strict=True))

    def _observe(self, machine: VirtualMachine) -> list[_Event]:
        """Every beginning and end of a call in one run."""
        events: list[_Event] = []

        def note(_: Any, name: str, before: bool, result: Any, *args: Any) -> None:
            tensors = [a for a in args if isinstance(a, tvm.runtime.Tensor)] if before else [result]
            sizes = {t.data_ptr(): _bytes(t) for t in tensors if isinstance(t, tvm.runtime.Tensor)}
            events.append(_Event(str(name), bool(before), sizes))

        machine.module.set_instrument(note)
        self._main(*self._tensors)
        return events


@dataclass(frozen=True)
class _Event:
    """The beginning or end of a call, with the bytes of its arguments or its result by address."""

    function: str
    before: bool
    tensors: dict[int, int]


def _calls(
    begins: Sequence[_Event],
    inputs: Sequence[Any],
    events: Sequence[_Event],
    weights: Weights | None,
) -> tuple[Call, ...]:
    """Where the library holds its weights, they are what is neither an input nor any call's result
    (a kernel's output is one of the calls that allocate)."""
    made = {tensor.data_ptr() for tensor in inputs}
    made.update(address for event in events if not event.before for address in event.tensors)
    calls = []
    for event in begins:
        constants = {
            at: size
            for at, size in event.tensors.items()
            if (at not in made if weights is None else at in weights)
        }
        held = sum(constants.values())
        activations = sum(event.tensors.values()) - held
        calls.append(Call(event.function, held, activations, constants))
    return tuple(calls)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.dtype.itemsize)


def _clock(stamps: list[float]) -> Any:
    """An instrument that appends the time to `stamps`.

    It refers to nothing else: Python could not free a cycle through the virtual machine.
    """
    append: Callable[[float], None] = stamps.append
    now = time.perf_counter

    def stamp(*_: Any) -> int:
        append(now())
        return 0

    callback = _SAFE_CALL(stamp)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    return tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=callback)
