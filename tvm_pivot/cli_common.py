"""What the commands of the command line share: options, messages, errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from .errors import InputError, PivotError

messages = Console(stderr=True)

Model = Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)]
Target = Annotated[
    str, typer.Option("--target", "-t", help="Machine to compile for: x86 is this one.")
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision", help="float32; newer ARM cores: float16; GPUs: float16, bfloat16, tf32."
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        help="Size of an open dimension (batch=1) or shape of an input (x=1x3x224x224). Repeat it.",
    ),
]
PivotSeconds = Annotated[
    float,
    typer.Option(
        "--pivot-seconds", min=0.0, help="For the search for orders of rows that make blocks."
    ),
]
Log = Annotated[
    Path | None, typer.Option("--log", "-l", help="Use the records of this tuning log too.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads; default: one per physical core.")
]


def parse_shapes(texts: list[str] | None) -> dict[str, int | tuple[int, ...]] | None:
    """``["batch=1", "x=1x3x224x224"]`` as ``{"batch": 1, "x": (1, 3, 224, 224)}``.

    Raises:
        InputError: one of them is not written like that.
    """
    found: dict[str, int | tuple[int, ...]] = {}
    for text in texts or ():
        name, _, sizes = text.rpartition("=")
        numbers = sizes.split("x")
        if not name or not all(n.isdecimal() for n in numbers):
            raise InputError(f"--shape {text}: write batch=1 or x=1x3x224x224")
        found[name] = int(sizes) if len(numbers) == 1 else tuple(map(int, numbers))
    return found or None


@contextmanager
def phases(first: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that names the current phase; silent where stderr is no terminal."""
    if not messages.is_terminal:
        yield lambda phase: None
        return
    with messages.status(first) as status:
        yield lambda phase: status.update(phase)


def print_json(data: Any) -> None:
    """Write `data` to stdout as JSON.

    Raises:
        ValueError: a number that JSON does not have.
    """
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


@contextmanager
def errors(context: typer.Context) -> Iterator[None]:
    """Print a PivotError as one line on stderr and exit with 1; ``--debug`` lets it through."""
    try:
        yield
    except PivotError as e:
        if context.obj:
            raise
        fail(str(e))


def fail(message: str) -> NoReturn:
    """Exit with 1 after one line on stderr."""
    typer.echo(f"tvm-pivot: {' '.join(message.split())}", err=True)
    raise typer.Exit(1)
