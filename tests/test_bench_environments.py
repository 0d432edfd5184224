"""Where runtimes are installed, the machine's description, and what outputs are checked against."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_runtimes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tvm_pivot.bench import environments, machine
from tvm_pivot.bench.reference import Reference, complaint, largest_error, make_inputs
from tvm_pivot.bench.runtimes import ADAPTERS, Environment, Runtime
from tvm_pivot.bench.runtimes.protocol import Port
from tvm_pivot.bench.specs import RuntimeSpec
from tvm_pivot.errors import InputError, PivotError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def use(
    monkeypatch: pytest.MonkeyPatch, environment: Environment, converter: Environment | None = None
) -> type[Runtime]:
    """Make a runtime with some environments the only one there is."""

    class Made(bench_runtimes.Right):
        pass

    Made.environment, Made.converter = environment, converter
    found = RuntimeSpec("right", Made, Path(bench_runtimes.__file__))
    monkeypatch.setattr(environments, "resolve", lambda names: [found])
    return Made


def test_where_environments_are(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Environment("some", (), ())
    assert environments.python_of(Environment(None, (), ())) == Path(sys.executable)
    assert environments.python_of(own) == cache_folder / "tvm_pivot/envs/some/bin/python"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environments.folder_of("some") == Path.home() / ".cache/tvm_pivot/envs/some"


def test_modules_beside_tvm_pivot_are_found_without_importing_them() -> None:
    assert environments.is_installed(Environment(None, (), ("numpy", "antigravity")))
    assert "antigravity" not in sys.modules, "it opens a browser"
    assert not environments.is_installed(Environment(None, (), ("numpy", "no_such_module")))
    assert not environments.is_installed(Environment(None, (), ("no_such_module.part",)))
    assert not environments.is_installed(Environment("not-made", (), ("sys",)))


def test_what_installs_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Environment(None, ("a>=1", "b==2"), ("a", "b"))
    own = Environment("own", ("c",), ("c",))
    runtime = use(monkeypatch, beside)
    assert environments.install_command("right") == "pip install 'a>=1' b==2"
    assert environments.environments_of(runtime) == (beside,)
    assert not environments.is_ready(runtime)
    runtime = use(monkeypatch, beside, converter=own)
    assert environments.install_command("right") == "tvm-pivot bench --install right"
    assert environments.environments_of(runtime) == (beside, own)
    use(monkeypatch, own, converter=own)
    assert environments.install_command("right") == "tvm-pivot bench --install right"


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_runtime_can_be_installed(name: str) -> None:
    command = environments.install_command(name)
    assert command.startswith(("pip install", f"tvm-pivot bench --install {name}"))


def wheel(folder: Path) -> Path:
    """A package with one module, which pip can install without a network."""
    path, info = folder / "tinything-1.0-py3-none-any.whl", "tinything-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinything.py", "")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def run_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the pip there is, and no network: installing pip takes most of the time."""
    run = environments._run

    def faster(command: Sequence[str]) -> None:
        python, _, tool, *rest = command
        pip = [sys.executable, "-m", "pip", "--python", python, *rest]
        run([python, "-m", "venv", "--without-pip", *rest] if tool == "venv" else pip)

    monkeypatch.setattr(environments, "_run", faster)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


def test_installing_an_environment_of_its_own(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_faster(monkeypatch)
    said: list[str] = []
    broken = Environment("tiny", (str(wheel(tmp_path)), "no-such-package"), ("tinything",))
    use(monkeypatch, broken)
    with pytest.raises(PivotError, match=r"(?s)pip .*install .* failed:.*no-such-package"):
        environments.install(["right"], said.append)
    # As if pip had been killed after the only module that is looked for.
    right = Environment("tiny", (str(wheel(tmp_path)),), ("tinything",))
    (packages,) = environments.folder_of("tiny").glob("lib/python*/site-packages")
    (packages / "tinything.py").touch()
    assert not environments.is_installed(right)
    runtime = use(monkeypatch, right)
    environments.install(["right"], said.append)
    assert environments.is_ready(runtime)
    assert importlib.util.find_spec("tinything") is None
    environments.install(["right"], said.append)
    assert said[-1].startswith("there already: ")
    assert [path.name for path in (cache_folder / "tvm_pivot/envs").iterdir()] == ["tiny"]


def test_torch_is_installed_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(environments, "_run", lambda command: commands.append(list(command)))
    packages = (environments.TORCH, "no-such-thing==1")
    use(monkeypatch, Environment(None, packages, ("no_such_thing",), torch=True))
    with pytest.raises(PivotError, match="not all of no_such_thing can be found"):
        environments.install(["right"], lambda line: None)
    assert [command[-1] for command in commands] == list(packages)
    assert all(command[:4] == [sys.executable, "-m", "pip", "install"] for command in commands)


def test_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = machine.describe_machine()
    assert here.cpu
    assert here.cores >= 1
    assert here.memory_gb > 0.1
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor : 0\nmodel name\t: Some CPU: fast\nflags\t\t: fpu avx2 fma avx512f amx_tile\n"
        "\nprocessor : 1\nmodel name : Other\n"
    )
    monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
    there = machine.describe_machine()
    assert there.cpu == "Some CPU: fast"
    assert there.features == ("avx2", "fma", "avx512f", "amx")
    cpuinfo.write_text("processor : 0\nFeatures : fp asimd sve\n")
    assert machine.describe_machine().features == ("neon", "sve")


RIGHT = np.array([[1.0, -4.0]], np.float32)


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        ({"y": RIGHT}, 0.0),
        ({"y": RIGHT + np.float32([[0.5, 0.0]])}, 0.125),
        ({"y": RIGHT.astype(np.float64), "more": RIGHT}, 0.0),
        ({"y": RIGHT[0]}, np.inf),
        ({"y": RIGHT * np.float32(np.nan)}, np.inf),
        ({"y": RIGHT * np.float32(np.inf)}, np.inf),
        ({"y": np.array([["1", "-4"]])}, np.inf),
        ({}, np.inf),
    ],
)
def test_errors(outputs: dict[str, Any], error: float) -> None:
    assert largest_error(outputs, {"y": RIGHT}) == error
    assert bool(complaint(outputs, {"y": RIGHT})) == (error == np.inf)


def test_errors_of_several_outputs_and_of_zeros() -> None:
    zeros = np.zeros((2,), np.float32)
    expected = {"y": RIGHT, "z": zeros}
    assert largest_error({"y": RIGHT, "z": zeros}, expected) == 0.0
    assert largest_error({"y": RIGHT, "z": zeros + 1}, expected) == np.inf
    assert largest_error({"y": RIGHT * 2, "z": zeros}, expected) == 1.0


def test_samples_differ_and_are_the_same_every_time() -> None:
    wanted = (Port("x", (2, 3), "float32"), Port("i", (4,), "int64"), Port("b", (1,), "bool"))
    (a, b), (again, _) = make_inputs(wanted), make_inputs(wanted)
    for port in wanted:
        assert a[port.name].dtype == b[port.name].dtype == np.dtype(port.dtype)
        assert a[port.name].shape == port.shape
        assert (a[port.name] != b[port.name]).all()
        np.testing.assert_array_equal(a[port.name], again[port.name])
    assert set(np.unique([a["i"], b["i"]])) == {0, 1}


def save(path: Path, op: str, size: int | str) -> Path:
    value = helper.make_tensor_value_info
    nodes = [helper.make_node(op, ["x"], ["y"])]
    x, y = (value(name, TensorProto.FLOAT, [size]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


@pytest.mark.parametrize("with_onnxruntime", [True, False])
def test_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_onnxruntime: bool
) -> None:
    find = importlib.util.find_spec
    if not with_onnxruntime:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else find(n, *a)
        )
    found = Reference.of(save(tmp_path / "net.onnx", "Abs", 5), tmp_path)
    assert found.name.startswith("ONNX Runtime" if with_onnxruntime else "the reference evaluator")
    for sample in found.samples:
        np.testing.assert_array_equal(sample.expected["y"], np.abs(sample.inputs["x"]))
        with np.load(sample.file) as arrays:
            np.testing.assert_array_equal(arrays["arr_0"], sample.inputs["x"])


def test_models_without_a_reference(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shape is not static; export it with fixed sizes"):
        Reference.of(save(tmp_path / "open.onnx", "Abs", "n"), tmp_path)
    with pytest.raises(InputError, match="'y' holds values that are not finite"):
        Reference.of(save(tmp_path / "log.onnx", "Log", 5), tmp_path)
    with pytest.raises(InputError, match="cannot be computed"):
        Reference.of(save(tmp_path / "bad.onnx", "NoSuchOperator", 5), tmp_path)
