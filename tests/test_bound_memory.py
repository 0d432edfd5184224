"""Memory bound to networks: weights and buffers lie where they should, and kernels stay in them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from guarded import guarded
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import pruned, relax_module
from tvm import relax

import tvm_pivot
from tvm_pivot import memory
from tvm_pivot.errors import ArtifactError, PivotError
from tvm_pivot.memory import ALIGNMENT, Memory
from tvm_pivot.session import Session
from tvm_pivot.virtual_machine import as_tensor

DTYPES = ("float32", "float16", "int64", "int8", "bool")
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6), st.integers(0, 99))
def test_packed_arrays_come_back_bit_for_bit(forms, seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 2, shape).astype(dtype) for shape, dtype in forms]
    specs, data = memory.pack(arrays)
    bound = Memory(specs, ())
    assert data.nbytes == bound.weight_bytes
    again = bound.weights_in(data.copy())
    for array, other, place in zip(arrays, again, bound.weights_in(data), strict=True):
        assert (other.dtype, other.shape) == (array.dtype, array.shape)
        assert np.array_equal(other, array)
        assert place.__array_interface__["data"][0] % ALIGNMENT == 0 or not place.size


@pytest.mark.parametrize("size", [0, 1, 64, 4096, (2 << 20) + 64, 9 << 20])
def test_pages_are_zeros_and_can_be_written(size: int) -> None:
    data = memory.new_pages(size)
    assert data.shape == (size,) and not data.any()
    data[...] = 7
    assert data.__array_interface__["data"][0] % 4096 == 0 or not size


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Memory((), (-1,))


def layers(build: Callable[[Any, Any], Any], *shapes: tuple[int, ...]) -> Session:
    return tvm_pivot.build(relax_module(list(shapes), build), tuned=False)


def network() -> Session:
    """Two pruned convolutions around what is no layer, and two outputs: one is a view."""
    rng = np.random.default_rng(3)
    first = pruned(rng, 64, 24, 8, 0.3).reshape(64, 24, 1, 1)
    second = pruned(rng, 64, 64 * 9, 8, 0.3).reshape(64, 64, 3, 3)

    def body(builder: relax.BlockBuilder, x: Any) -> Any:
        y = builder.emit(relax.op.nn.conv2d(x, relax.const(first)))
        y = builder.emit(relax.op.nn.gelu(y))
        z = builder.emit(relax.op.nn.conv2d(y, relax.const(second), padding=1))
        return relax.Tuple([z, relax.op.reshape(builder.emit(relax.op.nn.relu(z)), (64, 900))])

    return layers(body, (1, 24, 30, 30))


def input_of(net: Session, seed: int = 0) -> Any:
    (spec,) = net.inputs
    return np.random.default_rng(seed).standard_normal(spec.shape).astype(spec.dtype)


def test_the_library_has_no_weights_and_a_run_allocates_outputs_only() -> None:
    net = network()
    weights = net.manifest.memory
    assert weights is not None
    kept = 2 * 64 * 24 * 0.3 + 64 * 64 * 9 * 0.3
    assert weights.weight_bytes > 4 * kept / 2
    calls: list[str] = []
    machine = net.virtual_machine()
    machine.module["set_instrument"](
        tvm_ffi.convert(lambda f, name, before, *_: calls.append(str(name)) if before else None)
    )
    machine.run(as_tensor(memory.new_pages(4 * 24 * 900).view(np.float32).reshape(1, 24, 30, 30)))
    assert calls.count("vm.builtin.alloc_storage") <= len(net.outputs)
    assert calls.count("vm.builtin.check_tensor_info") == len(net.inputs)


def test_outputs_are_the_callers() -> None:
    net = network()
    first = net.run(input_of(net))
    copies = [y.copy() for y in first]
    net.run(input_of(net, 1))
    for y, copy in zip(first, copies, strict=True):
        np.testing.assert_array_equal(y, copy)
    del net
    gc.collect()
    for y, copy in zip(first, copies, strict=True):
        np.testing.assert_array_equal(y, copy)


@pytest.mark.parametrize("large", [False, True])
def test_outputs_that_nothing_computes_are_copies(large: bool) -> None:
    shape = (64, 128) if large else (2, 3)
    constant = np.full(shape, 7, np.float32)

    def body(builder: relax.BlockBuilder, x: Any) -> Any:
        y = builder.emit(relax.op.nn.relu(x))
        view = builder.emit(relax.op.reshape(y, shape[::-1]))
        same = builder.emit(relax.op.reshape(x, shape[::-1]))
        return relax.Tuple([x, relax.const(constant), y, y, view, same])

    net = layers(body, shape)
    assert net.manifest.memory is not None
    x = memory.new_pages(4 * shape[0] * shape[1]).view(np.float32).reshape(shape)
    x[...] = np.arange(x.size).reshape(shape) - 3
    want = [x, constant, *[np.maximum(x, 0)] * 2, np.maximum(x, 0).reshape(shape[::-1])]
    want.append(x.reshape(shape[::-1]))
    for _ in range(2):
        got = net.run(x)
        for y, right in zip(got, want, strict=True):
            np.testing.assert_array_equal(y, right)
        for number, y in enumerate(got):
            y[...] = -number  # the caller's own: no other output, input or later run sees it
        for number, y in enumerate(got):
            assert (y == -number).all()


def test_threads_have_buffers_of_their_own() -> None:
    net = network()
    inputs = [input_of(net, seed) for seed in range(4)]
    want = [net.run(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            got = net.run(inputs[number])
            same = zip(got, want[number], strict=True)
            wrong.extend(number for a, b in same if not np.array_equal(a, b))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_equal_weights_are_kept_once() -> None:
    weight = np.random.default_rng(0).standard_normal((1, 64, 16, 16)).astype(np.float32)

    def body(builder: relax.BlockBuilder, x: Any) -> Any:
        for _ in range(3):
            x = builder.emit(relax.op.nn.relu(relax.op.add(x, relax.const(weight))))
        return x

    net = layers(body, weight.shape)
    assert net.manifest.memory is not None
    assert net.manifest.memory.weight_bytes == weight.nbytes
    want = x = input_of(net)
    for _ in range(3):
        want = np.maximum(want + weight, 0)
    np.testing.assert_array_equal(net.run(x), want)


def damaged(path: Path, member: str, data: bytes | None) -> Path:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path.with_name("damaged.pivot"), "w") as archive:
        for name, content in parts.items():
            if name != member:
                archive.writestr(name, content)
            elif data is not None:
                archive.writestr(name, data)
    return path.with_name("damaged.pivot")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = network().export(tmp_path / "net.pivot")
    with zipfile.ZipFile(path) as archive:
        weights = archive.read("weights.bin")
        document = json.loads(archive.read("manifest.json"))
    for data, message in (
        (None, "there is no weights.bin"),
        (weights[:-1], "weights.bin has .* bytes, the manifest says"),
        (weights + b"0", "weights.bin has .* bytes, the manifest says"),
        (weights[:-1] + b"?", "weights.bin is damaged: its SHA-256"),
    ):
        with pytest.raises(ArtifactError, match=message):
            tvm_pivot.load(damaged(path, "weights.bin", data))
    first = document["manifest"]["memory"]["weights"][0]
    first["shape"] = [*first["shape"], 1]
    with pytest.raises(ArtifactError, match="takes other memory"):
        tvm_pivot.load(damaged(path, "manifest.json", json.dumps(document).encode()))
    first["shape"][-1] = -1
    with pytest.raises(ArtifactError, match="negative"):
        tvm_pivot.load(damaged(path, "manifest.json", json.dumps(document).encode()))
    both = network(), tvm_pivot.load(path)
    np.testing.assert_array_equal(*(net.run(input_of(net))[0] for net in both))


def test_a_directory_keeps_weights_beside_the_library(tmp_path: Path) -> None:
    net = network()
    folder = net.export(tmp_path / "net")
    assert (folder / "weights.bin").stat().st_size == net.manifest.memory.weight_bytes  # type: ignore[union-attr]
    loaded = tvm_pivot.load(folder)
    np.testing.assert_array_equal(loaded.run(input_of(net))[0], net.run(input_of(net))[0])
    again = loaded.export(tmp_path / "again")
    assert (again / "weights.bin").read_bytes() == (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").unlink()
    with pytest.raises(ArtifactError, match=r"there is no weights\.bin"):
        tvm_pivot.load(folder)


def in_guarded_memory(net: Session) -> int:
    """Run a network, and every kernel in it again on copies with guards around; their number."""
    machine, done = net.virtual_machine(), []

    def again(function: Any, name: str, before: bool, _: Any, *args: Any) -> None:
        if not before or str(name).startswith(("vm.", "runtime.")):
            return
        for at_start in (True, False):
            is_tensor = (isinstance(a, tvm_ffi.Tensor) for a in args)
            copies = [
                as_tensor(guarded(np.from_dlpack(a), at_start)) if tensor else a
                for a, tensor in zip(args, is_tensor, strict=True)
            ]
            function(*copies)
        done.append(name)

    machine.module["set_instrument"](tvm_ffi.convert(again))
    inputs = [np.ones(spec.shape, spec.numpy_dtype()) for spec in net.inputs]
    machine.run(*(as_tensor(guarded(x, True)) for x in inputs))
    return len(done)


CASES = {
    "two layers": (network, None),
    **{
        f"{size} pixels, kernel {kernel}, stride {stride}, {outputs} rows, R = {rows}": (
            None,
            (size, kernel, stride, outputs, rows),
        )
        for size, kernel, stride, outputs, rows in (
            (14, 3, 1, 256, 8),
            (7, 3, 1, 512, 8),
            (14, 5, 1, 64, 8),
            (28, 3, 2, 128, 8),
            (56, 1, 1, 64, 1),
            (13, 3, 1, 60, 1),
            (7, 1, 1, 512, 1),
            (30, 7, 2, 64, 8),
            (28, 3, 1, 128, 64),
        )
    },
}


def convolution(size: int, kernel: int, stride: int, outputs: int, rows: int) -> Session:
    channels = 3 if kernel == 7 else 64
    weight = pruned(np.random.default_rng(1), outputs, channels * kernel**2, rows, 0.2)
    weight = weight.reshape(outputs, channels, kernel, kernel)

    def body(builder: relax.BlockBuilder, x: Any) -> Any:
        pad = kernel // 2
        y = builder.emit(relax.op.nn.conv2d(x, relax.const(weight), stride, pad))
        return relax.op.nn.max_pool2d(builder.emit(relax.op.nn.relu(y)), (3, 3), 2, (1, 1))

    return layers(body, (1, channels, size, size))


@pytest.mark.parametrize("case", CASES)
def test_kernels_stay_within_their_tensors(case: str) -> None:
    """In a process of its own: one that does not would die."""
    code = f"import test_bound_memory as t; print(t.kernels_of({case!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "TVM_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 2


def kernels_of(case: str) -> int:
    made, numbers = CASES[case]
    return in_guarded_memory(made() if made is not None else convolution(*numbers))


def test_a_session_without_its_weights_is_refused() -> None:
    net = network()
    with pytest.raises(PivotError, match="weights"):
        Session(net._library, net.manifest)


def test_a_network_may_need_no_memory(tmp_path: Path) -> None:
    net = layers(lambda _, x: relax.op.nn.relu(x), (1, 16))
    assert net.manifest.memory == Memory((), ())
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    for path in (tmp_path / "net.pivot", tmp_path / "net"):
        np.testing.assert_array_equal(tvm_pivot.load(net.export(path)).run(x), np.maximum(x, 0))
