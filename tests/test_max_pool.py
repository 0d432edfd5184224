"""The max pooling kernel against NumPy, and which poolings it is used for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_oracle import HOST, THREADED, functions, run
from tvm import relax
from tvm.relax import op

from tvm_pivot.planes import AxisGeometry
from tvm_pivot.relay_passes.legalize_pooling import legalize_max_pool2d
from tvm_pivot.relay_passes.schedule_functions import schedule_functions
from tvm_pivot.schedules.analysis import is_naive
from tvm_pivot.schedules.max_pool import is_supported, max_pool
from tvm_pivot.targets import PivotTarget


def reference(x: np.ndarray, y_axis: AxisGeometry, x_axis: AxisGeometry) -> np.ndarray:
    """Each window's largest pixel; windows that start behind the last pixel are left out."""

    def windows(axis: AxisGeometry) -> list[slice]:
        starts = [i * axis.stride - axis.before for i in range(axis.output)]
        return [slice(max(s, 0), s + axis.kernel) for s in starts if s < axis.size]

    rows = [[x[:, :, r, c].max((2, 3)) for c in windows(x_axis)] for r in windows(y_axis)]
    return np.array(rows).transpose(2, 3, 0, 1)


def pixels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Negative numbers only, a third of them -inf: padding with anything else would show."""
    rng = np.random.default_rng(seed)
    values = -rng.random(shape) - 1
    return np.where(rng.random(shape) < 0.3, -np.inf, values).astype(np.float32)


def check(planes: tuple[int, int], y: AxisGeometry, x: AxisGeometry, lanes: int, par: bool) -> None:
    source = pixels((*planes, y.size, x.size))
    func = max_pool(*planes, y, x, lanes, par).with_attr("global_symbol", "main")
    main = tvm.compile(tvm.IRModule({"main": func}), target=HOST.to_tvm())["main"]
    out = tvm.runtime.tensor(np.full((*planes, y.output, x.output), np.nan, np.float32))
    main(tvm.runtime.tensor(source), out)
    np.testing.assert_array_equal(out.numpy(), reference(source, y, x))


@st.composite
def axes(draw: Any) -> AxisGeometry:
    kernel, stride = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    before = draw(st.integers(0, kernel - 1))
    size = draw(st.integers(max(1, kernel - before), 70))
    return AxisGeometry(size, kernel, stride, 1, before, draw(st.integers(0, kernel - 1)))


@settings(max_examples=80, deadline=None)
@given(
    planes=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 5, 67])),
    y=axes(),
    x=axes(),
    lanes=st.sampled_from([8, 16]),
    parallel=st.booleans(),
)
def test_any_window_matches_numpy(
    planes: tuple[int, int], y: AxisGeometry, x: AxisGeometry, lanes: int, parallel: bool
) -> None:
    if is_supported(y, x):
        check(planes, y, x, lanes, parallel)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad"),
    [(112, 3, 2, 1), (56, 2, 2, 0), (27, 3, 2, 0), (28, 3, 1, 1), (13, 13, 1, 6), (300, 3, 2, 1)],
)
def test_windows_of_well_known_networks(
    size: int, kernel: int, stride: int, pad: int, lanes: int
) -> None:
    axis = AxisGeometry(size, kernel, stride, 1, pad, pad)
    check((2, 33), axis, axis, lanes, True)


def legalized(
    target: PivotTarget, *args: Any, dtype: str = "float32", width: int = 35, **attrs: Any
) -> Any:
    """A module that pools images of 2 x 40 x 30 x `width`, and such images."""
    shape = (2, 40, 30, width)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(builder.normalize(op.nn.max_pool2d(x, *args, **attrs)))
        builder.emit_func_output(y)
    rules = {"relax.nn.max_pool2d": legalize_max_pool2d(target)}
    mod = relax.transform.LegalizeOps(rules)(builder.get())
    return schedule_functions(mod, target), pixels(shape).astype(dtype)


def uses_kernel(mod: tvm.IRModule) -> bool:
    """Whether no rule had to schedule a function of the module."""
    return not any("pivot.schedule" in func.attrs for func in functions(mod).values())


@pytest.mark.parametrize("target", [HOST, THREADED, replace(HOST, cores=4)])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad"),
    [(3, 2, (1, 1, 1, 1)), (2, 2, (0, 0, 0, 0)), ((3, 4), (3, 1), (0, 1, 1, 2)), (3, 4, (0,) * 4)],
)
def test_lowered_poolings_match_numpy(
    kernel: Any, stride: Any, pad: tuple[int, ...], ceil: bool, target: PivotTarget
) -> None:
    mod, image = legalized(target, kernel, stride, pad, ceil_mode=ceil)
    (got,) = run(mod, target, [image])
    kernels, strides = (v if isinstance(v, tuple) else (v, v) for v in (kernel, stride))
    y, x = (
        AxisGeometry(size, k, s, 1, pad[i], pad[i + 2] + (s - 1 if ceil else 0))
        for i, (size, k, s) in enumerate(zip((30, 35), kernels, strides, strict=True))
    )
    assert uses_kernel(mod)
    assert not any(is_naive(func) for func in functions(mod).values())
    np.testing.assert_array_equal(got, reference(image, y, x))


@pytest.mark.parametrize(
    ("args", "attrs"),
    [
        (((2, 2), (2, 2), (0, 0, 0, 0), (2, 2)), {}),
        ((3, 2), {"layout": "NHWC"}),
        ((3, 2), {"dtype": "float64"}),
        ((3, 2), {"dtype": "float16"}),
        ((2, 2, (2, 2, 2, 2)), {}),  # a window of nothing but padding
        (((1, 20), 1), {}),
        ((9, 9), {}),
        (((3, 3), (1, 4), (0, 0, 0, 0)), {"width": 3}),
    ],
    ids=[
        "dilated",
        "NHWC",
        "float64",
        "float16",
        "padding only",
        "long",
        "wide stride",
        "one column",
    ],
)
def test_other_poolings_are_left_to_the_rules(args: Any, attrs: Any) -> None:
    assert not uses_kernel(legalized(HOST, *args, **attrs)[0])
