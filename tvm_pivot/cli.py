"""The command line: ``tvm-pivot inspect | build | run | bench | tune | farm``.

TVM takes seconds to import, so it is imported inside the commands: ``--help`` stays quick.
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_bench import bench
from .cli_common import (
    AsJson,
    Log,
    Model,
    PivotSeconds,
    Precision,
    Shapes,
    Target,
    Threads,
    errors,
    parse_shapes,
    phases,
    print_json,
)
from .cli_farm import farm
from .cli_tune import tune
from .errors import ArtifactError, InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .session import Session

app = typer.Typer(
    name="tvm-pivot",
    help="Compile pruned neural networks so that they run as fast as their zeros allow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tvm-pivot {version('tvm-pivot')} (TVM {version('apache-tvm')})")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Compile pruned neural networks so that they run as fast as their zeros allow."""
    context.obj = debug


@app.command()
def inspect(
    context: typer.Context,
    model: Model,
    target: Target = "x86",
    precision: Precision = "float32",
    shape: Shapes = None,
    pivot_seconds: PivotSeconds = 2.0,
    log: Log = None,
    as_json: AsJson = False,
) -> None:
    """Show where a model's zeros are and which layers would run sparse. Compiles nothing."""
    with errors(context):
        import tvm_pivot

        with phases("reading"):
            report = tvm_pivot.inspect(
                str(model),
                target=target,
                shapes=parse_shapes(shape),
                pivot_seconds=pivot_seconds,
                log=log,
                precision=precision,
            )
        typer.echo(report.to_json(indent=2) if as_json else str(report))


@app.command()
def build(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="A directory to write, or a file *.pivot.", show_default=False
        ),
    ],
    target: Target = "x86",
    precision: Precision = "float32",
    shape: Shapes = None,
    sparse: Annotated[
        bool, typer.Option("--sparse/--dense", help="Skip zeros, or build every layer dense.")
    ] = True,
    pivot_seconds: PivotSeconds = 2.0,
    log: Log = None,
    debug_dir: Annotated[
        Path | None, typer.Option("--debug-dir", help="Write the module after each phase here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model into what `run` and tvm_pivot.load read: a directory, or one file."""
    with errors(context):
        if not output.parent.is_dir():  # before minutes of compiling, not after
            raise ArtifactError(f"cannot write {output}: there is no directory {output.parent}")
        started = time.perf_counter()
        more = {"debug_dir": debug_dir, "pivot_seconds": pivot_seconds, "log": log}
        net = _build(model, target, shape, sparse=sparse, precision=precision, **more)
        net.export(output)
        written = output.iterdir() if output.is_dir() else [output]
        seconds, size = time.perf_counter() - started, sum(f.stat().st_size for f in written)
        if as_json:
            report = json.loads(net.report.to_json())
            print_json(
                {"artifact": str(output), "bytes": size, "seconds": seconds, "report": report}
            )
        else:
            typer.echo(f"{net.report}\n\nwrote {output}, {size / 1e6:.2f} MB, in {seconds:.1f} s")


@app.command()
def run(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(help="An exported network or an ONNX file.", show_default=False)
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="x.npy, all.npz, or name=x.npy. Repeat it."),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Make up the inputs.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="For --random.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs here (.npz, .npy).")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Timed runs.")] = 1,
    threads: Threads = None,
    target: Target = "x86",
    precision: Precision = "float32",
    shape: Shapes = None,
    as_json: AsJson = False,
) -> None:
    """Run a model and show its outputs and how long it takes."""
    with errors(context):
        if bool(inputs) == random:
            raise InputError("give the inputs with --input, or make them up with --random")
        if output is not None and output.suffix not in (".npz", ".npy"):
            raise InputError(f"--output {output}: the name must end in .npz or .npy")
        if model.suffix == ".pivot" or model.is_dir() or zipfile.is_zipfile(model):
            import tvm_pivot

            net = tvm_pivot.load(model)
        else:
            net = _build(model, target, shape, precision=precision)
        if threads is not None:
            net.set_threads(threads)
        arrays = make_inputs(net, seed) if random else read_inputs(inputs or (), net)
        results, seconds = _measure(net, arrays, repeat)
        if output is not None:
            _write_outputs(output, results)
        _print_run(net, results, seconds, as_json)


app.command()(bench)
app.command()(tune)
app.add_typer(farm, name="farm")


def read_inputs(texts: Iterable[str], net: Session) -> dict[str, npt.NDArray[Any]]:
    """Arrays for the inputs of `net` from ``x.npy``, ``all.npz`` or ``name=x.npy``.

    Raises:
        InputError: a file cannot be read, or it is not clear which input it is for.
    """
    import numpy as np

    found: dict[str, npt.NDArray[Any]] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or Path(text).exists():
            name, file = "", text
        try:
            loaded = np.load(file, allow_pickle=False)
            arrays = {name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"cannot read {file}: {e}") from e
        if "" in arrays:
            if len(net.inputs) != 1:
                names = ", ".join(spec.name for spec in net.inputs)
                raise InputError(f"--input {file}: write name={file}, with a name of {names}")
            arrays = {net.inputs[0].name: arrays[""]}
        found.update(arrays)
    return found


def make_inputs(net: Session, seed: int) -> dict[str, npt.NDArray[Any]]:
    """Random inputs for `net`: normal for floats; 0 or 1 for integers, which may be indices."""
    import numpy as np

    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in net.inputs:
        is_float = np.issubdtype(np.dtype(spec.dtype), np.floating)
        values = rng.standard_normal(spec.shape) if is_float else rng.integers(0, 2, spec.shape)
        arrays[spec.name] = np.asarray(values).astype(spec.dtype)
    return arrays


def _build(model: Path, target: str, shape: list[str] | None, **more: Any) -> Session:
    import tvm_pivot

    with phases("starting") as progress:
        net: Session = tvm_pivot.build(
            str(model), target=target, shapes=parse_shapes(shape), progress=progress, **more
        )
    return net


def _measure(
    net: Session, arrays: Mapping[str, npt.NDArray[Any]], repeat: int
) -> tuple[dict[str, npt.NDArray[Any]], list[float]]:
    """The outputs by name, and the seconds of each of `repeat` runs after one to warm up."""
    results = net.run(dict(arrays))
    ordered = [arrays[spec.name] for spec in net.inputs]
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        net.run(*ordered)
        seconds.append(time.perf_counter() - started)
    several = results if isinstance(results, tuple) else (results,)
    return {spec.name: y for spec, y in zip(net.outputs, several, strict=True)}, seconds


def _write_outputs(path: Path, results: Mapping[str, npt.NDArray[Any]]) -> None:
    import numpy as np

    if path.suffix == ".npy" and len(results) > 1:
        raise InputError(f"--output {path}: {len(results)} outputs need a .npz file")
    try:
        if path.suffix == ".npy":
            np.save(path, next(iter(results.values())))
        else:  # not np.savez: an output may be called "file", as its first argument is
            with zipfile.ZipFile(path, "w") as archive:
                for name, y in results.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, y, allow_pickle=False)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror or e}") from e


def _print_run(
    net: Session, results: Mapping[str, npt.NDArray[Any]], seconds: list[float], as_json: bool
) -> None:
    import numpy as np

    outputs = [
        {"name": name, "shape": list(y.shape), "dtype": str(y.dtype), **_statistics(y)}
        for name, y in results.items()
    ]
    least, median = min(seconds) * 1e3, float(np.median(seconds)) * 1e3
    if as_json:
        latency = {"min": least, "median": median, "runs": len(seconds), "threads": net.threads}
        print_json({"outputs": outputs, "latency_ms": latency})
        return
    for y in outputs:
        shown = ", ".join(f"{k} {y[k]:.6g}" for k in ("min", "mean", "max") if y[k] is not None)
        typer.echo(f"{y['name']}: {y['dtype']} {y['shape']}  {shown}")
    typer.echo(
        f"latency: min {least:.3f} ms, median {median:.3f} ms "
        f"({len(seconds)} runs, {net.threads} threads)"
    )


def _statistics(y: npt.NDArray[np.generic]) -> dict[str, float | None]:
    """Smallest, mean and largest value; None where that is not a number."""
    import numpy as np

    if y.size == 0:
        return dict.fromkeys(("min", "mean", "max"))
    values = {"min": y.min(), "mean": y.mean(dtype=np.float64), "max": y.max()}
    return {k: float(v) if np.isfinite(v) else None for k, v in values.items()}


def main() -> None:
    """Entry point of ``tvm-pivot`` and ``python -m tvm_pivot``."""
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe, `head` say, has gone
        sys.stderr.close()
        sys.exit(1)
