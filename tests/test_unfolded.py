"""Planes unfolded along x: bit for bit, in whole networks, and where the rule takes them."""

import numpy as np
import pytest
import torch
import tvm
from guarded import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import geometries
from relax_nets import inputs_for, make, run
from tvm import relax
from tvm.relax import op

import tvm_pivot
from tvm_pivot.planes import SLACK
from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.schedules.pack_planes import pack_planes
from tvm_pivot.schedules.problems import Epilogue
from tvm_pivot.targets import PRESETS, resolve
from tvm_pivot.tuning.tasks import LayerTask
from tvm_pivot.tuning.trials import candidate_func


def planes_of(g, x):
    """The planes by definition: float32 [batch, image_floats]."""
    found = np.zeros((g.batch, g.channels, len(g.y.phases), g.x.kernel, g.plane_height, g.pitch))
    for a, phase in enumerate(g.y.phases):
        for k in range(g.x.kernel):
            for row in range(g.plane_height):
                y = g.y.source(phase, row)
                at = np.arange(g.pitch) * g.x.stride + k * g.x.dilation - g.x.before
                inside = (at >= 0) & (at < g.x.size)
                if 0 <= y < g.y.size:
                    found[:, :, a, k, row, inside] = x[:, :, y, at[inside]]
    flat = found.reshape(g.batch, -1).astype(np.float32)
    return np.pad(flat, [(0, 0), (0, SLACK)])


@given(geometries(st.just(True)), st.sampled_from([4, 8, 16]), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_planes_hold_what_each_column_of_taps_reads(g, lanes, parallel, at_start):
    """And nothing outside the image is read, which would be the end of the process."""
    func = pack_planes(g, lanes, parallel).with_attr("global_symbol", "main")
    main = tvm.compile(tvm.IRModule({"main": func}), target=resolve("x86").to_tvm())["main"]
    shape = (g.batch, g.channels, g.y.size, g.x.size)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    made = guarded(np.full((g.batch, g.image_floats), np.nan, np.float32), at_start)
    main(*map(tvm.runtime.from_dlpack, (guarded(x, at_start), made)))
    want = planes_of(g, x)
    assert np.array_equal(made, want)
    # Every tap of every pixel is where the offsets say.
    pixel = np.arange(g.y.output * g.x.output)
    taps = want[:, g.offsets()[:, None] + pixel]
    padding = [(0, 0), (0, 0), (g.y.before, 8), (g.x.before, 8)]
    unfold = torch.nn.functional.unfold(
        torch.from_numpy(np.pad(x, padding)),
        (g.y.kernel, g.x.kernel),
        (g.y.dilation, g.x.dilation),
        stride=(g.y.stride, g.x.stride),
    ).numpy()
    rows = (shape[2] + g.y.before + 8 - (g.y.kernel - 1) * g.y.dilation - 1) // g.y.stride + 1
    unfold = unfold.reshape(g.batch, taps.shape[1], rows, -1)
    unfold = unfold[:, :, : g.y.output, : g.x.output]
    assert np.array_equal(taps, unfold.reshape(taps.shape))


def pruned(outputs, inputs, density=0.1):
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((outputs // 8, 8, inputs * 9)) / np.sqrt(9 * inputs * density)
    weight *= rng.random((outputs // 8, 1, inputs * 9)) < density
    return weight.reshape(outputs, inputs, 3, 3).astype(np.float32)


def network(size, channels=64):
    """A block of two 3x3 convolutions with a residual, on planes of size x size."""

    def body(builder, x):
        weights = [relax.const(pruned(channels, channels)) for _ in range(2)]
        y = builder.emit(op.nn.relu(builder.emit(op.nn.conv2d(x, weights[0], 1, 1))))
        z = builder.emit(op.nn.conv2d(y, weights[1], 1, 1))
        return builder.emit(op.nn.relu(builder.emit(op.add(z, x))))

    return make(body, (1, channels, size, size))


def planned(mod, target):
    state = Compilation(mod, target)
    for phase in PHASES:
        if phase.analysis:
            state = phase.run(state)
    return state.planned


def test_the_rule_unfolds_planes_of_which_vectors_leave_little_over():
    target = PRESETS["x86-avx512"]
    assert {p.plan.unfolded for p in planned(network(7), target)} == {True}
    assert {p.plan.unfolded for p in planned(network(64), target)} == {False}
    assert {p.plan.unfolded for p in planned(network(7), PRESETS["raspberry-pi-5"])} == {False}


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("name", ["x86-avx512", "x86-avx2"])
def test_networks_match(size, name):
    if name == "x86-avx512" and resolve("x86").lanes < 16:
        pytest.skip("this CPU has no AVX-512")
    mod = network(size)
    inputs = inputs_for(mod, 1)
    (want,) = run(mod, *inputs)
    got = tvm_pivot.build(mod, target=name, tuned=False).run(*inputs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_task_can_have_its_planes_either_way():
    target = resolve("x86")
    first, _ = planned(network(7), target)
    task = LayerTask.of(first.layer, first.plan, Epilogue(low=0.0), target)
    outputs = []
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 7, 7)).astype(np.float32)
    bias = rng.standard_normal(64).astype(np.float32)
    for unfolded in (False, True):
        choice = next(c for c in task.choices if c.unfolded == unfolded and not c.band_rows)
        kernel = task.kernel(choice)
        func = candidate_func(task, choice, kernel).with_attr("global_symbol", "main")
        lib = tvm.compile(tvm.IRModule({"main": func}), target=target.to_tvm())
        planes = np.zeros([int(extent) for extent in func.params[1].ty.shape], np.float32)
        arrays = [x, planes, *kernel.tables(bias), np.zeros(kernel.output, np.float32)]
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
        lib["main"](*tensors)
        outputs.append(tensors[-1].numpy().reshape(64, 49))
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
