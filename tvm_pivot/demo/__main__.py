"""`python -m tvm_pivot.demo`: compile the shipped pruned network, check its answers, time it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tvm_pivot.demo import MODEL, load_facts, load_images, normalise
from tvm_pivot.errors import PivotError

Array: TypeAlias = NDArray[np.float32]
Runner: TypeAlias = Callable[[Array], Array]

TOLERANCE = 1e-3  # of the range of the reference's outputs
BUSY = 1.3  # median over minimum; below 1.1 on a quiet machine
SPARSE, DENSE, ONNXRUNTIME = "tvm_pivot, sparse", "tvm_pivot, dense build", "onnxruntime"
INSTALL_ONNXRUNTIME = (
    "onnxruntime is not installed, so its lines are left out: pip install onnxruntime"
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and a message where it is wrong."""

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    parser = argparse.ArgumentParser(prog="python -m tvm_pivot.demo", description=__doc__)
    parser.add_argument("--threads", type=positive, default=1, help="threads of each runtime")
    parser.add_argument("--rounds", type=positive, default=40, help="timed bursts of each build")
    parser.add_argument("--burst", type=positive, default=16, help="images per timed burst")
    parser.add_argument("--target", default="x86", help="must be able to run on this machine")
    return parser.parse_args(argv)


def session_runner(session: Any) -> Runner:
    """Adapt a one-output Session: float32 [1, 3, 32, 32] -> logits float32 [1, 10]."""

    def run(x: Array) -> Array:
        logits: Array = session.run(x)
        return logits

    return run


def onnxruntime_runner(threads: int) -> Runner | None:
    """The same network in onnxruntime on as many threads; None where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])

    def run(x: Array) -> Array:
        logits: Array = session.run(None, {"x": x})[0]
        return logits

    return run


def relative_error(answers: Array, reference: Array) -> float:
    """Largest difference over the range of the reference; infinite where an answer is not finite.

    Args:
        answers: float32 [n, 10].
        reference: float32 [n, 10], not constant.
    """
    if not np.isfinite(answers).all():
        return float("inf")
    exact = reference.astype(np.float64)
    return float(np.abs(answers - exact).max() / (exact.max() - exact.min()))


def measure(
    runners: Mapping[str, Runner], images: Array, rounds: int, burst: int
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each single image for each runner, float64 [rounds * burst].

    The runners take turns, so a disturbance of the machine hits all alike. Each turn starts with
    an untimed image, which brings that network's weights back into the caches. Every image is
    timed by itself: a long burst would be interrupted by other programs more often than a short
    one, which would flatter the faster network.
    """
    singles = [images[i % len(images)][None] for i in range(burst)]
    for run in runners.values():  # warm-up: thread pools, page faults, clock frequency
        for x in singles:
            run(x)
    times: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for turn in range(rounds):
        # Whoever goes first changes from round to round.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run = runners[name]
            run(singles[-1])
            for x in singles:
                start = time.perf_counter()
                run(x)
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def show_answers(console: Console, answers: Mapping[str, Array], labels: NDArray[np.uint8]) -> bool:
    """Print accuracy and agreement of all builds; return whether every one agrees."""
    judge = ONNXRUNTIME if ONNXRUNTIME in answers else DENSE
    table = Table(title=f"Answers for {len(labels)} CIFAR-10 test images", title_justify="left")
    table.add_column("build", no_wrap=True)
    for column in ("right", f"largest error against {judge}", "same class"):
        table.add_column(column, justify="right")
    agree = True
    for name, logits in answers.items():
        error = relative_error(logits, answers[judge])
        same = int((logits.argmax(1) == answers[judge].argmax(1)).sum())
        right = int((logits.argmax(1) == labels).sum())
        agree = agree and error <= TOLERANCE
        comparison = (
            ("", "") if name == judge else (f"{error:.1e} of range", f"{same}/{len(labels)}")
        )
        table.add_row(name, f"{right} ({100 * right / len(labels):.1f} %)", *comparison)
    console.print(table)
    if not agree:
        console.print(f"[bold red]The answers disagree by more than {TOLERANCE:g} of the range.[/]")
    return agree


def show_times(
    console: Console, times: Mapping[str, NDArray[np.float64]], options: argparse.Namespace
) -> None:
    """Print least and median time of each build, and how much faster the sparse one is."""
    bursts = f"{options.rounds} interleaved bursts of {options.burst} images"
    table = Table(
        title=f"Time per image, batch 1, {options.threads} thread(s), {bursts}",
        title_justify="left",
    )
    table.add_column("build", no_wrap=True)
    for column in ("min ms", "median ms", "time / sparse (min)", "(median)"):
        table.add_column(column, justify="right")
    for name, values in times.items():
        least, median = values.min(), np.median(values)
        ratios = (least / times[SPARSE].min(), median / np.median(times[SPARSE]))
        shown = tuple(f"{ratio:.2f}x" for ratio in ratios) if name != SPARSE else ()
        table.add_row(name, f"{least:.3f}", f"{median:.3f}", *shown)
    console.print(table)
    if any(np.median(values) > BUSY * values.min() for values in times.values()):
        console.print(
            "Some medians lie far above the minima: other programs are using this machine. "
            "Compare the minima, or repeat when it is quiet."
        )


def show_network(console: Console, report: object) -> None:
    """Print where the network comes from and what the compiler made of each layer."""
    facts = load_facts()
    scores = facts["accuracy_percent"]
    console.print(
        f"[bold]ResNet-20, {facts['block']} blocks[/], density "
        f"{facts['density_of_pruned_layers']:.3f} in the pruned layers; on 10,000 CIFAR-10 (JPEG) "
        f"test images {scores['pruned']:.2f} % (dense: {scores['dense_fine_tuned']:.2f} %)\n"
    )
    # A report is plain text: square brackets in it are no markup, and its lines are aligned.
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    console.print()


def demo(options: argparse.Namespace, console: Console) -> bool:
    """Build, check and time; return whether all builds agree.

    Raises:
        PivotError: the network cannot be compiled for this machine.
    """
    import tvm_pivot

    sparse = tvm_pivot.build(MODEL, target=options.target)
    dense = tvm_pivot.build(MODEL, target=options.target, sparse=False)
    runners = {SPARSE: session_runner(sparse), DENSE: session_runner(dense)}
    reference = onnxruntime_runner(options.threads)
    if reference is not None:
        runners[ONNXRUNTIME] = reference
    show_network(console, sparse.report)
    images = load_images()
    x = normalise(images.pixels)
    answers = {
        name: np.concatenate([run(x[i : i + 1]) for i in range(len(x))])
        for name, run in runners.items()
    }
    agree = show_answers(console, answers, images.labels)
    show_times(console, measure(runners, x, options.rounds, options.burst), options)
    if reference is None:
        console.print(INSTALL_ONNXRUNTIME)
    return agree


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if all builds agree, 1 if they do not, 2 if it could not run."""
    options = parse(argv)
    # TVM reads this when its thread pool starts, so it has to be set before anything runs.
    os.environ["TVM_NUM_THREADS"] = str(options.threads)
    console = Console()
    try:
        return 0 if demo(options, console) else 1
    except PivotError as error:
        console.print(f"The demo cannot run here: {error}", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())
