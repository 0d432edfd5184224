"""The standing set against other runtimes: `make bench`.

Each file is made, converted for every runtime and then measured with nothing else running. The
most important files come first; when `--minutes` are over, the rest is left out and named, and
`--resume` goes on with it. What is measured is in `standing_plan.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY))

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
from tvm_pivot.bench.conversion import Converted, Key
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
TURN_MS, MOST_SECONDS = 15.0, 3.0


def make_file(network: str, variant: str) -> tuple[ModelInput, ModelFacts]:
    """The ONNX file of a variant, and what is to know about it. Runs in a process of its own.

    Raises:
        MissingDataError: it needs data that is not there.
    """
    from benchmarks import zoo

    model = ModelInput(
        model_name(network, variant), network, variant, zoo.load(network, variant).resolve()
    )
    return model, describe_model(model)


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
        self.seconds: dict[str, list[float]] = {}  # per runtime and file, by network

    def run(self, work: Sequence[Batch]) -> None:
        """Measure all batches, or as many as the time suffices for."""
        context = multiprocessing.get_context("spawn")  # nothing is inherited but the code
        with ProcessPoolExecutor(PROCESSES, context, initializer=_one_thread) as pool:
            for index, batch in enumerate(work):
                left = self._remaining(batch)
                if not left.variants:
                    continue
                expected = self._expected(left)
                if self._is_over(expected):
                    names = (model_name(left.network, variant) for variant in left.variants)
                    self.skipped += [f"{name}: no time left" for name in names]
                    continue
                rest = sum(map(self._expected, map(self._remaining, work[index:])))
                self._say(
                    f"{left.network}: {', '.join(left.variants)}; about {rest / 60:.0f} min left"
                )
                self._measure_batch(left, pool)

    def _remaining(self, batch: Batch) -> Batch:
        measured = {model.name for model in self.comparison.models}
        names = (v for v in batch.variants if model_name(batch.network, v) not in measured)
        return Batch(batch.network, tuple(names))

    def _runtimes(self, network: str, variant: str) -> list[str]:
        return runtimes_for(network, variant, list(self.specs), self.skipping)

    def _expected(self, batch: Batch) -> float:
        """Seconds that a batch will take, by what others of its network, or of any, took."""
        own = self.seconds.get(batch.network)
        known = own or [s for values in self.seconds.values() for s in values]
        each = sum(known) / len(known) if known else 0.0
        return each * sum(len(self._runtimes(batch.network, v)) for v in batch.variants)

    def _is_over(self, expected: float) -> bool:
        limit = self.options.minutes * 60
        return bool(limit) and time.monotonic() - self.began + expected > limit

    def _measure_batch(self, batch: Batch, pool: ProcessPoolExecutor) -> None:
        began = time.monotonic()
        made: list[tuple[str, Future[tuple[ModelInput, ModelFacts]]]] = [
            (variant, pool.submit(make_file, batch.network, variant)) for variant in batch.variants
        ]
        ready = []
        for variant, future in made:  # all of them, so that nothing else runs while measuring
            try:
                ready.append(future.result())
            except FileNotFoundError as error:
                self.skipped.append(f"{model_name(batch.network, variant)}: {error}")
        if ready:
            self._measure_files(ready)
        spent = time.monotonic() - began
        count = sum(len(self._runtimes(model.network, model.variant)) for model, _ in ready)
        if count:
            self.seconds.setdefault(batch.network, []).append(spent / count)

    def _measure_files(self, ready: Sequence[tuple[ModelInput, ModelFacts]]) -> None:
        """Convert files, several at a time, then measure one after the other."""
        names = {m.name: self._runtimes(m.network, m.variant) for m, _ in ready}
        with tempfile.TemporaryDirectory(prefix="tvm_pivot_bench_") as scratch:
            self._say(f"converting {', '.join(names)}")
            wanted = [(model, self.specs[n]) for model, _ in ready for n in names[model.name]]
            converted = measure.convert_all(
                wanted,
                [PRECISION],
                Path(scratch),
                jobs=PROCESSES,
                cores=self.comparison.machine.cores,
                timeout=self.plan.timeout_s,
            )
            for model, facts in ready:
                self._say(f"measuring {model.name} on {', '.join(names[model.name])}")
                specs = [self.specs[name] for name in names[model.name]]
                self._measure(model, facts, specs, converted, Path(scratch))
                if not self.options.keep and model.path.stat().st_size > KEEP_BYTES:
                    model.path.unlink()

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
        command=shlex.join(["python", "benchmarks/standing_set.py", *sys.argv[1:]]),
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
    add("--rounds", type=int, default=9, help="turns of each runtime; they take turns")
    add("--minutes", type=float, default=29.0, help="start nothing that takes longer; 0: no limit")
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
