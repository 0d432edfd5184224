"""Loaded networks need TVM's runtime only, and live with its compiler where that comes later."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import tiny
import tvm

from tvm_pivot import runtime

RUNS_WITHOUT_THE_COMPILER = """
import sys
import numpy as np
import tvm_pivot
net = tvm_pivot.load(sys.argv[1])
x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
y = net.run(x)
assert "tvm" not in sys.modules and "torch" not in sys.modules, sorted(sys.modules)
import tvm
from tvm import relax
machine = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[2]), tvm.cpu())
np.testing.assert_array_equal(machine["main"](tvm.runtime.tensor(x)).numpy(), y)
np.testing.assert_array_equal(net.run(x), y)
"""


def test_a_loaded_network_runs_without_the_compiler(tmp_path: Path) -> None:
    saved = tiny.relu().export(tmp_path / "relu.pivot")
    with zipfile.ZipFile(saved) as archive:
        library = archive.extract("lib.so", tmp_path)
    command = [sys.executable, "-c", RUNS_WITHOUT_THE_COMPILER, str(saved), library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_tensors_are_aligned() -> None:
    for shape in ((), (3,), (2, 5, 7)):
        tensor = runtime.empty(shape, "float32")
        array = np.from_dlpack(tensor)
        assert array.shape == shape and array.dtype == np.float32
        assert array.__array_interface__["data"][0] % 64 == 0


def test_the_version_is_the_one_that_tvm_tells() -> None:
    assert runtime.tvm_version() == tvm.__version__
