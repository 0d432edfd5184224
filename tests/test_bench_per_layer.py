"""Times of steps inside whole runs, and the machine's limits. No test asserts a speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import tvm
from onnx import TensorProto, helper, numpy_helper

from tvm_pivot import build, schema
from tvm_pivot.bench import per_layer, roofline
from tvm_pivot.bench.results import LayerTime, PerLayer, Roofline
from tvm_pivot.bench.watch import Watch
from tvm_pivot.errors import PivotError
from tvm_pivot.session import Session
from tvm_pivot.targets import resolve

LIMITS = Roofline(1, 100.0, 50.0, 20.0, 5.0, 1 << 20, 32 << 20)
RUNS = 5

Pair = tuple[Session, Session]


def planted(*shape: int, density: float = 0.25, seed: int = 0) -> np.ndarray[Any, Any]:
    """Weights with whole 8 x 1 blocks of zeros; a density of 1 keeps all."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    kept = np.repeat(rng.random((-(-rows // 8), columns)) < density, 8, axis=0)[:rows]
    return np.where(kept, rng.uniform(0.5, 1.5, kept.shape), 0).astype(np.float32).reshape(shape)


def sessions(
    path: Path,
    nodes: Sequence[Any],
    weights: Mapping[str, np.ndarray[Any, Any]],
    takes: Sequence[int],
    gives: Sequence[int],
) -> Pair:
    """The sparse and the dense build of a network ``x -> y``."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, takes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, gives)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return build(path, threads=1), build(path, sparse=False, threads=1)


@pytest.fixture(scope="module")
def conv_net(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Four layers, of which two are alike and one is dense."""
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "first.weight"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "second.weight"], ["e"], pads=[1] * 4),
        helper.make_node("Relu", ["e"], ["f"]),
        helper.make_node("MaxPool", ["f"], ["g"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("MatMul", ["h", "head.weight"], ["y"]),
    ]
    weights = {
        "stem.weight": planted(32, 3, 3, 3, density=1),
        "first.weight": planted(32, 32, 3, 3, density=0.1, seed=1),
        "second.weight": planted(32, 32, 3, 3, density=0.3, seed=2),
        "head.weight": np.ascontiguousarray(planted(16, 32 * 64, seed=3).T),
    }
    path = tmp_path_factory.mktemp("conv") / "conv.onnx"
    return sessions(path, nodes, weights, (1, 3, 16, 16), (1, 16))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    nodes = [
        helper.make_node("MatMul", ["x", "one.weight"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "two.weight"], ["c"]),
        helper.make_node("Softmax", ["c"], ["y"]),
    ]
    weights = {
        f"{name}.weight": planted(256, 256, seed=i).T for i, name in enumerate(("one", "two"))
    }
    path = tmp_path_factory.mktemp("mlp") / "mlp.onnx"
    return sessions(path, nodes, weights, (32, 256), (32, 256))


def layers_of(found: PerLayer) -> list[LayerTime]:
    return [layer for layer in found.layers if layer.kind != "other"]


@pytest.mark.parametrize("name", ["conv_net", "mlp"])
def test_each_layer_once_in_order_with_its_facts(name: str, request: Any) -> None:
    pair: Pair = request.getfixturevalue(name)
    found = per_layer.profile(pair, runs=RUNS, roofline=LIMITS)
    assert (found.model, found.threads, found.roofline) == (pair[0].manifest.name, 1, LIMITS)
    timed = layers_of(found)
    assert [layer.name for layer in timed] == [layer.name for layer in pair[0].report.layers]
    for layer, report in zip(timed, pair[0].report.layers, strict=True):
        assert (layer.kind, layer.pattern, layer.mode) == (report.op, report.pattern, report.mode)
        assert (layer.density, layer.flops) == (report.density, report.flops_kept)
        kept = 4 * report.density * np.prod(report.shape)
        # 2 * weights * pixels operations, so this many outputs; inputs are not fewer bytes.
        outputs = 4 * report.flops_dense // 2 // int(np.prod(report.shape[1:]))
        assert layer.bytes >= kept + outputs
        assert layer.ms > 0
        assert layer.dense_ms is not None and layer.dense_ms > 0
        linear = layer.dense_ms / layer.ms * layer.density
        assert layer.fraction_of_linear == pytest.approx(linear)
    for step in found.layers:
        assert step.limit_ms >= 0
        assert step.bound in ("compute", "memory")
        assert step.ms >= 0
    total = sum(step.ms for step in found.layers)
    assert 0.2 * found.total_ms < total < 5 * found.total_ms
    assert schema.loads(PerLayer, schema.dumps(found)) == found


def test_other_steps_are_there_and_have_no_operations(conv_net: Pair) -> None:
    found = per_layer.profile(conv_net, runs=RUNS, roofline=LIMITS, name="mine")
    assert found.model == "mine"
    pooling = next(step for step in found.layers if "pool" in step.name)
    assert (pooling.kind, pooling.flops, pooling.dense_ms, pooling.mode) == ("other", 0, None, "")
    assert pooling.bytes >= 4 * 32 * (256 + 64)
    names = [step.name for step in found.layers]
    assert not any(name.startswith("vm.builtin") for name in names)
    assert (
        names.index("second")
        < names.index(pooling.name)
        < names.index(conv_net[0].report.layers[-1].name)
    )


def test_limits_are_those_of_the_machine(conv_net: Pair) -> None:
    slow = Roofline(1, 1e-3, 50.0, 20.0, 5.0, 1 << 20, 32 << 20)
    for layer in layers_of(per_layer.profile(conv_net, runs=1, roofline=slow)):
        assert (layer.bound, layer.limit_ms) == ("compute", pytest.approx(layer.flops / 1e3))
    # Nothing fits into caches this small, so all bytes come from memory.
    far = Roofline(1, 1e9, 50.0, 20.0, 5.0, 1, 1)
    for step in per_layer.profile(conv_net, runs=1, roofline=far).layers:
        assert (step.bound, step.limit_ms) == ("memory", pytest.approx(step.bytes / 5e6))
    near = Roofline(1, 1e9, 50.0, 20.0, 5.0, 1 << 30, 1 << 30)
    for step in per_layer.profile(conv_net, runs=1, roofline=near).layers:
        assert step.limit_ms == pytest.approx(step.bytes / 50e6)


def test_layers_that_share_a_kernel_but_run_in_another_order(tmp_path: Path) -> None:
    """The kernel of the first adds what the second gives, so that it has to run after it."""
    nodes = [
        helper.make_node("Conv", ["x", "first.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["x", "second.weight"], ["b"], pads=[1] * 4),
        helper.make_node("Add", ["b", "x"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    # As alike as two layers can be, so that no rule and no record gives them two kernels.
    weights = dict.fromkeys(
        ("first.weight", "second.weight"), planted(32, 32, 3, 3, density=0.1, seed=1)
    )
    weights["second.weight"] = weights["first.weight"] * (np.arange(32) != 0)[:, None, None]
    pair = sessions(tmp_path / "net.onnx", nodes, weights, (1, 32, 16, 16), (1, 32, 16, 16))
    found = {layer.name: layer for layer in layers_of(per_layer.profile(pair, 1, 1, LIMITS))}
    assert len({layer.kernel for layer in pair[0].report.layers}) == 1
    assert found["first"].bytes > found["second"].bytes


def test_profiling_leaves_sessions_as_they_were(mlp: Pair) -> None:
    x = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    before = mlp[0].run(x)
    per_layer.profile(mlp, runs=2, roofline=LIMITS)
    np.testing.assert_array_equal(mlp[0].run(x), before)


def test_a_file_is_built_and_its_roofline_measured(
    conv_net: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_layer, "measure_roofline", lambda threads: LIMITS)
    given: list[Any] = []

    def fake(model: Path, *, sparse: bool = True, threads: int) -> Session:
        given.append((model, sparse, threads))
        return conv_net[0 if sparse else 1]

    monkeypatch.setattr(per_layer, "build", fake)
    found = per_layer.profile(str(tmp_path / "net.onnx"), runs=1)
    assert given == [(tmp_path / "net.onnx", True, 1), (tmp_path / "net.onnx", False, 1)]
    assert found.roofline == LIMITS


def test_what_cannot_be_profiled(mlp: Pair) -> None:
    with pytest.raises(PivotError, match="roofline is of 1 threads, not 2"):
        per_layer.profile(mlp, 2, roofline=LIMITS)
    with pytest.raises(PivotError, match="runs must be at least 1"):
        per_layer.profile(mlp, runs=0, roofline=LIMITS)
    # A session whose report lists a kernel that its library has not.
    with pytest.raises(PivotError, match="never ran: conv1"):
        per_layer.profile((tiny.relu(), tiny.relu()), runs=1, roofline=LIMITS)


def test_calls_tell_constants_from_activations(conv_net: Pair) -> None:
    watch = Watch(conv_net[0])
    kernels = {layer.kernel for layer in conv_net[0].report.layers}
    for call in watch.calls:
        assert (call.weights > 0) == (call.function in kernels)
    pooling = next(call for call in watch.calls if "pool" in call.function)
    assert pooling.activations == 4 * 32 * (256 + 64)
    watch.run()
    assert len(watch.seconds(1)) == len(watch.calls)


def test_roofline_is_positive_and_has_the_cache_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(roofline, "_LARGEST", 16 << 20)
    host = resolve("x86")
    found = roofline.measure_roofline(2)
    assert (found.threads, found.l2_bytes) == (2, 2 * host.l2_bytes)
    assert found.l3_bytes >= found.l2_bytes
    assert min(found.gflops, found.l2_gbs, found.l3_gbs, found.memory_gbs) > 0


def test_without_a_third_cache_memory_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(roofline, "_LARGEST", 16 << 20)
    monkeypatch.setattr(roofline, "_INDEX3", "/nowhere")
    assert roofline.level3_bytes() == 0
    found = roofline.measure_roofline(1)
    assert found.l3_gbs == found.memory_gbs
    assert found.l3_bytes == found.l2_bytes


@pytest.mark.parametrize(("text", "size"), [("32768K\n", 32 << 20), ("1M", 1 << 20), ("?", 0)])
def test_size_of_the_third_cache(
    text: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "size").write_text(text)
    monkeypatch.setattr(roofline, "_INDEX3", str(tmp_path / "size"))
    assert roofline.level3_bytes() == size


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_do_all_the_work_they_count(threads: int) -> None:
    host = resolve("x86")
    kernels = roofline._Kernels.compile(threads, host)
    operands = tvm.runtime.tensor(np.array([0.5, 3.0], np.float32))
    for steps, want in ((0, 0.0), (1, 3.0), (2, 4.5), (200, 6.0)):
        out = tvm.runtime.empty((threads, roofline._FMA_VECTORS * host.lanes), "float32")
        kernels.multiply_adds(operands, out, steps)
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-6)
    x = np.random.default_rng(0).random(
        (threads, 5, roofline._SUM_VECTORS * host.lanes), np.float32
    )
    out = tvm.runtime.empty((threads, x.shape[2]), "float32")
    kernels.sum(tvm.runtime.tensor(x), out, 3)
    np.testing.assert_allclose(out.numpy(), 3 * x.sum(axis=1), rtol=1e-5)


def test_multiply_adds_are_single_instructions_on_registers() -> None:
    host = resolve("x86")
    func = roofline._multiply_adds(1, host.lanes).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": func}), target=host.to_tvm())
    lines = library.mod.inspect_source("s").splitlines()
    fused = [line for line in lines if "vfmadd" in line]
    assert len(fused) >= roofline._FMA_VECTORS
    assert not any("(" in line for line in fused), "an operand lies in memory"
    assert not any("vmulps" in line for line in lines)
