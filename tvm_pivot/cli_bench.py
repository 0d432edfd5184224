"""``tvm-pivot bench``: several runtimes on the same model, in one run, outputs checked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_common import Shapes, errors, messages, parse_shapes, phases
from .errors import InputError

if TYPE_CHECKING:
    from .bench.models import ModelInput
    from .bench.results import Comparison, PerLayer

DEFAULT_RUNTIMES = (
    "pivot,pivot-dense,onnxruntime,openvino,openvino-sparse,mnn,mnn-sparse,litert,deepsparse"
)
_ALL = "all"
# A table that nobody reads on a terminal need not fit one.
_WIDTH_OF_FILES = 140

Models = Annotated[
    list[Path] | None,
    typer.Argument(help="ONNX files. Variants of one network may be compared.", show_default=False),
]


def bench(
    context: typer.Context,
    models: Models = None,
    runtimes: Annotated[
        str,
        typer.Option(
            help="Runtimes by name (see --list), 'all', or an adapter of your own: file.py:Class."
        ),
    ] = DEFAULT_RUNTIMES,
    threads: Annotated[str, typer.Option(help="Numbers of threads, e.g. 1,2.")] = "1",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp32,bf16.")] = "fp32",
    shape: Shapes = None,
    rounds: Annotated[
        int, typer.Option(min=2, help="Turns of each runtime; they take turns.")
    ] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.", show_default=False)
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report here.", show_default=False)
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Show each layer's time beside its limit.")
    ] = False,
    rpc: Annotated[
        str | None,
        typer.Option(
            help="Time tvm_pivot alone, on another machine: an RPC server, host:port, or a "
            "tracker, host:port/key.",
            metavar="ADDRESS",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="With --rpc: what that machine is.")
    ] = "arm",
    show: Annotated[
        bool, typer.Option("--list", help="List the runtimes and which are installed.")
    ] = False,
    install: Annotated[
        str | None,
        typer.Option(help="Install these runtimes, then stop.", metavar="NAMES"),
    ] = None,
) -> None:
    """Compare runtimes on a model: same file, same run, outputs checked before times count."""
    with errors(context):
        if install is not None:
            _install(_split(install, "--install"))
        elif show:
            _list()
        elif not models:
            raise InputError("name an ONNX file to compare runtimes on, or --list, or --install")
        elif rpc is not None:
            with TemporaryDirectory(prefix="tvm_pivot_bench_") as scratch:
                _on_device(_read(models, parse_shapes(shape), Path(scratch)), target, rpc, rounds)
        else:
            for file in (json_file, html_file):  # before minutes of measuring, not after
                if file is not None and not file.parent.is_dir():
                    raise InputError(f"cannot write {file}: there is no directory {file.parent}")
            names = _split(runtimes, "--runtimes")
            counts = [_count(text) for text in _split(threads, "--threads")]
            precisions = _split(precision, "--precision")
            with TemporaryDirectory(prefix="tvm_pivot_bench_") as scratch:
                named = _read(models, parse_shapes(shape), Path(scratch))
                found = _compare(named, names, counts, precisions, rounds)
                if per_layer:
                    found = replace(found, per_layer=_per_layer(named, counts))
                _show(found, named, json_file, html_file)


def _read(models: Sequence[Path], shapes: Any, folder: Path) -> list[ModelInput]:
    """The models, with static shapes, under names of their own."""
    from .bench.measure import name_models
    from .bench.static_shapes import with_static_shapes

    return [
        replace(model, path=with_static_shapes(model.path, shapes, folder / str(i)))
        for i, model in enumerate(name_models(models))
    ]


def _compare(
    models: Sequence[ModelInput],
    runtimes: Sequence[str],
    threads: Sequence[int],
    precisions: Sequence[str],
    rounds: int,
) -> Comparison:
    from .bench import measure
    from .bench.runtimes import ADAPTERS

    with phases("starting") as progress:
        return measure.compare(
            models,
            list(ADAPTERS) if list(runtimes) == [_ALL] else runtimes,
            threads=threads,
            precisions=precisions,
            plan=measure.Plan(rounds=rounds),
            progress=progress,
            command=shlex.join(["tvm-pivot", *sys.argv[1:]]),
        )


def _on_device(models: Sequence[ModelInput], target: str, address: str, rounds: int) -> None:
    from .bench import on_device

    found = []
    with phases("starting") as progress:
        for model in models:
            found += on_device.measure(
                Path(model.path), model.name, target, address, rounds, progress
            )
    _console().print(on_device.table(found))


def _show(
    found: Comparison,
    models: Sequence[ModelInput],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    from .bench import table

    table.show(found, _console())
    if json_file is not None:
        found.save(json_file)
        typer.echo(f"wrote {json_file}")
    if html_file is not None:
        from .bench.html import write_html
        from .bench.patterns import pattern_pictures

        pictures = [picture for model in models for picture in pattern_pictures(model.path)]
        write_html(found, html_file, pictures)
        typer.echo(f"wrote {html_file}")


def _per_layer(models: Sequence[ModelInput], threads: Sequence[int]) -> tuple[PerLayer, ...]:
    from .bench.per_layer import profile
    from .bench.roofline import measure_roofline

    rooflines = [measure_roofline(count) for count in threads]
    return tuple(
        profile(model.path, roofline.threads, roofline=roofline, name=model.name)
        for model in models
        for roofline in rooflines
    )


def _install(names: Sequence[str]) -> None:
    from .bench import environments

    environments.install(names, messages.print)


def _list() -> None:
    from .bench import table

    table.show_runtimes(_console())


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_OF_FILES)


def _split(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) != len(words):
        raise InputError(f"{option} {text}: write different names, with commas between them")
    return words


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--threads {text}: write whole numbers from 1, e.g. 1,2")
    return int(text)
