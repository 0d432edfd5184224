"""TVM's RPC tracker and servers, as processes that stay up.

TVM's RPC runs whatever code it is sent and asks nobody who they are. So everything listens on
loopback unless told otherwise; docs/farm.md shows how to connect machines through SSH.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator

from ..errors import TuningError
from ..runtime import ffi
from .tracker import DEFAULT_PORT, Address

LOOPBACK = "127.0.0.1"
_TRACKER_PORTS = range(DEFAULT_PORT, DEFAULT_PORT + 10)
_SERVER_PORTS = range(9091, 9190)
_RETRY_S = 2.0
_log = logging.getLogger(__name__)


def run_tracker(host: str, port: int | None, ready: Callable[[Address], None]) -> None:
    """Be a tracker until the process ends.

    Args:
        host: where to listen.
        port: on which port; 0 for any, None for the first free one from 9190.
        ready: called with the address once it listens.

    Raises:
        TuningError: it cannot listen there.
    """
    with _listening(host, port, _TRACKER_PORTS) as sock:
        _load_runtime()
        from tvm.rpc import base, tracker

        ready(sock.getsockname()[:2])
        tracker._tracker_server(sock, base.random_key("tracker"))


def run_server(
    tracker: Address,
    key: str,
    host: str,
    port: int | None,
    ready: Callable[[Address], None],
    *,
    reachable_as: str | None = None,
    threads: int | None = None,
) -> None:
    """Be a device of a farm until the process ends, whatever candidates or the tracker do.

    Args:
        tracker: where the tracker listens.
        key: what sort of device this is.
        host: where to listen.
        port: on which port; 0 for any, None for the first free one from 9091.
        ready: called with the address once it listens.
        reachable_as: the address that those who tune find this machine by, where the tracker
            would see another.
        threads: threads that a candidate may use; by default TVM's own choice.

    Raises:
        TuningError: it cannot listen there.
    """
    folder = os.getcwd()
    with _listening(host, port, _SERVER_PORTS) as sock:
        if threads is not None:
            os.environ["TVM_NUM_THREADS"] = str(threads)
        _load_runtime()
        from tvm.rpc import server

        server.logger.setLevel(logging.WARNING)  # not a line per trial
        address = sock.getsockname()[:2]
        ready(address)
        while True:
            try:
                server._listen_loop(sock, address[1], key, tracker, "", reachable_as)
            except Exception as e:
                # TVM gives up when a candidate crashes, when the tracker stays away for a minute,
                # or when a stranger connects and sends something else. A farm must not.
                _log.warning("starting again: %s", e)
                os.chdir(folder)
                time.sleep(_RETRY_S if not _is_crash(e) else 0)


def _is_crash(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "Child process" in str(error)


def _load_runtime() -> None:
    """TVM without its compiler, which takes seconds and 300 MB more."""
    os.environ["TVM_USE_RUNTIME_LIB"] = "1"
    ffi()


@contextlib.contextmanager
def _listening(host: str, port: int | None, ports: range) -> Iterator[socket.socket]:
    tries = ports if port is None else range(port, port + 1)
    for number in tries:
        try:
            family = socket.getaddrinfo(host, number, proto=socket.IPPROTO_TCP)[0][0]
            sock = socket.create_server((host, number), family=family, backlog=64)
        except OSError as e:
            reason = e
            continue
        with sock:
            yield sock
        return
    where = f"{host}:{tries[0]}" + (f" to {tries[-1]}" if len(tries) > 1 else "")
    raise TuningError(f"cannot listen on {where}: {reason.strerror or reason}")
