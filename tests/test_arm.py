"""Networks for ARM: what is compiled here runs there, and gives what onnxruntime gives."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from emulated import CPU_V7, PYTHON, ROOT, needed, needed_python, needed_v7, run
from hypothesis import HealthCheck, example, given, settings
from onnx import helper, numpy_helper
from test_kernels import (
    CASE,
    DENSE,
    conv_cases,
    dense_cases,
    pruned,
    relax_module,
    run_conv,
    run_dense,
)
from test_networks import Case, assert_close, inputs_for, run_onnxruntime
from tvm import relax
from typer.testing import CliRunner

import tvm_pivot
from benchmarks import zoo
from tvm_pivot import artifact, linking
from tvm_pivot.cli import app
from tvm_pivot.errors import ArtifactError, PivotError
from tvm_pivot.remote import Address
from tvm_pivot.targets import PRESETS


def small(target: str = "arm") -> tvm_pivot.Session:
    """A pruned layer with ReLU."""
    weight = pruned(np.random.default_rng(3), 32, 24, 8, 0.3).reshape(32, 24, 1, 1)

    def body(builder: relax.BlockBuilder, x: Any) -> Any:
        return relax.op.nn.relu(builder.emit(relax.op.nn.conv2d(x, relax.const(weight))))

    return tvm_pivot.build(relax_module([(1, 24, 6, 10)], body), target=target)


def input_of(net: tvm_pivot.Session) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.standard_normal(net.inputs[0].shape).astype(np.float32)


NETWORKS = (
    (Case("mlp", "8x1@0.1"), "cortex-a76"),
    (Case("mlp_b1", "1x1@0.1"), "arm"),
    (Case("lstm", "8x1@0.1", length=4), "cortex-a72"),
    (Case("gru", "4x1@0.1", length=4), "raspberry-pi-5"),
    (Case("resnet18", "8x1@0.1", image=32), "cortex-a53"),
    (Case("resnet20_cifar", "1x1@0.1"), "neoverse-v1"),
    (Case("bert2", "4x1@0.1", length=16), "cortex-a55"),
    (Case("mobilenet_v1", "8x1@0.1", image=64), "raspberry-pi-4"),
    (Case("mobilenet_v2", "dense", image=64), "apple-m1"),
    (Case("resnet50", "8x1@0.1", image=32), "cortex-x1"),
    (Case("vgg16", "8x1@0.1", image=32), "raspberry-pi-3"),
    (Case("resnet56_cifar", "4x1@0.1"), "neoverse-n1"),
    (Case("ultraface", "8x1@0.1"), "android-arm64"),
    pytest.param(Case("resnet18", "8x1@0.1", image=32), "armv7-neon", marks=needed_v7),
    pytest.param(Case("lstm", "1x1@0.1", length=4), "armv7-neon", marks=needed_v7),
)
CPUS = {
    "cortex-a53": "cortex-a53",
    "raspberry-pi-3": "cortex-a53",
    "cortex-a72": "cortex-a72",
    "armv7-neon": CPU_V7,
}


@needed
@pytest.mark.parametrize(("case", "target"), NETWORKS, ids=str)
def test_networks_under_emulation(
    case: Case, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if case.name.endswith("_cifar") or case.name == "ultraface":
        request.getfixturevalue("shared_data")
    path = zoo.load(case.name, case.variant, image=case.image, length=case.length)
    net = tvm_pivot.build(path, target=target)
    x = inputs_for(case)[0]
    outputs = run(net, [x], tmp_path, CPUS.get(target, "max"))
    assert_close(tuple(outputs), run_onnxruntime(path, x))
    kind = "armv7l" if target == "armv7-neon" else "aarch64"
    with pytest.raises(PivotError, match=rf"made for target '{target}' \(arm, {kind}\), which"):
        net.run(x)


@needed
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=conv_cases())
@example(case={**CASE, "kernel": (1, 1), "pad": (0, 0, 0, 0), "size": (7, 7)})
@example(case={**CASE, "channels": 24, "outputs": 24, "groups": 24, "size": (30, 17)})
@example(case={**CASE, "kernel": (1, 1), "pad": (0, 0, 0, 0), "size": (1, 1), "batch": 3})
@example(case={**CASE, "pad": (0, 3, 2, 0), "size": (5, 40), "epilogue": "residual"})
@pytest.mark.parametrize(
    "target", ["cortex-a53", "cortex-a76", pytest.param("armv7-neon", marks=needed_v7)]
)
def test_convolutions_of_every_kind(target: str, case: dict[str, Any], tmp_path: Path) -> None:
    cpu = CPUS.get(target, "max")
    run_conv(case, target, lambda net, *inputs: run(net, inputs, tmp_path, cpu)[0])


@needed
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=dense_cases())
@example(case={**DENSE, "inputs": 40, "rows": 4, "columns": 120})
@example(case=DENSE)
def test_matrices_of_every_kind(case: dict[str, Any], tmp_path: Path) -> None:
    run_dense(case, "arm", run=lambda net, *inputs: run(net, inputs, tmp_path)[0])


@needed
@needed_python
def test_python_on_the_device_needs_the_runtime_alone(tmp_path: Path) -> None:
    net = small()
    x = input_of(net)
    (want,) = run(net, [x], tmp_path)
    code = (
        "import numpy, tvm_pivot; net = tvm_pivot.load('net', threads=1); "
        "numpy.save('y.npy', net.run(numpy.load('input0.npy'))); "
        "import sys; assert 'tvm' not in sys.modules; print(net)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(PYTHON), "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), want)


@pytest.fixture
def server() -> Iterator[str]:
    """The address of an RPC server on an emulated device."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(port)]
    extra = PYTHON.parent / "site/tvm/lib/libtvm_runtime_extra.so"
    process = subprocess.Popen(
        [str(PYTHON), *words, "--port-end", str(port + 1), "--load-library", str(extra)],
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@needed
@needed_python
def test_networks_run_over_rpc(server: str, tmp_path: Path) -> None:
    net = small()
    x = input_of(net)
    (want,) = run(net, [x], tmp_path)
    np.testing.assert_array_equal(net.run(x, remote=server), want)
    np.testing.assert_array_equal(net.run({net.inputs[0].name: x}, remote=server), want)
    assert all(seconds > 0 for seconds in net.on(server).times([x], 3))
    with pytest.raises(PivotError, match="expected float32"):
        net.run(x[:, :1], remote=server)


@needed
@needed_python
def test_bench_on_a_device(server: str, tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 24, 6, 10])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    weight = pruned(np.random.default_rng(3), 32, 24, 8, 0.1).reshape(32, 24, 1, 1)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "net", [x], [y], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "net.onnx")
    words = ["bench", str(tmp_path / "net.onnx"), "--rpc", server, "-t", "cortex-a76"]
    done = CliRunner().invoke(app, [*words, "--rounds", "3"])
    assert done.exit_code == 0, done.output
    rows = [line for line in done.output.splitlines() if "sparse" in line or "dense" in line]
    assert len(rows) == 2
    done = CliRunner().invoke(app, ["bench", str(tmp_path / "net.onnx"), "--rpc", "nowhere"])
    assert done.exit_code == 1


def test_addresses() -> None:
    assert Address.parse("pi:9090") == Address("pi", 9090)
    assert Address.parse("[::1]:9190/pi4") == Address("::1", 9190, "pi4")
    for wrong in ("pi", "pi:", ":1", "pi:x", "pi:0", "pi:65536", "", "/k"):
        with pytest.raises(PivotError, match="is no address"):
            Address.parse(wrong)
    with pytest.raises(PivotError, match=r"no RPC server answers at 127\.0\.0\.1:1"):
        small().run(input_of(small()), remote="127.0.0.1:1")


def test_a_missing_linker_names_its_package(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ArtifactError, match="apt-get install g\\+\\+-aarch64-linux-gnu"):
        small().export(tmp_path / "net.pivot")
    odd = replace(PRESETS["arm"], tvm={**PRESETS["arm"].tvm, "mtriple": "aarch64-none-elf"})
    with pytest.raises(ArtifactError, match="no linker is known for aarch64-none-elf"):
        linking.linker(odd)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-ld") is None, reason="needs a linker for ARM")
@pytest.mark.parametrize("target", ["arm", "android-arm64"])
def test_binutils_alone_can_link(target: str, tmp_path: Path, monkeypatch: Any) -> None:
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if "g++" in name else found(name))
    path = small(target).export(tmp_path / "net.pivot")
    assert artifact.read_manifest(path).target == PRESETS[target]
    with pytest.raises(ArtifactError, match=r"\(arm, aarch64\), which this x86_64 machine cannot"):
        tvm_pivot.load(path)
