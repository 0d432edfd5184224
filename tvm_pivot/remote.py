"""Running a compiled network on another machine, over TVM's RPC.

The other machine runs ``tvm-pivot farm server`` or ``python -m tvm.exec.rpc_server``. Whoever can
reach such a server can run any code there: use it on a network of your own, or through SSH.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PivotError
from .memory import BIND, Array, Bytes, Memory

if TYPE_CHECKING:
    from .manifest import Manifest

_LIBRARY = "network.so"
# A first run under emulation takes long; a device that is gone should be noticed all the same.
_SECONDS = 600


@dataclass(frozen=True)
class Address:
    """Of an RPC server, or of a tracker that knows servers by a key."""

    host: str
    port: int
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """From ``host:port`` of a server, or ``host:port/key`` of a tracker and a key.

        Raises:
            PivotError: it is neither.
        """
        place, _, key = text.partition("/")
        host, _, port = place.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise PivotError(f"{text!r} is no address: write host:port, or host:port/key")
        return cls(host.strip("[]"), int(port), key)


class RemoteNetwork:
    """A network that was sent to another machine, ready to run there."""

    def __init__(
        self, address: str, library: Any, manifest: Manifest, weights: Bytes | None
    ) -> None:
        """Connect and send the library and its weights.

        Args:
            address: see `Address.parse`.
            library: a `relax.VMExecutable`, or the path of a library.
            manifest: describes it.
            weights: see `artifact.save`.

        Raises:
            ArtifactError: the library cannot be linked.
            PivotError: no server answers there, or it cannot load the library.
        """
        from tvm import relax

        from .artifact import linked

        self._address = address
        session = _connect(Address.parse(address), address)
        with tempfile.TemporaryDirectory(prefix="tvm-pivot-") as scratch:
            if not isinstance(library, Path):
                library = linked(library, manifest.target, Path(_LIBRARY), Path(scratch))
            try:
                session.upload(str(library), target=_LIBRARY)
                self._device = session.cpu(0)
                self._machine = relax.VirtualMachine(session.load_module(_LIBRARY), self._device)
                self._entry, self._bound = self._bind(manifest.memory, weights)
            except Exception as error:  # of the other machine, as text
                raise self._failed("load the network", error) from error

    def run(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """The outputs for inputs in the network's order, of its shapes and dtypes.

        Raises:
            PivotError: the connection broke, or the network failed there.
        """
        try:
            result = self._machine.module[self._entry](*self._bound, *self._sent(arrays))
            several = not hasattr(result, "numpy")
            return tuple(one.numpy() for one in result) if several else (result.numpy(),)
        except Exception as error:
            raise self._failed("run the network", error) from error

    def times(self, arrays: Sequence[Array], repeat: int) -> tuple[float, ...]:
        """Seconds of each of `repeat` runs, by the other machine's clock.

        Raises:
            PivotError: as `run`.
        """
        try:
            module = self._machine.module
            timed = module.time_evaluator(self._entry, self._device, number=1, repeat=repeat)
            return tuple(map(float, timed(*self._bound, *self._sent(arrays)).results))
        except Exception as error:
            raise self._failed("time the network", error) from error

    def _bind(self, memory: Memory | None, weights: Bytes | None) -> tuple[str, tuple[Any, ...]]:
        """The function that runs the network there, and what it takes before the inputs."""
        if memory is None or weights is None:
            return "main", ()
        import tvm

        sent = self._sent(memory.weights_in(weights))
        buffers = [tvm.runtime.empty((n,), "uint8", self._device) for n in memory.buffers]
        # Over RPC a function sees tensors for as long as a call takes; inputs that are set stay.
        self._machine.set_input(BIND, *sent, *buffers)
        self._machine.invoke_stateful(BIND)
        return "invoke_closure", (self._machine.get_outputs(BIND),)

    def _sent(self, arrays: Sequence[Array]) -> list[Any]:
        import tvm

        return [tvm.runtime.tensor(np.ascontiguousarray(x), self._device) for x in arrays]

    def _failed(self, what: str, error: Exception) -> PivotError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return PivotError(f"{self._address} could not {what}: {lines[-1]}")


def _connect(address: Address, text: str) -> Any:
    from tvm import rpc

    try:
        if not address.key:
            return rpc.connect(address.host, address.port, session_timeout=_SECONDS)
        tracker = rpc.connect_tracker(address.host, address.port)
        return tracker.request(address.key, session_timeout=_SECONDS)
    except Exception as error:  # several types, of sockets and of TVM
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PivotError(f"no RPC server answers at {text}: {lines[-1]}") from error
