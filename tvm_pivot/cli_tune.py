"""``tvm-pivot tune``: search for faster kernels of a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import (
    AsJson,
    PivotSeconds,
    Precision,
    Shapes,
    Target,
    errors,
    messages,
    parse_shapes,
    print_json,
)
from .errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from .tuning.tuner import TuneReport


def tune(
    context: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="An ONNX file.", show_default=False)] = None,
    log: Annotated[
        Path | None, typer.Option("--log", "-l", help="Add records to this file (.jsonl).")
    ] = None,
    target: Target = "x86",
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Candidates in all; default: 32 per kind of layer."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.0, help="Stop after so long.")
    ] = None,
    shape: Shapes = None,
    precision: Precision = "float32",
    pivot_seconds: PivotSeconds = 2.0,
    tracker: Annotated[
        str | None, typer.Option("--tracker", help="Measure on a farm: its tracker, host:port.")
    ] = None,
    key: Annotated[str, typer.Option("--key", help="Which devices of the farm.")] = "",
    batch_out: Annotated[
        Path | None,
        typer.Option(
            "--batch-out",
            help="For a GPU elsewhere: build candidates into this folder; measure.py in it "
            "measures them there.",
        ),
    ] = None,
    batch_in: Annotated[
        Path | None,
        typer.Option("--batch-in", help="Add what measure.py wrote (results.json) to the log."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", help="Write the best record of each layer, and a few to learn from, here."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure candidates for every layer, and keep the fastest. Ctrl-C keeps what is known."""
    with errors(context):
        _check(model, log, batch_out, (batch_in, export))
        assert log is not None
        found: dict[str, Any] = {}
        how = {
            "target": target,
            "trials": trials,
            "shapes": parse_shapes(shape),
            "precision": precision,
            "pivot_seconds": pivot_seconds,
        }
        if batch_in is not None:
            found = _read_batch(batch_in, log, as_json)
        if batch_out is not None:
            found |= _write_batch(model, log, batch_out, as_json, how)
        elif model is not None and batch_in is None:
            runner = _runner(tracker, key)
            found = _tune(model, log, as_json, minutes=minutes, runner=runner, **how)
        if export is not None:
            count = _export(log, export)
            found["exported"] = count
            if not as_json:
                typer.echo(f"wrote {count} records to {export}")
        if as_json:
            print_json(found)


def _check(
    model: Path | None, log: Path | None, batch_out: Path | None, others: tuple[Path | None, ...]
) -> None:
    if log is None or (model is None and not any(others)):
        raise InputError("say which model to tune, and with --log where to keep records")
    if batch_out is not None and model is None:
        raise InputError("--batch-out needs the model to build candidates of")


def _write_batch(
    model: Path | None, log: Path, folder: Path, as_json: bool, how: dict[str, Any]
) -> dict[str, Any]:
    from .tuning.batch import write_batch

    report = write_batch(str(model), folder=folder, log=log, **how)
    if not as_json:
        typer.echo(
            f"{report}\n\ncopy the folder to the machine with the GPU, and there: "
            f"python measure.py\nthen here: tvm-pivot tune --log {log} --batch-in results.json"
        )
    return {"folder": str(folder), "candidates": sum(report.candidates), "failed": report.failed}


def _read_batch(results: Path, log: Path, as_json: bool) -> dict[str, Any]:
    from .tuning.batch_results import read_batch

    return _shown(read_batch(results, log), log, as_json)


def _tune(model: Path, log: Path, as_json: bool, **how: Any) -> dict[str, Any]:
    import tvm_pivot

    with _progress() as progress:
        report = tvm_pivot.tune(str(model), log=log, progress=progress, **how)
    return _shown(report, log, as_json)


def _shown(report: TuneReport, log: Path, as_json: bool) -> dict[str, Any]:
    if not as_json:
        typer.echo(f"{report}\n\nrecords are in {log}: tvm-pivot build --log {log}")
    return {**asdict(report), "log": str(log), "gain": report.gain}


def _runner(tracker: str | None, key: str) -> Any:
    if tracker is None:
        return "local"
    from .tuning.rpc_runner import rpc

    return rpc(tracker, key, allocate="tvm_pivot.tuning.artifacts:contents_of")


def _export(log: Path, path: Path) -> int:
    from .tuning.log_files import append, read
    from .tuning.selection import exported

    records = exported(read(log).fresh)
    append(path, records)
    return len(records)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr, and a line for each task with its best time; nothing without a terminal."""
    from .tuning.tuner import Progress

    if not messages.is_terminal:
        yield Progress()
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}"),
        TextColumn("{task.fields[best]}"),
    ]
    with Bars(*columns, console=messages) as bars:
        yield _Lines(bars)


class _Lines:
    """Shows how tuning goes on; see `tuner.Progress`."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.all = bars.add_task("starting", total=None, best="")
        self.lines: list[Any] = []
        self.first: dict[int, float] = {}

    def start(self, names: Sequence[str], trials: int) -> None:
        """One line for each task."""
        self.bars.update(self.all, total=trials)
        self.lines = [self.bars.add_task(name[-32:], total=None, best="") for name in names]

    def measured(self, task: int, seconds: float, best: float) -> None:
        """One trial more."""
        first = self.first.setdefault(task, seconds)  # the rule's is measured first
        shown = f"{best * 1e6:.1f} us, {first / best:.2f}x the rule's"
        self.bars.update(self.lines[task], advance=1, best=shown)
        self.bars.update(self.all, advance=1)

    def phase(self, text: str) -> None:
        """What is done now."""
        self.bars.update(self.all, description=text)
