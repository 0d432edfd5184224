"""The runtime in C, on this machine: it computes what a session does, and refuses the rest."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_kernels import pruned, relax_module
from tvm import relax

import tvm_pivot
from tvm_pivot import runner
from tvm_pivot.session import Session
from tvm_pivot.targets import resolve

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runner") / "run"
    command, *rest = runner.compile_command(path)
    subprocess.run([command, *STRICT, *rest], check=True)
    return path


def call(program: Path, *words: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, words)], cwd=folder, capture_output=True, text=True
    )


def outputs_of(
    program: Path, net: Session, inputs: Sequence[np.ndarray], folder: Path, *words: Any
) -> list[np.ndarray]:
    exported = net.export(folder / "net")
    for number, array in enumerate(inputs):
        np.save(folder / f"x{number}.npy", array)
    files = [f"x{number}.npy" for number in range(len(inputs))]
    done = call(program, exported / "lib.so", *words, *files, folder=folder)
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"output{number}.npy") for number in range(len(net.outputs))]


def layers(batch: int = 1) -> Session:
    """Two pruned layers, the second one large enough for several threads."""
    rng = np.random.default_rng(3)
    first = pruned(rng, 64, 24, 8, 0.3).reshape(64, 24, 1, 1)
    second = pruned(rng, 64, 64 * 9, 8, 0.3).reshape(64, 64, 3, 3)

    def body(builder: relax.BlockBuilder, x: Any) -> Any:
        y = builder.emit(relax.op.nn.conv2d(x, relax.const(first)))
        y = builder.emit(relax.op.nn.relu(y))
        return relax.op.nn.conv2d(y, relax.const(second), padding=1)

    return tvm_pivot.build(relax_module([(batch, 24, 30, 30)], body))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_outputs_are_those_of_a_session(program: Path, threads: int, tmp_path: Path) -> None:
    net = layers(batch=2)
    x = np.random.default_rng(0).standard_normal(net.inputs[0].shape).astype(np.float32)
    (y,) = outputs_of(program, net, [x], tmp_path, "--threads", threads, "--repeat", 20)
    np.testing.assert_allclose(y, net.run(x), rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs(program: Path, tmp_path: Path) -> None:
    a, b = np.full((2, 3), 3, np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    total, difference = outputs_of(program, tiny.two_by_two(), [a, b], tmp_path)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_array_equal(difference, a - b)


@pytest.mark.parametrize("kind", ["constant", "input", "twice", "reshaped"])
def test_outputs_that_nothing_computes(program: Path, kind: str, tmp_path: Path) -> None:
    x, c = np.arange(6, dtype=np.float32).reshape(2, 3), np.full((2, 3), 7, np.float32)
    made: dict[str, tuple[Any, list[np.ndarray]]] = {
        "constant": (lambda x: relax.const(c), [c]),
        "input": (lambda x: x, [x]),
        "twice": (lambda x: [x, x], [x, x]),
        "reshaped": (lambda x: relax.op.reshape(x, (3, 2)), [x.reshape(3, 2)]),
    }
    body, want = made[kind]
    specs = [("x", (2, 3), "float32")]
    outputs = [(f"y{i}", y.shape, "float32") for i, y in enumerate(want)]
    net = Session(tiny.compiled(specs, body), tiny.manifest(specs, outputs))
    for found, right in zip(outputs_of(program, net, [x], tmp_path), want, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("dtype", ["float32", "int64", "int8"])
def test_types(program: Path, dtype: str, tmp_path: Path) -> None:
    x = np.arange(-8, 8).astype(dtype).reshape(1, 16)
    (y,) = outputs_of(program, tiny.relu(dtype=dtype), [x], tmp_path)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_files_of_bare_numbers(program: Path, tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    x.tofile(tmp_path / "x.bin")
    library = tiny.relu().export(tmp_path / "net") / "lib.so"
    done = call(program, library, "--raw", "--out", "y", "x.bin", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.fromfile(tmp_path / "y0.bin", np.float32), np.maximum(x, 0))


def test_what_the_readme_says_can_be_done(tmp_path: Path) -> None:
    folder = tiny.relu().export(tmp_path / "net")
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    np.save(folder / "input0.npy", x)
    text = (folder / "README.md").read_text()
    commands = re.findall(r"^    ((?:cc|\./run) .*)$", text, re.M)
    assert len(commands) == 2
    for command in commands:
        subprocess.run(shlex.split(command), cwd=folder, check=True)
    np.testing.assert_array_equal(np.load(folder / "output0.npy"), np.maximum(x, 0))


EMBEDDING = r"""
#include <stdio.h>
#include <string.h>
#include "pivot.h"

int main(int argc, char **argv)
{
    pivot_network *nets[2];
    for (int i = 0; i < 2; i++) {
        nets[i] = pivot_open(argv[1], 1 + i);
        if (argc != 2 || nets[i] == NULL) return puts(pivot_error()), 1;
        const pivot_tensor *x = pivot_input(nets[i], 0);
        for (size_t j = 0; j < pivot_bytes(x) / 4; j++) ((float *)x->data)[j] = i ? 1.f : -1.f;
    }
    for (int i = 0; i < 2; i++)
        if (pivot_run(nets[i])) return puts(pivot_error()), 1;
    for (int i = 0; i < 2; i++) {
        const pivot_tensor *y = pivot_output(nets[i], 0);
        printf("%d %d %lld %c %g\n", y->ndim, y->item_bytes, (long long)y->shape[1], y->kind,
               ((float *)y->data)[3]);
        pivot_close(nets[i]);
    }
    return pivot_open("absent.so", 1) != NULL;
}
"""


def test_a_program_of_ones_own(tmp_path: Path) -> None:
    folder = tiny.relu().export(tmp_path / "net")
    (folder / "mine.c").write_text(EMBEDDING)
    command = runner.compile_command("mine", folder=Path())
    command[command.index("run.c")] = "mine.c"
    subprocess.run(command, cwd=folder, check=True)
    done = call(folder / "mine", "./lib.so", folder=folder)
    assert (done.returncode, done.stdout) == (0, "2 4 16 f 0\n2 4 16 f 1\n")


def test_it_says_what_is_wrong(program: Path, tmp_path: Path) -> None:
    x = np.ones((1, 16), np.float32)
    outputs_of(program, tiny.relu(), [x], tmp_path)
    library = tmp_path / "net/lib.so"
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.ones((2, 3), np.float32)))
    np.save(tmp_path / "double.npy", np.ones((1, 16)))
    np.save(tmp_path / "long.npy", np.ones((1, 17), np.float32))
    (tmp_path / "short.npy").write_bytes((tmp_path / "x0.npy").read_bytes()[:-4])
    (tmp_path / "text.npy").write_text("not an array")
    takes = "the network takes (1, 16) of '<f4'"
    for words, message in (
        ([], "usage: run lib.so"),
        ([library, "--repeat"], "--repeat of what?"),
        ([library, "--repeat", "many"], "--repeat many: no such number"),
        ([library, "--wrong"], "unknown option --wrong"),
        ([library], "the network takes 1 inputs, not 0"),
        ([library, "absent.npy"], "absent.npy cannot be read"),
        ([library, "text.npy"], "text.npy is no .npy file"),
        ([library, "short.npy"], "short.npy is too short"),
        ([library, "fortran.npy"], "fortran.npy is in Fortran order"),
        ([library, "long.npy"], f"long.npy holds (1, 17) of type '<f4', {takes}"),
        ([library, "double.npy"], f"double.npy holds (1, 16) of type '<f8', {takes}"),
        ([library, "--out", "absent/y", "x0.npy"], "absent/y0.npy cannot be written"),
        ([library, "--threads", "1000", "x0.npy"], "1000 threads cannot be had"),
        (["absent.so", "x0.npy"], "absent.so"),
    ):
        done = call(program, *words, folder=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr


def test_networks_that_need_tvms_runtime_are_refused(program: Path, tmp_path: Path) -> None:
    specs = [("x", (1, 16), "float32")]
    executable = tiny.compiled(specs, relax.op.sort)
    net = Session(executable, tiny.manifest(specs, [("y", (1, 16), "float32")]))
    library = net.export(tmp_path / "net") / "lib.so"
    done = call(program, library, "x.npy", folder=tmp_path)
    assert done.returncode == 1
    assert "needs TVM's runtime" in done.stderr


def test_other_libraries_are_refused(program: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.c").write_text("int nothing;\n")
    command = ["cc", "-shared", "-o", "empty.so", "empty.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = call(program, "empty.so", folder=tmp_path)
    assert "./empty.so cannot be used: it has no network" in done.stderr
    library = tiny.relu().export(tmp_path / "net") / "lib.so"
    data = library.read_bytes()
    magic = (0xD225DE2F4214151E).to_bytes(8, "little")
    assert data.count(magic) == 1
    library.write_bytes(data.replace(magic, bytes(8)))
    assert "compiled by another TVM than 0.27" in call(program, library, folder=tmp_path).stderr
    cut = data.index(magic) - 8  # how long the tables are
    library.write_bytes(data[:cut] + (40).to_bytes(8, "little") + data[cut + 8 :])
    assert "it is damaged" in call(program, library, folder=tmp_path).stderr


def test_gpus_come_without_it() -> None:
    from tvm_pivot import deployment

    manifest = tiny.manifest([], [], resolve("h100"))
    assert list(deployment.files(manifest)) == ["README.md"]


def test_weights_that_are_not_the_networks_are_refused(program: Path, tmp_path: Path) -> None:
    net = layers()
    np.save(tmp_path / "x0.npy", np.ones(net.inputs[0].shape, np.float32))
    folder = net.export(tmp_path / "net")
    weights = (folder / "weights.bin").read_bytes()
    for data in (weights[:-64], weights + bytes(64), b""):
        (folder / "weights.bin").write_bytes(data)
        done = call(program, folder / "lib.so", "x0.npy", folder=tmp_path)
        assert done.returncode == 1
        assert "weights.bin is not of this network" in done.stderr
    (folder / "weights.bin").unlink()
    done = call(program, folder / "lib.so", "x0.npy", folder=tmp_path)
    assert done.returncode == 1
    assert "weights.bin cannot be read" in done.stderr
