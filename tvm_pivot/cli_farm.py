"""``tvm-pivot farm``: machines to measure candidates on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .cli_common import AsJson, Threads, errors, print_json
from .errors import InputError

LOOPBACK = "127.0.0.1"

farm = typer.Typer(
    help="Measure on other machines. TVM's RPC runs any code it is sent: use it behind SSH only.",
    no_args_is_help=True,
)

Host = Annotated[
    str, typer.Option(help="Where to listen. Anyone who can connect there can run code here.")
]
TrackerAddress = Annotated[str, typer.Option("--tracker", help="The tracker, host:port.")]


@farm.command()
def tracker(
    context: typer.Context,
    host: Host = LOOPBACK,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: the first free one from 9190.")
    ] = None,
) -> None:
    """Know the devices of a farm and give them out. One per farm; runs until Ctrl-C."""
    with errors(context):
        from .tuning.farm import run_tracker

        _until_interrupted(lambda: run_tracker(host, port, _announce("tracker", host)))


@farm.command()
def server(
    context: typer.Context,
    tracker: TrackerAddress,
    key: Annotated[str, typer.Option(help="What sort of device this is, e.g. zen4.")],
    host: Host = LOOPBACK,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: the first free one from 9091.")
    ] = None,
    reachable_as: Annotated[
        str | None,
        typer.Option(help="Address that others find this machine by, if the tracker sees another."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Offer this machine to a farm. Runs until Ctrl-C."""
    with errors(context):
        from .tuning.farm import run_server
        from .tuning.tracker import parse_address, status

        if not key or ":" in key or key.split() != [key]:
            raise InputError(f"--key {key!r}: a word without colons is needed")
        address = parse_address(tracker)
        status(address)  # a wrong address is told at once; later the tracker may come and go
        ready = _announce(f"device {key!r}", host)
        _until_interrupted(
            lambda: run_server(
                address, key, host, port, ready, reachable_as=reachable_as, threads=threads
            )
        )


@farm.command()
def status(
    context: typer.Context,
    tracker: TrackerAddress = f"{LOOPBACK}:9190",
    as_json: AsJson = False,
) -> None:
    """Show the devices of a farm, and how many are free or waited for."""
    with errors(context):
        from .tuning.tracker import parse_address
        from .tuning.tracker import status as ask

        found = ask(parse_address(tracker))
        if as_json:
            print_json(asdict(found))
            return
        table = Table("key", "devices", "free", "waited for", "addresses")
        for queue in found.queues:
            addresses = [device.address for device in found.devices if device.key == queue.key]
            sizes = map(str, (queue.devices, queue.free, queue.waiting))
            table.add_row(queue.key, *sizes, ", ".join(addresses))
        Console().print(table if found.queues else "no devices yet")


def _announce(what: str, host: str) -> Callable[[tuple[str, int]], None]:
    def ready(address: tuple[str, int]) -> None:
        typer.echo(f"{what} at {address[0]}:{address[1]}")
        if host not in (LOOPBACK, "::1", "localhost"):
            typer.echo(f"anyone who can reach {host} can now run code on this machine", err=True)

    return ready


def _until_interrupted(run: Callable[[], None]) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        run()
