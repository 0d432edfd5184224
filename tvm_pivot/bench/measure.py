"""Comparing runtimes: `compare` does all of it; the parts are there for scripts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path

from ..errors import InputError
from .conversion import Converted, Key, convert_all, report_of
from .machine import describe_machine
from .models import ModelInput, describe_model, name_models
from .reference import TOLERANCES, Reference
from .results import Comparison, ModelFacts, Noise, Result, Setting
from .rounds import Contender, Plan, take_turns
from .specs import RuntimeSpec, resolve

__all__ = [
    "ModelInput",
    "Plan",
    "Reference",
    "compare",
    "convert_all",
    "measure_model",
    "name_models",
    "resolve",
]

Progress = Callable[[str], None]


def compare(
    models: Sequence[Path | ModelInput],
    runtimes: Sequence[str],
    *,
    threads: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32",),
    plan: Plan | None = None,
    folder: Path | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    command: str = "",
) -> Comparison:
    """Measure runtimes on models, all on the same files, side by side, with outputs checked.

    Args:
        models: ONNX files with static shapes.
        runtimes: names, or ``file.py:Class`` for a user's own adapter. The measurement's noise
            is that of the first that works.
        threads: each number is measured by itself.
        precisions: each is measured by itself, with the runtimes that have it.
        plan: how long to measure.
        folder: keeps converted models for the next time; None keeps nothing.
        jobs: how many conversions run side by side. Nothing is timed meanwhile.
        progress: called with a line on what happens next.
        command: what to type to repeat this.

    Returns:
        Results by models, threads, precisions and then runtimes, in the order given. A runtime
        that is missing, or fails, or is wrong, is among them and says why.

    Raises:
        InputError: an unknown runtime or precision, a missing file, a model that cannot be run.
    """
    say, plan = progress or _silent, plan or Plan()
    specs, named = resolve(runtimes), name_models(models)
    _check_options(threads, precisions, plan)
    began = datetime.now(timezone.utc)
    machine = describe_machine()
    facts: list[ModelFacts] = []
    results: list[Result] = []
    noise: list[Noise] = []
    reference = ""
    for model in named:
        with tempfile.TemporaryDirectory(prefix="tvm_pivot_bench_") as scratch:
            converted = convert_all(
                [(model, spec) for spec in specs],
                precisions,
                folder or Path(scratch),
                jobs=jobs,
                cores=machine.cores,
                timeout=plan.timeout_s,
                progress=progress,
            )
            report = report_of(model, converted)
            if report is None:
                say(f"{model.name}: looking for zeros")
            facts.append(describe_model(model, report))
            right = Reference.of(model.path, Path(scratch))
            reference = right.name
            found = measure_model(
                model,
                specs,
                converted,
                right,
                threads=threads,
                precisions=precisions,
                plan=plan,
                progress=progress,
            )
        results += found[0]
        noise += found[1]
    return Comparison(
        date=began.isoformat(timespec="seconds"),
        command=command,
        machine=machine,
        reference=reference,
        tolerances=tuple(Setting(p, f"{TOLERANCES[p]:g}") for p in precisions),
        models=tuple(facts),
        results=tuple(results),
        noise=tuple(noise),
    )


def measure_model(
    model: ModelInput,
    specs: Sequence[RuntimeSpec],
    converted: Mapping[Key, Converted],
    reference: Reference,
    *,
    threads: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32",),
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> tuple[list[Result], list[Noise]]:
    """Measure some runtimes on one model.

    Args:
        converted: what `convert_all` returned for the model, these runtimes and precisions.
        reference: for the model; the folder it was given must still be there.
    """
    results: list[Result] = []
    noise: list[Noise] = []
    for count in threads:
        for precision in precisions:
            group = _Group(model, reference, count, precision, plan or Plan(), progress or _silent)
            can = [spec for spec in specs if precision in spec.adapter.precisions]
            found = group.measure(can, converted)
            cannot = [spec for spec in specs if not set(precisions) & set(spec.adapter.precisions)]
            found += [group.refuse(spec) for spec in cannot]
            order = [spec.name for spec in specs]
            results += sorted(found, key=lambda result: order.index(result.runtime))
            noise += group.noise
    return results, noise


class _Group:
    """One model, one number of threads, one precision: what is measured together."""

    def __init__(
        self,
        model: ModelInput,
        reference: Reference,
        threads: int,
        precision: str,
        plan: Plan,
        say: Progress,
    ) -> None:
        self._model, self._reference, self._plan = model, reference, plan
        self._threads, self._precision = threads, precision
        self._say = say
        self.noise: list[Noise] = []

    def measure(
        self, specs: Sequence[RuntimeSpec], converted: Mapping[Key, Converted]
    ) -> list[Result]:
        """Results of all `specs`, in their order."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

            def enter(spec: RuntimeSpec) -> Contender:
                contender = Contender(
                    self._model,
                    spec,
                    converted[self._model.name, spec.name, self._precision],
                    threads=self._threads,
                    precision=self._precision,
                    reference=self._reference,
                    plan=self._plan,
                    folder=folder,
                )
                stack.callback(contender.kill)
                return contender

            contenders = [enter(spec) for spec in specs]
            self._start(contenders)
            first = next((c for c in contenders if c.status == "ok" and self._plan.noise), None)
            twin = [enter(first.spec)] if first else []
            self._start(twin)
            take_turns([*contenders, *twin], self._plan, self._note_round)
            for contender in (*contenders, *twin):
                contender.finish()
                contender.close()
            if first and first.status == twin[0].status == "ok":
                ratio = twin[0].median_ms / first.median_ms
                self.noise = [
                    Noise(self._model.name, first.spec.name, self._threads, self._precision, ratio)
                ]
            return [contender.result() for contender in contenders]

    def _start(self, contenders: Sequence[Contender]) -> None:
        """Import all side by side, then load the models one after the other, which is timed."""
        for contender in contenders:
            contender.launch()
        for contender in contenders:
            contender.settle()
        for contender in contenders:
            self._note(f"loading for {contender.spec.adapter.title}")
            contender.start()

    def refuse(self, spec: RuntimeSpec) -> Result:
        """The result of a runtime that has none of the precisions asked for."""
        return Result(
            model=self._model.name,
            runtime=spec.name,
            title=spec.adapter.title,
            status="unsupported",
            version="",
            threads=self._threads,
            precision=self._precision,
            detail=f"computes in {', '.join(spec.adapter.precisions)} only",
        )

    def _note(self, text: str) -> None:
        plural = "" if self._threads == 1 else "s"
        self._say(f"{self._model.name}, {self._threads} thread{plural}, {self._precision}: {text}")

    def _note_round(self, number: int) -> None:
        self._note(f"round {number} of {self._plan.rounds}" if number else "warming up")


def _check_options(threads: Sequence[int], precisions: Sequence[str], plan: Plan) -> None:
    for precision in precisions:
        if precision not in TOLERANCES:
            raise InputError(f"there is no precision {precision!r}; say {' or '.join(TOLERANCES)}")
    if not precisions or not threads or min(threads) < 1:
        raise InputError("say at least one precision, and numbers of threads from 1 on")
    if plan.rounds < 1:
        raise InputError(f"there must be at least one round, not {plan.rounds}")


def _silent(_: str) -> None:
    return None
