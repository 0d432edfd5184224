"""``python -m benchmarks.arm_cost``: see ``docs/arm-cost.md``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.readme_tables import markdown
from tvm_pivot.errors import PivotError

from .cores import CORES, ArmCostError, Core, core_of
from .cost import Cost
from .emulator import run_tool
from .guest_python import RUNTIMES, set_up
from .mca import VERSION
from .results import (
    NETWORKS,
    OURS,
    RESULTS,
    TITLES,
    VARIANTS,
    KernelCost,
    NetworkCost,
    Results,
    kernels_table,
    networks_table,
)

_CORES = ("cortex-a76", "cortex-a53")
_Command = argparse.ArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = options.run
    try:
        command(options)
    except (ArmCostError, PivotError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm_cost", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> _Command:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    add("setup", _set_up, "download the runtimes for aarch64 and a Python for them")
    networks = add("networks", _networks, "measure whole networks on ours and other runtimes")
    _choose(networks, "--networks", NETWORKS, None)
    _choose(networks, "--variants", VARIANTS, None)
    _choose(networks, "--runtimes", (OURS, *RUNTIMES), tuple(TITLES))
    networks.add_argument("--again", action="store_true", help="other runtimes too, where known")
    kernels = add("kernels", _kernels, "measure single kernels against the limit of the core")
    kernels.add_argument("--precision", default="float32", help="others are printed, not kept")
    layers = add("layers", _layers, "tell the cost of each layer of one network")
    layers.add_argument("network")
    layers.add_argument("variant", nargs="?", default="8x1@0.1")
    tune = add("tune", _tune, "search for kernels that take fewer model cycles")
    tune.add_argument("--trials", type=int, help="candidates in all; default: 32 per kernel")
    tune.add_argument("--minutes", type=float, help="stop after so long")
    gain = add("gain", _gain, "compare the kernels that records choose with the rule's")
    for command in (tune, gain):
        command.add_argument("network")
        command.add_argument("variant", nargs="?", default="8x1@0.1")
        command.add_argument("--log", type=Path, required=command is tune, help="records (.jsonl)")
    table = add(
        "table", _table, "print what was measured; make readme-tables writes it to README.md"
    )
    for command in (networks, kernels, layers, tune, gain):
        _choose(command, "--cores", _CORES, tuple(CORES))
    for command in (networks, kernels, layers):
        command.add_argument("--caches", action="store_true", help="count cache misses too (slow)")
    for command in (networks, kernels, table):
        command.add_argument("--json", type=Path, default=RESULTS, help="the file of the results")
    return parser


def _choose(
    command: _Command, name: str, default: Sequence[str], choices: Sequence[str] | None
) -> None:
    command.add_argument(name, nargs="+", default=list(default), choices=choices)


def _cores(options: argparse.Namespace) -> list[Core]:
    return [core_of(name) for name in options.cores]


def _set_up(_: argparse.Namespace) -> None:
    set_up()


def _networks(options: argparse.Namespace) -> None:
    from .networks import measure, model_of

    results = Results.load(options.json, tools())

    def done(entry: NetworkCost) -> None:
        nonlocal results
        results = results.with_networks([entry])
        results.save(options.json)  # each at once: all of them take an hour
        _tell(" ".join(entry.key), entry.cost, f"error {entry.error:.0e}")

    models = [model_of(name, variant) for name in options.networks for variant in options.variants]
    known = () if options.again else results.networks
    measure(models, options.runtimes, _cores(options), done, known=known, caches=options.caches)
    _print_table(*networks_table(results.networks))


def _kernels(options: argparse.Namespace) -> None:
    from .kernels import measure

    results = Results.load(options.json, tools())

    def done(entry: KernelCost) -> None:
        nonlocal results
        if options.precision == "float32":
            results = results.with_kernels([entry])
        _tell(" ".join(map(str, entry.key)), entry.cost, f"{entry.fraction:.2f} of the limit")

    measure(_cores(options), done, precision=options.precision, caches=options.caches)
    results.save(options.json)
    _print_table(*kernels_table(results.kernels))


def _layers(options: argparse.Namespace) -> None:
    from .networks import layer_costs, model_of, run_ours

    model = model_of(options.network, options.variant)
    for core in _cores(options):
        ran, report = run_ours(model, core, caches=options.caches)
        costs = layer_costs(ran.functions, report)
        total = sum(costs.values(), Cost())
        _tell(f"{model.name} on {core.name}", total, f"error {ran.error:.0e}")
        for name, cost in costs.items():
            _tell(f"  {name}", cost, f"{cost.cycles / total.cycles:.1%}")


def _tune(options: argparse.Namespace) -> None:
    import tvm_pivot
    from tvm_pivot.tuning.artifacts import contents_of

    from .networks import model_of
    from .tuning import runner

    model = model_of(options.network, options.variant)
    for core in _cores(options):
        how = {"trials": options.trials, "minutes": options.minutes}
        measuring = runner(core, allocate=contents_of)
        print(tvm_pivot.tune(model.path, core.name, log=options.log, runner=measuring, **how))


def _gain(options: argparse.Namespace) -> None:
    from .gain import mean_gain, of_layers, of_network
    from .networks import model_of

    model = model_of(options.network, options.variant)
    for core in _cores(options):
        layers = of_layers(model, core, options.log)
        for one in layers:
            if one.record:
                cycles = f"{one.rule / 1e6:.3f} M model cycles by the rule, {one.tuned / 1e6:.3f} M"
                print(f"{one.layer}: {cycles} {one.record}, {one.gain:.3f}x", flush=True)
        rule, tuned = of_network(model, core, options.log)
        cycles = f"{rule / 1e6:.3f} M model cycles by the rule, {tuned / 1e6:.3f} M tuned"
        gains = f"{rule / tuned:.3f}x; its layers {mean_gain(layers):.3f}x"
        print(f"{model.name} on {core.name}: {cycles}, {gains}", flush=True)


def _table(options: argparse.Namespace) -> None:
    results = Results.read(options.json)
    _print_table(*networks_table(results.networks))
    _print_table(*kernels_table(results.kernels))


def tools() -> tuple[str, ...]:
    """Names and versions of the tools that count.

    Raises:
        ArmCostError: one is missing.
    """
    version = run_tool("qemu-aarch64", "--version").split("version ")[1].split()[0]
    return (f"QEMU {version}", f"LLVM {VERSION}")


def _tell(name: str, cost: Cost, more: str) -> None:
    text = (
        f"{name}: {cost.instructions / 1e6:.3f} M instructions, {cost.loads / 1e6:.3f} M loads, "
        f"{cost.stores / 1e6:.3f} M stores, {cost.cycles / 1e6:.3f} M model cycles"
    )
    if cost.l1_misses:
        text += f", misses: {cost.l1_misses / 1e6:.3f} M L1, {cost.l2_misses / 1e6:.3f} M L2"
    print(f"{text}, {more}", flush=True)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        print("\n".join(markdown(head, rows)))


if __name__ == "__main__":
    sys.exit(main())
