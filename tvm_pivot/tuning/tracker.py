"""Talking to TVM's RPC tracker: which devices there are, and one of them for a while.

The protocol is TVM's (`tvm.rpc.tracker`): a length and JSON. This client waits no longer than it is
told to, and does not need TVM.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, TuningError

# As in tvm.rpc.base; tests compare them.
TRACKER_MAGIC = 0x2F271
SERVER_MAGIC = 0xFF271
SUCCESS, REQUEST, SUMMARY = 0, 4, 6

DEFAULT_PORT = 9190
_MAX_MESSAGE = 1 << 20
Address = tuple[str, int]


@dataclass(frozen=True)
class Lease:
    """A device that the tracker has given out: where it listens, and the word that lets one in."""

    host: str
    port: int
    password: str

    @property
    def device(self) -> str:
        """The device's name, which stays the same from lease to lease."""
        return f"{self.host}:{self.port}"

    def give_back(self, timeout: float = 5.0) -> None:
        """Return a device that is not needed after all: a session that ends at once."""
        with contextlib.suppress(OSError, struct.error):  # then it is gone, or finds out by itself
            sock = socket.create_connection((self.host, self.port), timeout)
            with sock:
                word = f"client:{self.password}".encode()
                sock.sendall(struct.pack("<ii", SERVER_MAGIC, len(word)) + word)
                # All of the answer: closing with some of it unread would be an error over there.
                _, size = struct.unpack("<ii", _receive(sock, 8))
                _receive(sock, min(size, _MAX_MESSAGE))


@dataclass(frozen=True)
class DeviceStatus:
    """A device as the tracker knows it."""

    key: str
    address: str


@dataclass(frozen=True)
class QueueStatus:
    """The devices of one key: how many there are, are free, and are waited for."""

    key: str
    devices: int
    free: int
    waiting: int


@dataclass(frozen=True)
class FarmStatus:
    """What a tracker knows."""

    devices: tuple[DeviceStatus, ...]
    queues: tuple[QueueStatus, ...]

    def count(self, key: str) -> int:
        """How many devices have this key."""
        return sum(device.key == key for device in self.devices)


def parse_address(text: str, default_port: int = DEFAULT_PORT) -> Address:
    """``"host:port"`` or ``"host"`` in two parts.

    Raises:
        InputError: it is written otherwise.
    """
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(default_port)
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"{text!r} is no address: write host:port, e.g. 127.0.0.1:{DEFAULT_PORT}")
    return host, int(port)


def status(address: Address, timeout: float = 10.0) -> FarmStatus:
    """What the tracker at this address knows.

    Raises:
        TuningError: nothing answers there, or no tracker.
    """
    answer = _ask(address, [SUMMARY], timeout)
    try:
        servers = [(s["key"].partition(":")[2], s["addr"]) for s in answer["server_info"]]
        devices = sorted((key, f"{host}:{port}") for key, (host, port) in servers)
        queues = [
            QueueStatus(key, sum(key == k for k, _ in devices), int(q["free"]), int(q["pending"]))
            for key, q in sorted(answer["queue_info"].items())
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise TuningError(f"{_shown(address)} is no tracker of this version of TVM: {e!r}") from e
    return FarmStatus(tuple(DeviceStatus(*device) for device in devices), tuple(queues))


def request(address: Address, key: str, timeout: float) -> Lease | None:
    """A device with this key as soon as one is free; None if none is for `timeout` seconds.

    Raises:
        TuningError: the tracker cannot be reached.
    """
    try:
        host, port, password = _ask(address, [REQUEST, key, "", 1], timeout)
        return Lease(str(host), int(port), str(password))
    except _NoAnswerError:
        return None
    except (TypeError, ValueError) as e:
        raise TuningError(f"{_shown(address)} is no tracker of this version of TVM: {e!r}") from e


class _NoAnswerError(TuningError):
    """The tracker is there and has not answered in time."""


def _ask(address: Address, message: list[Any], timeout: float) -> Any:
    with _connected(address, timeout) as sock:
        data = json.dumps(message).encode()
        sock.sendall(struct.pack("<i", len(data)) + data)
        sock.settimeout(timeout)
        try:
            (size,) = struct.unpack("<i", _receive(sock, 4))
        except TimeoutError as e:
            raise _NoAnswerError(f"the tracker at {_shown(address)} does not answer") from e
        if not 0 < size <= _MAX_MESSAGE:
            raise TuningError(f"{_shown(address)} sends no message of a tracker")
        answer = json.loads(_receive(sock, size))
    if not isinstance(answer, list) or len(answer) != 2 or answer[0] != SUCCESS:
        raise TuningError(f"the tracker at {_shown(address)} refuses: {answer!r:.80}")
    return answer[1]


@contextlib.contextmanager
def _connected(address: Address, timeout: float) -> Iterator[socket.socket]:
    try:
        with socket.create_connection(address, timeout) as sock:
            sock.settimeout(min(timeout, 10.0))
            sock.sendall(struct.pack("<i", TRACKER_MAGIC))
            if struct.unpack("<i", _receive(sock, 4)) != (TRACKER_MAGIC,):
                raise TuningError(f"what listens at {_shown(address)} is no tracker")
            yield sock
    except (OSError, ValueError) as e:
        raise TuningError(
            f"no tracker can be reached at {_shown(address)} ({e}); "
            "start one with tvm-pivot farm tracker"
        ) from e


def _receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (got := sock.recv(size - len(data))):
            raise ConnectionResetError("the connection was closed")
        data += got
    return bytes(data)


def _shown(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
