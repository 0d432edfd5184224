"""Counting what ARM programs execute: the plugin, llvm-mca's models, and what is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.arm_cost import blocks, mca
from benchmarks.arm_cost.blocks import Block, Count, joined, loads_and_stores, parse, per_run
from benchmarks.arm_cost.cores import CORES, ArmCostError, core_of
from benchmarks.arm_cost.cost import Cost, grouped, total_cost
from benchmarks.arm_cost.emulator import Emulator, compiled
from benchmarks.arm_cost.results import (
    KernelCost,
    NetworkCost,
    Results,
    Step,
    kernels_table,
    networks_table,
)
from tests.arm_programs import loops, needs_tools

EMULATOR = Emulator(core_of("cortex-a76"))
LOOPS, BYTES = 5000, 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loops of `arm_programs`."""
    return loops(tmp_path_factory.mktemp("loops"))


def run_of(program: Path, size: int, caches: bool = False) -> blocks.Profile:
    """What one run of the loops executes."""
    profile, _ = EMULATOR.per_run(
        lambda runs: [program, str(runs), str(LOOPS), str(size)], caches=caches
    )
    return profile


@needs_tools
def test_loops_are_counted_exactly(program: Path) -> None:
    found = grouped(run_of(program, BYTES), EMULATOR.core)
    # Beside its loop a function has only a few instructions.
    assert 3 * LOOPS <= found["add_up"].instructions < 3 * LOOPS + 10
    assert (found["add_up"].loads, found["add_up"].stores) == (0, 0)
    lines = BYTES // 64
    assert 5 * lines <= found["copy"].instructions < 5 * lines + 10
    assert (found["copy"].loads, found["copy"].stores) == (lines, lines)
    assert set(found) == {"add_up", "copy", "main"}


@needs_tools
def test_cycles_follow_the_model_of_the_core(program: Path) -> None:
    found = grouped(run_of(program, BYTES), EMULATOR.core)
    # Each number waits for the one before, a cycle each.
    assert found["add_up"].cycles == pytest.approx(LOOPS, rel=0.02)


@needs_tools
def test_counts_repeat(program: Path) -> None:
    first, second = (total_cost(run_of(program, BYTES), EMULATOR.core) for _ in range(2))
    assert first == second


@needs_tools
def test_cache_misses_are_those_of_the_sizes(program: Path) -> None:
    core = EMULATOR.core
    cases = [(core.l1.size // 2, 0, 0), (core.l2.size // 2, 1, 0), (2 * core.l2.size, 1, 1)]
    for size, l1, l2 in cases:
        found = grouped(run_of(program, size, caches=True), core)["copy"]
        lines = size // 64
        assert found.l1_misses == pytest.approx(l1 * lines, abs=3), size
        assert found.l2_misses == pytest.approx(l2 * lines, abs=3), size


@needs_tools
def test_a_program_that_fails_is_an_error(program: Path) -> None:
    with pytest.raises(ArmCostError, match="exit code"):
        EMULATOR.profile([program, "0", "1", "64"])  # no run: the sum is 0


@needs_tools
def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "broken.c"
    source.write_text("int main(")
    with pytest.raises(ArmCostError, match=r"broken\.c"):
        compiled(("gcc",), source, "")


@needs_tools
@pytest.mark.parametrize(("name", "rate"), [("cortex-a53", 1), ("cortex-a76", 2), ("cortex-x1", 4)])
def test_the_limit_is_that_of_the_pipelines(name: str, rate: int) -> None:
    assert mca.multiply_adds_per_cycle(CORES[name].model) == pytest.approx(rate, rel=0.02)


@needs_tools
def test_blocks_cost_what_their_instructions_do() -> None:
    fmla, load = "4f9f13c0", "3dc00420"  # fmla v0.4s, v30.4s, v31.s[0]; ldr q0, [x1, #16]
    found = mca.cycles([fmla, fmla * 2, load * 40], "neoverse-n1")
    # Sums wait for each other: N1 forwards them after two cycles; it loads twice per cycle.
    assert found[fmla * 2] == pytest.approx(2 * found[fmla], rel=0.05)
    assert found[load * 40] == pytest.approx(20, rel=0.05)


def test_llvm_mca_is_read() -> None:
    def region(name: str, total: int) -> dict[str, object]:
        return {"Name": name, "SummaryView": {"TotalCycles": total, "Iterations": 100}}

    text = json.dumps({"CodeRegions": [region("1", 250), region("0", 400)]})
    assert mca.parse(text, 2) == [4.0, 2.5]
    for wrong in (text[:-1], "[]", '{"CodeRegions": [{"Name": "0"}]}'):
        with pytest.raises(ArmCostError, match="llvm-mca answered"):
            mca.parse(wrong, 2)
    with pytest.raises(ArmCostError, match="llvm-mca answered"):
        mca.parse(text, 3)


def test_a_missing_tool_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ArmCostError, match="apt-get install llvm-19"):
        mca.cycles(["d503201f"], "no-such-model")
    with pytest.raises(ArmCostError, match="apt-get install util-linux"):
        EMULATOR.run(["true"])


def test_an_unknown_core_lists_the_known() -> None:
    with pytest.raises(ArmCostError, match=r"cortex-a53.*cortex-a76"):
        core_of("cortex-m0")


LOADS = """f9400020 3dc00420 b8a26820 ad400420 a8c10440 ac400420 4cdf7820 4d40c820 58000040 c85f7c20
    c8dffc20 bc5fc020 d9408020 39400020 b870db00 a540a000"""
STORES = "f9000020 3c810420 a9bf07e0 ad000420 4c007820 c89ffc20 39000020 3c9f0020 d9008020 e540e000"
ATOMICS = "f8200041 f8208041"
NEITHER = """f9800000 f8a16800 f89f8000 d8000040 8b020020 4f821020 14000002 94000002 d4000001
    65a20020"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [(LOADS, (1, 0)), (STORES, (0, 1)), (ATOMICS, (1, 1)), (NEITHER, (0, 0))],
    ids=["loads", "stores", "atomics", "neither"],
)
def test_accesses_are_told_from_encodings(words: str, expected: tuple[int, int]) -> None:
    for word in words.split():
        assert loads_and_stores(int(word, 16)) == expected, word


def test_what_the_plugin_writes_is_read() -> None:
    text = """map 5500000000 5500001000 0 /a folder/program
        block 6f0 999 0 3 1 1e2028004f9f13c0
        block 6f0 1 0 1 1 1e2028004f9f13c0
        block 4000 7 -1 0 0 d503201f"""
    found = parse(line.strip() for line in text.splitlines())
    loop = Block("/a folder/program", 0x6F0, "1e2028004f9f13c0")
    assert found == {loop: Count(1000, 4, 2), Block("", 0x4000, "d503201f"): Count(7)}
    assert (len(loop), loop.words()) == (2, [0x1E202800, 0x4F9F13C0])
    with pytest.raises(ValueError, match="not a line"):
        parse(["something else"])


def test_what_runs_in_both_programs_cancels_out() -> None:
    loading, body, rare = (Block("f", place, "d503201f") for place in range(3))
    few = {loading: Count(100), body: Count(10, 4, 2)}
    many = {loading: Count(100), body: Count(30, 8, 2), rare: Count(2)}
    assert per_run(few, many, 2) == {body: Count(10, 2, 0), rare: Count(1)}


def network(runtime: str, variant: str, core: str, cycles: float) -> NetworkCost:
    """A cost that was never measured."""
    cost = Cost(2 * cycles, 1.0, 1.0, cycles)
    steps = (Step("gemm", cycles, cycles),)
    return NetworkCost("resnet50", variant, "aa", runtime, "1.0", core, cost, 1e-6, steps)


def test_blocks_that_a_page_cuts_are_joined() -> None:
    add, branch = "8b010000", "54ffffc1"  # b.ne
    first, second = Block("f", 0x1FF8, 2 * add), Block("f", 0x2000, add + branch)
    whole = Block("f", 0x1FF8, 3 * add + branch)
    assert joined({first: Count(9, 2), second: Count(9, 1)}) == {whole: Count(9, 3)}
    # The second half is jumped to as well.
    found = joined({first: Count(6), second: Count(9, 3)})
    assert found == {whole: Count(6, 2), second: Count(3, 1)}
    for alone in (Block("f", 0x1FF4, 2 * add), Block("f", 0x1FF8, add + branch)):
        assert joined({alone: Count(9), second: Count(9)}) == {alone: Count(9), second: Count(9)}
    other = Block("g", 0x2000, add)
    assert joined({first: Count(9), other: Count(9)}) == {first: Count(9), other: Count(9)}


def test_results_are_kept_and_told(tmp_path: Path) -> None:
    path, tools = tmp_path / "arm_cost.json", ("QEMU 7", "LLVM 19")
    results = Results.load(path, tools)
    assert results == Results(tools)
    kernel = KernelCost(192, 64, 32, 8, 0.1, "cortex-a53", Cost(5e6, 1e6, 1e6, 4e6), 3e6, 0.5)
    results = results.with_kernels([kernel]).with_networks(
        [network("litert", "dense", "cortex-a76", 600e6), network("pivot", "8x1@0.1", "x", 1e6)]
    )
    results = results.with_networks([network("pivot", "8x1@0.1", "cortex-a76", 100e6)])
    results.save(path)
    again = Results.load(path, tools)
    assert {n.key: n for n in again.networks} == {n.key: n for n in results.networks}
    assert again.kernels == (kernel,)
    # Numbers of other tools cannot be compared with new ones.
    assert Results.load(path, ("QEMU 8", "LLVM 19")).networks == ()
    _, rows = networks_table([n for n in results.networks if n.core == "cortex-a76"])
    assert rows == [
        ("resnet50", "none", "LiteRT (XNNPACK)", "1200", "600.0", "1.0x"),
        ("resnet50", "90 %, 8x1 blocks", "**tvm_pivot**", "200", "100.0", "6.0x"),
    ]
    assert kernels_table([kernel])[1] == [("192, 64, 32", "8x1", "0.10", "4000", "0.75")]
