"""The standing set against other runtimes: `make bench`.

Each file is made, converted for every runtime and then measured with nothing else running. The
most important files come first; when `--minutes` are over, the rest is left out and named, and
`--resume` goes on with it. What is measured is in `standing_plan.py`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
from benchmarks.standing_plan import (
    NETWORKS,
    QUICK_NETWORKS,
    QUICK_VARIANTS,
    RUNTIMES,
    VARIANTS,
    Batch,
    batches,
    model_name,
    runtimes_for,
    summary,
    threads_for,
)
from tvm_pivot.bench import measure
from tvm_pivot.bench.conversion import Converted, Key, report_of
from tvm_pivot.bench.machine import describe_machine
from tvm_pivot.bench.models import ModelInput, describe_model
from tvm_pivot.bench.reference import TOLERANCES, Reference
from tvm_pivot.bench.results import Comparison, ModelFacts, Setting
from tvm_pivot.bench.specs import RuntimeSpec, resolve
from tvm_pivot.errors import InputError

RESULTS = REPOSITORY / "benchmarks" / "results" / "standing_set.json"
PROCESSES = 2
# Larger ONNX files are deleted after use: VGG-16's variants would fill 8 GB.
KEEP_BYTES = 200_000_000
PRECISION = "fp32"
# Hundreds of times are measured: turns are shorter than for one model, and fewer if slow.
TURN_MS, MOST_SECONDS = 15.0, 2.0


def make_file(network: str, variant: str) -> ModelInput:
    """The ONNX file of a variant, its digest computed. Runs in a process of its own.

    Raises:
        MissingDataError: it needs data that is not there.
    """
    from benchmarks import zoo

    path = zoo.load(network, variant).resolve()
    model = ModelInput(model_name(network, variant), network, variant, path)
    model.sha256  # noqa: B018 (kept, so that it travels with the model)
    return model


def describe_file(model: ModelInput, converted: Mapping[Key, Converted]) -> ModelFacts:
    """What is to know about a file that was converted. Runs in a process of its own."""
    return describe_model(model, report_of(model, converted))


def _one_thread() -> None:
    """Several processes make files side by side."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = "1"


class StandingSet:
    """Measures batches, and keeps what was found; `comparison` is valid after every file.

    Attributes:
        comparison: all that was measured so far.
        skipped: what was not measured, with the reason.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.comparison = _begin(options)
        self.skipped: list[str] = []
        self.specs = {spec.name: spec for spec in resolve(options.runtimes)}
        self.skipping = [n for n, spec in self.specs.items() if spec.adapter.skips_zeros]
        self.plan = measure.Plan(rounds=options.rounds, turn_ms=TURN_MS, most_seconds=MOST_SECONDS)
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}  # per runtime and file, by network: the latest

    def run(self, work: Sequence[Batch]) -> None:
        """Measure all batches, or as many as the time suffices for."""
        context = multiprocessing.get_context("spawn")  # nothing is inherited but the code
        with ProcessPoolExecutor(PROCESSES, context, initializer=_one_thread) as pool:
            for index, batch in enumerate(work):
                left = self._remaining(batch)
                if not left:
                    continue
                if self._is_over(self._expected(left)):
                    self.skipped += [f"{model_name(*file)}: no time left" for file in left]
                    continue
                rest = sum(map(self._expected, map(self._remaining, work[index:])))
                names = ", ".join(model_name(*file) for file in left)
                self._say(f"making {names}; about {rest / 60:.0f} min left")
                self._measure_batch(left, pool)

    def _remaining(self, batch: Batch) -> Batch:
        measured = {model.name for model in self.comparison.models}
        return tuple(file for file in batch if model_name(*file) not in measured)

    def _specs(self, network: str, variant: str) -> list[RuntimeSpec]:
        names = runtimes_for(network, variant, list(self.specs), self.skipping)
        return [self.specs[name] for name in names]

    def _expected(self, batch: Batch) -> float:
        """Seconds that a batch will take, by what others of its networks, or of any, took."""
        known = self.seconds.values()
        usual = sum(known) / len(known) if known else 0.0
        return sum(self.seconds.get(file[0], usual) * len(self._specs(*file)) for file in batch)

    def _is_over(self, expected: float) -> bool:
        limit = self.options.minutes * 60
        return bool(limit) and time.monotonic() - self.began + expected > limit

    def _measure_batch(self, batch: Batch, pool: ProcessPoolExecutor) -> None:
        """Make and convert files, several at a time, then measure one after the other."""
        began = time.monotonic()
        models = self._make(batch, pool)
        if not models:
            return
        specs = {model.name: self._specs(model.network, model.variant) for model in models}
        with tempfile.TemporaryDirectory(prefix="tvm_pivot_bench_") as scratch:
            folder = Path(scratch)
            self._say("converting them")
            converted = self._convert(models, specs, folder)
            # All of it now, so that nothing else runs while measuring.
            facts = list(pool.map(describe_file, models, itertools.repeat(converted)))
            share = (time.monotonic() - began) / max(1, sum(map(len, specs.values())))
            for model, known in zip(models, facts, strict=True):
                own, began = specs[model.name], time.monotonic()
                self._say(f"measuring {model.name} on {', '.join(spec.name for spec in own)}")
                self._measure(model, known, own, converted, folder)
                if not self.options.keep and model.path.stat().st_size > KEEP_BYTES:
                    model.path.unlink()
                spent = (time.monotonic() - began) / max(1, len(own))
                self.seconds[model.network] = share + spent

    def _make(self, batch: Batch, pool: ProcessPoolExecutor) -> list[ModelInput]:
        """The files of a batch but those whose data is missing, which are noted."""
        futures = [(file, pool.submit(make_file, *file)) for file in batch]
        made = []
        for file, future in futures:
            try:
                made.append(future.result())
            except FileNotFoundError as error:
                self.skipped.append(f"{model_name(*file)}: {error}")
        return made

    def _convert(
        self,
        models: Sequence[ModelInput],
        specs: Mapping[str, Sequence[RuntimeSpec]],
        folder: Path,
    ) -> dict[Key, Converted]:
        """Convert for all runtimes, the slow ones and large files first: they fill both cores."""
        wanted = [
            (model, spec)
            for spec in self.specs.values()
            for model in reversed(models)
            if spec in specs[model.name]
        ]
        return measure.convert_all(
            wanted,
            [PRECISION],
            folder,
            jobs=PROCESSES,
            cores=self.comparison.machine.cores,
            timeout=self.plan.timeout_s,
        )

    def _measure(
        self,
        model: ModelInput,
        facts: ModelFacts,
        specs: Sequence[RuntimeSpec],
        converted: Mapping[Key, Converted],
        folder: Path,
    ) -> None:
        """Measure one file, and add it to the results."""
        reference = Reference.of(model.path, folder)
        results, noise = measure.measure_model(
            model,
            specs,
            converted,
            reference,
            threads=threads_for(model.variant, self.options.threads),
            plan=replace(self.plan, noise=model.variant == "dense"),
        )
        for result in results:
            if result.status not in ("ok", "missing"):
                self._say(f"  {result.runtime}, {result.threads}: {result.status}: {result.detail}")
        self.comparison = replace(
            self.comparison,
            reference=reference.name,
            models=(*self.comparison.models, facts),
            results=(*self.comparison.results, *results),
            noise=(*self.comparison.noise, *noise),
        )
        self.comparison.save(self.options.json)

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {text}", flush=True)


def _begin(options: argparse.Namespace) -> Comparison:
    """An empty comparison, or the one that `--resume` goes on with.

    Raises:
        InputError: it is of another machine.
    """
    machine = describe_machine()
    if options.resume and options.json.exists():
        earlier = Comparison.from_json(options.json.read_bytes())
        if (earlier.machine.cpu, earlier.machine.cores) != (machine.cpu, machine.cores):
            raise InputError(f"{options.json} was measured on another machine: leave out --resume")
        return earlier
    return Comparison(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "benchmarks.standing_set", *sys.argv[1:]]),
        machine=machine,
        reference="",
        tolerances=(Setting(PRECISION, f"{TOLERANCES[PRECISION]:g}"),),
        models=(),
        results=(),
    )


def _names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--networks", type=_names, default=list(NETWORKS), help="names, with commas between them")
    add("--variants", type=_names, default=list(VARIANTS), help="e.g. dense,8x1@0.1")
    add("--runtimes", type=_names, default=list(RUNTIMES), help="names, with commas between them")
    add("--threads", type=lambda s: [int(n) for n in _names(s)], default=[1, 2], help="e.g. 1,2")
    add("--rounds", type=int, default=7, help="turns of each runtime; they take turns")
    add("--minutes", type=float, default=30.0, help="start nothing that takes longer; 0: no limit")
    add("--json", type=Path, default=RESULTS, help="write the results here")
    add("--html", type=Path, help="write a report here")
    add("--quick", action="store_true", help="two small networks, to see that all works")
    add("--resume", action="store_true", help="keep what an interrupted run left in --json")
    add("--keep", action="store_true", help="keep large ONNX files too")
    options = parser.parse_args(argv)
    if options.quick:
        options.networks, options.variants = list(QUICK_NETWORKS), list(QUICK_VARIANTS)
    for option in ("json", "html"):
        file = getattr(options, option)
        if file is not None and not file.parent.is_dir():
            parser.error(f"there is no directory {file.parent}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parse(argv)
    try:
        standing = StandingSet(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    standing.run(batches(options.networks, options.variants))
    comparison = standing.comparison
    print()
    for line in summary(comparison):
        print(line)
    missing = {r.runtime: r.detail for r in comparison.results if r.status == "missing"}
    for runtime, detail in missing.items():
        print(f"{runtime} is not installed: {detail}")
    for line in standing.skipped:
        print(f"not measured: {line}")
    print(f"wrote {options.json}")
    if options.html is not None:
        from tvm_pivot.bench.html import write_html

        write_html(comparison, options.html)
        print(f"wrote {options.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
