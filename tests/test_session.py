"""Running compiled networks: what goes in and what comes out."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest
import tiny
import tvm
import tvm_ffi
from tvm import relax

from tvm_pivot.errors import InputError, PivotError
from tvm_pivot.session import Session

X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
RELU_X = np.maximum(X, 0)
LARGE = 40_000  # elements: more than a session copies without a look


def shifted(array: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
    """A copy of `array` at an address that is `offset` beyond a multiple of 64."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.__array_interface__["data"][0] % 64 + offset
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_one_output_is_an_array() -> None:
    y = tiny.relu().run(X)
    assert type(y) is np.ndarray
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, RELU_X)


def test_inputs_in_order_by_name_mixed_and_as_dict() -> None:
    net = tiny.two_by_two()
    a, b = np.full((2, 3), 5, np.float32), np.full((2, 3), 2, np.float32)
    for result in (net.run(a, b), net.run(a, b=b), net.run(b=b, a=a), net.run({"b": b, "a": a})):
        assert isinstance(result, tuple)
        np.testing.assert_array_equal(result[0], a + b)
        np.testing.assert_array_equal(result[1], a - b)
    assert [spec.name for spec in net.outputs] == ["sum", "difference"]


def test_an_input_may_have_any_name() -> None:
    specs = [("self", (1, 16), "float32")], [("y", (1, 16), "float32")]
    net = Session(tiny.relu_executable(), tiny.manifest(*specs))
    np.testing.assert_array_equal(net.run(self=X), RELU_X)


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((), {}, r"input 'a', 'b' is missing; the network takes 'a' float32 \[2, 3\], 'b'"),
        ((1,), {}, "input 'b' is missing"),
        ((1, 2, 3), {}, "3 inputs given"),
        ((1,), {"a": 1}, "input 'a' is given twice"),
        ((1,), {"c": 1}, "there is no input 'c'"),
        (({"a": 1},), {}, "input 'b' is missing"),
        (({"a": 1, "b": 1, "c": 1},), {}, "there is no input 'c'"),
    ],
)
def test_wrong_sets_of_inputs(args: Any, named: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.two_by_two().run(*args, **named)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (X.astype(np.float64), r"got float64 \[1, 16\]; convert it with .astype\('float32'\)"),
        (X.astype(">f4"), r"expected float32 \[1, 16\], got >f4"),
        (X[0], r"input 'x': expected float32 \[1, 16\], got float32 \[16\]$"),
        (X[:, :15], r"got float32 \[1, 15\]$"),
        (X.tolist(), r"got list; pass np.asarray\(value, dtype='float32'\)"),
        (1.0, "got float; pass np.asarray"),
        (None, "got NoneType"),
        ("x.npy", "got str"),
    ],
)
def test_wrong_arrays(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.relu().run(value)


def test_arrays_in_any_layout() -> None:
    net = tiny.relu(LARGE)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, LARGE), dtype=np.float32)
    read_only = shifted(x, 0)
    read_only.flags.writeable = False
    layouts = {
        "aligned": shifted(x, 0),
        "aligned to 4": shifted(x, 4),
        "aligned to 32": shifted(x, 32),
        "read-only": read_only,
        "strided": np.repeat(x, 2, axis=1)[:, ::2],
        "reversed": x[:, ::-1].copy()[:, ::-1],
        "broadcast": np.broadcast_to(x[:, :1], x.shape),
    }
    for name, layout in layouts.items():
        before = layout.copy()
        np.testing.assert_array_equal(net.run(layout), np.maximum(before, 0), err_msg=name)
        np.testing.assert_array_equal(layout, before, err_msg=f"{name}: the input was changed")


def test_an_aligned_input_is_used_in_place_and_any_other_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = tiny.relu(LARGE)
    lent: list[int] = []
    from_dlpack = tvm_ffi.from_dlpack

    def watched(array: Any, **demands: Any) -> Any:
        lent.append(array.__array_interface__["data"][0])
        return from_dlpack(array, **demands)

    monkeypatch.setattr(tvm_ffi, "from_dlpack", watched)
    x = shifted(np.ones((1, LARGE), np.float32), 0)
    y = net.run(x)
    assert lent == [x.__array_interface__["data"][0]]
    net.run(y)  # outputs are aligned: sessions chain without copies
    assert lent[1:] == [y.__array_interface__["data"][0]]
    net.run(shifted(x, 16))
    assert len(lent) == 2


def test_other_libraries_arrays() -> None:
    torch = pytest.importorskip("torch")
    net = tiny.relu()
    np.testing.assert_array_equal(net.run(torch.from_numpy(X)), RELU_X)
    np.testing.assert_array_equal(net.run(tvm.runtime.tensor(X)), RELU_X)

    class Labelled:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return X

    np.testing.assert_array_equal(net.run(Labelled()), RELU_X)
    with pytest.raises(InputError, match=r"input 'x': Tensor cannot be read .* \.detach\(\)"):
        net.run(torch.from_numpy(X).requires_grad_())
    with pytest.raises(InputError, match="got float64"):
        net.run(torch.from_numpy(X).double())


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float64"])
def test_dtypes(dtype: str) -> None:
    specs = [("x", (2, 3), dtype)]
    executable = tiny.compiled(specs, lambda x: relax.op.concat([x, x], axis=0))
    net = Session(executable, tiny.manifest(specs, [("y", (4, 3), dtype)]))
    x = np.array([[1, 0, 1], [0, 0, 1]]).astype(dtype)
    y = net.run(x)
    assert y.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(y, np.concatenate([x, x]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "nonsense"])
def test_a_dtype_numpy_lacks_is_refused_when_the_session_is_made(dtype: str) -> None:
    usual, odd = ("x", (1, 16), "float32"), ("odd", (1, 16), dtype)
    for inputs, outputs in (([odd], [usual]), ([usual], [odd])):
        with pytest.raises(PivotError, match=f"'odd': NumPy has no dtype '{dtype}'"):
            Session(tiny.relu_executable(), tiny.manifest(inputs, outputs))


def test_scalar_and_empty_inputs() -> None:
    specs = [("x", (0, 3), "float32"), ("s", (), "float32")]
    executable = tiny.compiled(specs, lambda x, s: [relax.op.add(x, s), relax.op.add(s, s)])
    net = Session(
        executable, tiny.manifest(specs, [("y", (0, 3), "float32"), ("t", (), "float32")])
    )
    y, t = net.run(np.empty((0, 3), np.float32), np.float32(1.5))
    assert y.shape == (0, 3)
    assert t.shape == ()
    assert t == 3.0


def test_outputs_are_not_overwritten_by_later_runs() -> None:
    net = tiny.relu(LARGE)
    results = []
    for value in range(6):
        results.append(net.run(np.full((1, LARGE), value, np.float32)))
    for value, result in enumerate(results):
        np.testing.assert_array_equal(result, np.full((1, LARGE), value, np.float32))


def test_outputs_outlive_the_session() -> None:
    net = tiny.relu(LARGE)
    y = net.run(np.full((1, LARGE), 7, np.float32))
    del net
    gc.collect()
    other = tiny.relu(LARGE)
    other.run(np.zeros((1, LARGE), np.float32))
    np.testing.assert_array_equal(y, np.full((1, LARGE), 7, np.float32))


def test_outputs_that_alias_inputs_constants_or_each_other_are_copies() -> None:
    constant = np.arange(LARGE, dtype=np.float32)
    specs = [("x", (1, LARGE), "float32")]

    def body(x: Any) -> list[Any]:
        total = relax.op.add(x, x)
        return [x, relax.const(constant), total, relax.op.reshape(total, (LARGE,)), total]

    names = ("same", "constant", "total", "flat", "again")
    shapes = ((1, LARGE), (LARGE,), (1, LARGE), (LARGE,), (1, LARGE))
    outputs = [(name, shape, "float32") for name, shape in zip(names, shapes, strict=True)]
    net = Session(tiny.compiled(specs, body), tiny.manifest(specs, outputs))
    for offset in (0, 4):  # lent and copied inputs
        x = shifted(np.ones((1, LARGE), np.float32), offset)
        for _ in range(2):
            results = net.run(x)
            expected = [np.ones_like(x), constant, 2 * x, 2 * x[0], 2 * x]
            for i, (result, right) in enumerate(zip(results, expected, strict=True)):
                np.testing.assert_array_equal(result, right, err_msg=names[i])
                result[...] = -1 - i  # spoils the input, the network or a sibling if shared
            np.testing.assert_array_equal(x, np.ones_like(x))
            assert [result.flat[0] for result in results] == [-1, -2, -3, -4, -5]


def test_overhead_of_a_run() -> None:
    net = tiny.relu(threads=1)
    net.run(X)
    best = min(_seconds_of_100_runs(net) for _ in range(100)) / 100
    # 2.2 us on a quiet machine; the bar leaves room for a busy one.
    assert best < 15e-6, f"{best * 1e6:.1f} us"


def _seconds_of_100_runs(net: Session) -> float:
    started = time.perf_counter()
    for _ in range(100):
        net.run(X)
    return time.perf_counter() - started


def test_a_library_that_is_not_what_the_manifest_says() -> None:
    x = ("x", (1, 16), "float32")
    two = tiny.manifest([x, ("z", (1,), "float32")], [x])
    with pytest.raises(PivotError, match="takes 1 inputs, its manifest says 2"):
        Session(tiny.relu_executable().jit(), two)
    with pytest.raises(PivotError, match="takes 1 inputs, its manifest says 2"):
        Session(tiny.relu_executable(), two).run(X, X)
    net = Session(tiny.relu_executable(), tiny.manifest([x], [x, x]))
    with pytest.raises(PivotError, match="returns 1 outputs, its manifest says 2"):
        net.run(X)
    with pytest.raises(PivotError, match="the network failed while running"):
        wrong = tiny.manifest([("x", (1, 17), "float32")], [x])
        Session(tiny.relu_executable(), wrong).run(np.zeros((1, 17), np.float32))


def test_repr_shows_inputs_and_outputs() -> None:
    assert repr(tiny.relu()) == (
        "<tvm_pivot.Session 'tiny': ('x' float32 [1, 16]) -> ('y' float32 [1, 16])>"
    )
