"""The cost of our kernels and networks, of other runtimes, and tuning on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import te
from tvm.s_tir import meta_schedule
from tvm.support.tar import tar

import tvm_pivot
from benchmarks.arm_cost import gain, kernels, rivals
from benchmarks.arm_cost.compiled import execute
from benchmarks.arm_cost.cores import ArmCostError, core_of
from benchmarks.arm_cost.guest_python import cpu_info, require, rivals_folder, tvm_folder
from benchmarks.arm_cost.networks import layer_costs, run_ours
from benchmarks.arm_cost.tuning import SECONDS_PER_CYCLE, arguments_for, runner
from tests.arm_programs import needs_tools
from tests.tuned_layers import conv_layer, convolved, task_of
from tvm_pivot.bench.models import ModelInput
from tvm_pivot.bench.reference import Reference
from tvm_pivot.bench.runtimes.protocol import ports
from tvm_pivot.targets import resolve
from tvm_pivot.tuning.artifacts import arguments_of, contents_of
from tvm_pivot.tuning.log_files import read
from tvm_pivot.tuning.rpc_devices import Trial
from tvm_pivot.tuning.trials import build_candidate


def there(folder: Path) -> bool:
    """Whether `setup` has finished a folder."""
    try:
        require(folder)
    except ArmCostError:
        return False
    return True


SIDE = 24
SET_UP = "needs what `python -m benchmarks.arm_cost setup` downloads"
needs_tvm = pytest.mark.skipif(not there(tvm_folder()), reason=SET_UP)
needs_rivals = pytest.mark.skipif(not there(rivals_folder()), reason=SET_UP)
pytestmark = needs_tools


@needs_tvm
@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a76"])
def test_a_kernel_is_right_and_stays_below_the_limit(name: str) -> None:
    first, second = (kernels.measure_one((48, 64, 32), 8, 0.25, core_of(name)) for _ in range(2))
    assert 0.05 < first.fraction < 1
    assert first.density == 0.25
    # At least the multiply-adds, of four floats each; a store takes eight at most.
    assert first.cost.instructions > 0.25 * 48 * 64 * 32 / 4
    assert first.cost.stores >= 48 * 32 / 8
    assert second.cost.cycles == pytest.approx(first.cost.cycles, rel=1e-3)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    """``relu(conv3x3(x))`` and ``conv1x1`` behind it, with 8x1 blocks in the second."""
    rng = np.random.default_rng(5)
    keep = np.repeat(rng.random((4, 16)) < 0.25, 8, axis=0)[:, :, None, None]
    weights = {
        "w1": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "w2": (keep * rng.standard_normal((32, 16, 1, 1))).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, SIDE, SIDE))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 32, SIDE, SIDE))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path_factory.mktemp("network") / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    assert ports(path)[0][0].shape == (1, 3, SIDE, SIDE)
    return ModelInput("tiny", "tiny", "8x1", path)


@needs_tvm
def test_a_network_of_ours_is_told_layer_by_layer(network: ModelInput) -> None:
    pytest.importorskip("onnxruntime")
    (ran, report), (again, _) = (run_ours(network, core_of("cortex-a76")) for _ in range(2))
    assert ran.error < 1e-5
    costs = layer_costs(ran.functions, report)
    assert {layer.name for layer in report.layers} <= set(costs)
    vectors = {layer.name: layer.flops_kept / 2 / 4 for layer in report.layers}
    assert all(costs[name].instructions > count for name, count in vectors.items())
    repeated = layer_costs(again.functions, report)
    # What the runner prints of its times is not the same each time; the layers are.
    assert {name: repeated[name].cycles for name in vectors} == pytest.approx(
        {name: costs[name].cycles for name in vectors}, rel=1e-3
    )


@needs_rivals
def test_other_runtimes_run_under_emulation(network: ModelInput, tmp_path: Path) -> None:
    pytest.importorskip("MNN")
    pytest.importorskip("onnxruntime")
    reference = Reference.of(network.path, tmp_path)
    ran = rivals.execute(network, "mnn", reference, core_of("cortex-a76"))
    assert ran.error < 1e-5
    dense = SIDE * SIDE * (16 * 27 + 32 * 16)
    assert sum(cost.instructions for cost in ran.functions.values()) > dense / 4
    assert ran.version


def test_a_runtime_that_cannot_convert_says_so(network: ModelInput) -> None:
    broken = ModelInput("broken", "broken", "", Path(__file__))
    with pytest.raises(ArmCostError, match=r"broken for mnn: (failed|unsupported|missing)"):
        rivals.converted(broken, "mnn")


def test_what_was_not_set_up_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArmCostError, match="arm_cost setup"):
        require(tmp_path / "nothing")


def test_runtimes_see_the_core_that_is_emulated() -> None:
    text = cpu_info(core_of("cortex-a53"), 1)
    assert "CPU part\t: 0xd03\n" in text
    assert "asimddp" not in text
    assert "asimddp" in cpu_info(core_of("cortex-a76"), 0)


def candidate(size: int, folder: Path) -> meta_schedule.runner.RunnerInput:
    """``y = 2 x`` as MetaSchedule's builder hands it to a runner."""
    x = te.placeholder((size,), "float32", name="x")
    y = te.compute((size,), lambda i: x[i] * 2.0, name="y")
    module = tvm.IRModule({"main": te.create_prim_func([x, y])})
    path = folder / f"{size}.tar"
    tvm.compile(module, resolve("cortex-a76").to_tvm()).export_library(str(path), fcompile=tar)
    shapes = [meta_schedule.arg_info.TensorInfo("float32", (size,)) for _ in range(2)]
    return meta_schedule.runner.RunnerInput(str(path), "cpu", shapes)


@needs_tvm
def test_metaschedule_can_tune_on_it(tmp_path: Path) -> None:
    sizes = (1 << 10, 1 << 14)
    tuner = runner(core_of("cortex-a76"), jobs=2)
    results = [f.result() for f in tuner.run([candidate(size, tmp_path) for size in sizes])]
    assert [result.error_msg for result in results] == [None, None]
    small, large = (float(result.run_secs[0]) / SECONDS_PER_CYCLE for result in results)
    # Two vectors of four floats in and out per cycle at the very best.
    assert large > sizes[1] / 8
    assert 8 < large / small < 17


@needs_tvm
def test_networks_are_tuned_on_counted_cycles(network: ModelInput, tmp_path: Path) -> None:
    log, core = tmp_path / "log.jsonl", core_of("cortex-a76")
    measuring = runner(core, allocate=contents_of)
    report = tvm_pivot.tune(network.path, core.name, log=log, trials=1, runner=measuring)
    records = read(log).records
    assert {record.decisions["stage"] for record in records} >= {"rule", "final"}
    by_choice: dict[str, set[float]] = {}
    for record in records:
        key = f"{record.task.problem} {record.decisions['choice']}"
        by_choice.setdefault(key, set()).update(record.seconds)
    assert all(len(seconds) == 1 for seconds in by_choice.values())
    gains = gain.of_layers(network, core, log)
    assert [one.layers for one in gains] == [len(task.layers) for task in report.tasks]
    for one, task in zip(gains, report.tasks, strict=True):
        assert one.gain == pytest.approx(task.gain)
    rule, tuned = gain.of_network(network, core, log)  # which checks the outputs
    assert tuned <= rule


@needs_tvm
@pytest.mark.parametrize("core", ["cortex-a53", "cortex-a76"])
def test_points_of_the_space_compute_the_convolution(core: str, tmp_path: Path) -> None:
    layer = conv_layer(size=10, stride=2)
    task, g = task_of(layer, resolve(core)), layer.geometry
    by_entries = {choice.tile.entries: choice for choice in task.choices}
    assert (len(by_entries) > 1) == resolve(core).in_order  # others load as LLVM orders it
    for choice in (task.rule, *by_entries.values(), *list(task.choices)[::97][:4]):
        path = Path(build_candidate(task, choice.decisions(), str(tmp_path), "candidate"))
        trial = Trial(path, "cpu", tuple(arguments_of(path)))
        arguments = arguments_for(contents_of, trial)
        _, (x, *_, y) = execute(path, "main", arguments, core_of(core))
        with np.load(path.with_suffix(".npz")) as tables:
            bias = np.empty(g.outputs, np.float32)
            bias[tables["rows"]] = tables["bias"]
        x = x.reshape(1, g.channels, g.y.size, g.x.size)
        want = np.maximum(convolved(layer, x, bias), 0.0)
        np.testing.assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-5)


@needs_tvm
def test_a_candidate_that_fails_is_a_failed_trial(tmp_path: Path) -> None:
    path, damaged = tmp_path / "damaged.tar", tmp_path / "lib0.o"
    damaged.write_text("no object")
    tar(str(path), [str(damaged)])
    trial = meta_schedule.runner.RunnerInput(str(path), "cpu", [])
    (failed,) = (future.result() for future in runner(core_of("cortex-a76")).run([trial]))
    assert "failed" in failed.error_msg
