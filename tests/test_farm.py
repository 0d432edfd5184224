"""A farm on loopback: real trackers and servers, of which some crash, hang, die and are slow.

Timeouts of whole tests are long, so that a busy machine does not fail them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tvm
import typer.main
from farm_machines import CANDIDATES, LONG, Machine, kernel, running, wait_for
from tvm import te
from tvm.rpc import base
from tvm.s_tir import meta_schedule as ms
from typer.testing import CliRunner

from tvm_pivot import cli, cli_farm
from tvm_pivot.errors import InputError, TuningError
from tvm_pivot.targets import resolve
from tvm_pivot.tuning import tracker
from tvm_pivot.tuning.rpc_runner import rpc

ROOT = Path(__file__).resolve().parents[1]
ARM_PYTHON = ROOT / ".cache/arm64/python"
Compile = Callable[[str], Path]
Farm = Callable[..., "Machine"]


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a tracker."""
    with running("tracker", "--port", "0") as machine:
        yield machine.address


@pytest.fixture
def farm(hub: str) -> Iterator[Farm]:
    """Start a device: ``farm(key, VARIABLE=...)``."""
    with ExitStack() as stack:

        def device(key: str, **env: str) -> Machine:
            words = ("server", "--tracker", hub, "--key", key, "--port", "0")
            machine = stack.enter_context(running(*words, env=env))
            wait_for(lambda: machine.address in str(tracker.status(tracker.parse_address(hub))))
            return machine

        yield device


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compile a candidate once."""
    folder = tmp_path_factory.mktemp("candidates")

    def compiled(name: str) -> Path:
        path = folder / f"{name.replace(' ', '_')}.so"
        if not path.exists():
            tvm.compile(CANDIDATES[name](), target=resolve("x86").to_tvm()).export_library(path)
        return path

    return compiled


def trials(path: Path, count: int = 1, dtypes: Sequence[str] = ("float32",) * 2) -> list[Any]:
    """What MetaSchedule hands to a runner."""
    arguments = [ms.arg_info.TensorInfo(dtype, (16,)) for dtype in dtypes]
    return [ms.runner.RunnerInput(str(path), "cpu", arguments) for _ in range(count)]


TABLE = ("float32", "int32", "float32")


def results(runner: Any, inputs: list[Any]) -> list[list[float] | str]:
    """The times of each trial, or why there are none."""
    found = [future.result() for future in runner.run(inputs)]
    return [
        str(result.error_msg) if result.run_secs is None else [float(s) for s in result.run_secs]
        for result in found
    ]


def is_time(result: list[float] | str, repeat: int = 3) -> bool:
    return isinstance(result, list) and len(result) == repeat and all(s >= 0 for s in result)


def quick(hub: str, key: str, **more: Any) -> Any:
    """A runner that does not measure long."""
    settings = {"timeout_s": LONG, "wait_s": LONG, "number": 1, "min_repeat_ms": 0, **more}
    return rpc(hub, key, **settings)


def test_the_protocol_is_tvms() -> None:
    assert tracker.TRACKER_MAGIC == base.RPC_TRACKER_MAGIC
    assert tracker.SERVER_MAGIC == base.RPC_MAGIC
    codes = base.TrackerCode
    assert (tracker.SUCCESS, tracker.REQUEST, tracker.SUMMARY) == (
        codes.SUCCESS,
        codes.REQUEST,
        codes.SUMMARY,
    )


def test_several_devices_share_the_trials(hub: str, farm: Farm, candidate: Compile) -> None:
    for _ in range(3):
        farm("several")
    runner = quick(hub, "several", repeat=2)
    found = results(runner, trials(candidate("good"), 12))
    assert all(is_time(result, 2) for result in found), found
    assert all(is_time(r, 2) for r in results(runner, trials(candidate("good"), 2)))


def test_a_device_killed_in_the_middle_costs_nothing(
    hub: str, farm: Farm, candidate: Compile, tmp_path: Path
) -> None:
    # The first trial of the one to be killed says that it runs, and never ends.
    mark = tmp_path / "running"
    victim = farm("killed", BEFORE=f"touch '{mark}'; sleep 1000")
    runner = quick(hub, "killed")
    futures = runner.run(trials(candidate("slow here and there")))
    wait_for(mark.exists)
    farm("killed")
    futures += runner.run(trials(candidate("slow here and there"), 6))
    victim.end()
    found = [future.result() for future in futures]
    assert [result.error_msg for result in found] == [None] * 7


def test_a_machine_that_stops_answering_loses_its_trial_only(
    hub: str, farm: Farm, candidate: Compile
) -> None:
    frozen = farm("frozen")
    farm("frozen")
    runner = quick(hub, "frozen", timeout_s=4.0)
    assert all(map(is_time, results(runner, trials(candidate("good"), 4))))
    frozen.signal(signal.SIGSTOP)
    assert all(map(is_time, results(runner, trials(candidate("good"), 4))))
    frozen.signal(signal.SIGCONT)


def test_a_slow_device_only_takes_longer(
    hub: str, farm: Farm, candidate: Compile, tmp_path: Path
) -> None:
    mark = tmp_path / "slow one took part"
    farm("slow", BEFORE=f"touch '{mark}'; sleep 0.2")
    farm("slow")
    found = results(quick(hub, "slow"), trials(candidate("slow here and there"), 8))
    assert all(map(is_time, found)), found
    assert mark.exists()


def test_a_crash_is_tried_elsewhere_and_the_device_goes_on(
    hub: str, farm: Farm, candidate: Compile, tmp_path: Path
) -> None:
    for _ in range(2):
        farm("crash", ONCE=str(tmp_path / "once"))
    runner = quick(hub, "crash")
    (found,) = results(runner, trials(candidate("crash once")))
    assert is_time(found), found
    (found,) = results(runner, trials(candidate("crash")))
    assert "lost 127.0.0.1:" in found
    assert all(map(is_time, results(runner, trials(candidate("good"), 4))))
    wait_for(lambda: tracker.status(tracker.parse_address(hub)).count("crash") == 2)


def test_a_candidate_that_hangs_is_ended(hub: str, farm: Farm, candidate: Compile) -> None:
    farm("hang")
    runner = quick(hub, "hang", timeout_s=4.0, attempts=2)
    bad, good = results(runner, trials(candidate("hang")) + trials(candidate("good")))
    assert "lost 127.0.0.1:" in bad and " and 127.0.0.1:" in bad
    assert is_time(good), good


def test_arguments_are_valid_tables(
    hub: str, farm: Farm, candidate: Compile, tmp_path: Path
) -> None:
    farm("tables")
    make = "farm_arguments:{}".format
    runner = quick(hub, "tables", allocate=make("tables"), attempts=1)
    good, bad = results(
        runner,
        trials(candidate("gather"), 1, TABLE) + trials(candidate("gather wrongly"), 1, TABLE),
    )
    assert is_time(good), good
    assert "lost" in bad
    for allocate, message in (
        ("tvm_pivot.tuning.rpc_worker:any_floats", "how to allocate"),
        (make("too_few"), "made 2 of 3 arguments"),
        (make("too_small"), "was made for it"),
        (make("nowhere"), "no function 'farm_arguments:nowhere'"),
        ("no.such:module", "no function"),
    ):
        (found,) = results(
            quick(hub, "tables", allocate=allocate), trials(candidate("gather"), 1, TABLE)
        )
        assert message in found
    runner = quick(hub, "tables")
    (found,) = results(runner, trials(candidate("good"), 1, ("float32",)))
    assert isinstance(found, str) and "lost" not in found, "an argument is missing"
    nothing = tmp_path / "damaged.so"
    nothing.write_bytes(b"no library")
    (found,) = results(runner, trials(nothing))
    assert isinstance(found, str) and "lost" not in found


def test_strangers_do_not_stop_a_device(hub: str, farm: Farm, candidate: Compile) -> None:
    import socket
    import struct

    device = farm("strangers")
    host, port = tracker.parse_address(device.address)
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<ii", base.RPC_MAGIC, -1),
        struct.pack("<ii", base.RPC_MAGIC, 5) + b"x" * 5,
        b"",
    ):
        with socket.create_connection((host, port)) as sock:
            sock.sendall(data)
    assert is_time(results(quick(hub, "strangers"), trials(candidate("good")))[0])


def test_a_runner_says_what_is_wrong(hub: str) -> None:
    with pytest.raises(TuningError, match=r"no device with the key 'none'.*farm server"):
        rpc(hub, "none")
    with pytest.raises(TuningError, match="farm tracker"):
        rpc("127.0.0.1:1", "none")
    with pytest.raises(InputError, match="write host:port"):
        rpc("here:there", "none")
    with pytest.raises(ValueError, match="positive"):
        rpc(hub, "none", attempts=0)
    with pytest.raises(ValueError, match="module:function"):
        rpc(hub, "none", allocate="tables")


def test_status_shows_the_farm(hub: str, farm: Farm) -> None:
    device = farm("shown")
    done = CliRunner().invoke(cli.app, ["farm", "status", "--tracker", hub, "--json"])
    assert done.exit_code == 0
    assert f'"address": "{device.address}"' in done.stdout
    done = CliRunner().invoke(cli.app, ["farm", "status", "--tracker", hub])
    assert "shown" in done.stdout
    for words, message in (
        (["status", "--tracker", "127.0.0.1:1"], "no tracker can be reached"),
        (["status", "--tracker", device.address], "no tracker"),
        (["server", "--tracker", "127.0.0.1:1", "--key", "k"], "no tracker can be reached"),
        (["server", "--tracker", hub, "--key", "a:b"], "a word without colons"),
        (["tracker", "--port", hub.rpartition(":")[2]], "cannot listen"),
        (["tracker", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:9190 to 9199"),
    ):
        done = CliRunner().invoke(cli.app, ["farm", *words])
        assert done.exit_code == 1
        assert message in done.stderr and done.stderr.count("\n") == 1


def test_the_documents_commands_exist() -> None:
    group = typer.main.get_command(cli_farm.farm)
    text = (ROOT / "docs/farm.md").read_text()
    lines = re.findall(r"^    tvm-pivot farm ([a-z]+)(.*)$", text, re.M)
    assert {command for command, _ in lines} == set(group.commands)  # type: ignore[attr-defined]
    for command, rest in lines:
        known = {o for p in group.commands[command].params for o in p.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known


def test_a_device_comes_back_to_a_new_tracker(candidate: Compile) -> None:
    with running("tracker", "--port", "0") as first:
        port = first.address.rpartition(":")[2]
        words = ("server", "--tracker", first.address, "--key", "k", "--port", "0")
        with running(*words):
            first.end()
            with running("tracker", "--port", port) as second:
                address = tracker.parse_address(second.address)
                wait_for(lambda: tracker.status(address).count("k") == 1)
                assert is_time(results(quick(second.address, "k"), trials(candidate("good")))[0])


def test_metaschedule_tunes_on_a_farm(
    hub: str, farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 13 s to import, and nothing here needs it.
    name = "tvm.s_tir.tensor_intrin"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for _ in range(2):
        farm("search")
    folder = str(tmp_path)

    def start_builder() -> None:
        """As TVM's own functions, which import those intrinsics too."""
        from tempfile import mkdtemp

        import tvm

        @tvm.register_global_func("test.build", override=True)
        def build(module: Any, target: Any, _: Any) -> Any:
            return tvm.tirx.build(module, target=target)

        @tvm.register_global_func("test.export", override=True)
        def export(library: Any) -> str:
            path = f"{mkdtemp(dir=folder)}/candidate.so"
            library.export_library(path)
            return path

    def space(schedule: Any) -> None:
        (loop,) = schedule.get_loops(schedule.get_sblock("y"))
        factors = schedule.sample_perfect_tile(loop, 2)
        schedule.vectorize(schedule.split(loop, factors)[1])

    x = te.placeholder((4096,), name="x")
    module = tvm.IRModule({"main": te.create_prim_func([x, te.compute((4096,), x, name="y")])})
    database = ms.tir_integration.tune_tir(
        module,
        resolve("x86").to_tvm(),
        folder,
        max_trials_global=6,
        num_trials_per_iter=3,
        builder=ms.builder.LocalBuilder(
            max_workers=2, f_build="test.build", f_export="test.export", initializer=start_builder
        ),
        runner=quick(hub, "search"),
        space=ms.space_generator.ScheduleFn(space, sch_rules=[], postprocs=[], mutator_probs={}),
        cost_model="random",
        strategy="replay-trace",
        database="memory",
    )
    records = database.get_all_tuning_records()
    assert records and all(0 < float(r.run_secs[0]) < 1 for r in records)


@pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or not ARM_PYTHON.exists(),
    reason=f"needs qemu-aarch64 and a Python for arm64 with TVM, {ARM_PYTHON.relative_to(ROOT)}",
)
def test_an_emulated_arm64_device(hub: str, tmp_path: Path) -> None:
    from tvm.support import cc

    path = tmp_path / "arm.so"
    linker = cc.cross_compiler("aarch64-linux-gnu-g++")
    target = resolve("cortex-a76").to_tvm()
    tvm.compile(kernel(), target=target).export_library(path, fcompile=linker)
    (extra,) = ARM_PYTHON.parent.glob("site/tvm/lib/libtvm_runtime_extra.so")
    command = [str(ARM_PYTHON), "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1"]
    command += ["--tracker", hub, "--key", "arm64", "--load-library", str(extra)]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(lambda: tracker.status(tracker.parse_address(hub)).count("arm64") == 1)
        found = results(quick(hub, "arm64"), trials(path, 3))
        assert all(map(is_time, found)), found
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
