"""Planes that begin with cache lines: bit for bit, whole networks, and where they are."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from bottlenecks import chosen, close, moved, residual_network
from hypothesis import given, settings
from hypothesis import strategies as st
from planes_oracle import geometries
from relax_nets import inputs_for, run

import tvm_pivot
from tvm_pivot.planes import Parts, aligned_floats, rows_of_part
from tvm_pivot.schedules.aligned_planes import with_aligned
from tvm_pivot.schedules.pack_planes import pack_planes, stored_shape
from tvm_pivot.targets import PRESETS, resolve

# With vectors of a cache line, and lines of other cores far away; emulated where a host has none.
INTEL = replace(PRESETS["sapphire-rapids"], cores=2)


def on_lines(images):
    """Images with every plane on whole cache lines, and no number behind it."""
    flat = images.reshape(*images.shape[:2], -1)
    behind = aligned_floats(flat.shape[2]) - flat.shape[2]
    return np.pad(flat, [(0, 0), (0, 0), (0, behind)], constant_values=np.nan)


def call(func, *arrays):
    """What a function writes to the last of its arguments."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
    tvm.compile(mod, target=resolve("x86").to_tvm())["main"](*tensors)
    return tensors[-1].numpy()


@given(geometries(st.booleans()), st.data())
@settings(max_examples=40, deadline=None)
def test_planes_are_laid_out_as_from_other_images(g, data):
    most = [p for p in (1, 2, 3) if -(-g.y.size // rows_of_part(g.y.size, p)) == p]
    parts = Parts(data.draw(st.sampled_from(most)))
    lanes, parallel = data.draw(st.sampled_from([4, 8, 16])), data.draw(st.booleans())
    x = np.random.default_rng(0).standard_normal(stored_shape(g, parts.read)).astype(np.float32)
    planes = np.full((g.batch, g.image_floats), np.nan, np.float32)
    want = call(pack_planes(g, lanes, parallel, parts=parts), x, planes)
    aligned = pack_planes(g, lanes, parallel, parts=replace(parts, read_aligned=True))
    np.testing.assert_array_equal(call(aligned, on_lines(x), planes), want)


def test_what_lies_behind_planes_is_left_alone():
    x = tvm.te.placeholder((2, 3, 5, 7), "float32", name="X")
    y = tvm.te.compute(x.shape, lambda *at: x(*at) + 1.0, name="Y")
    func = with_aligned(tvm.te.create_prim_func([x, y]), ["X", "Y"])
    images = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32)
    out = call(func, on_lines(images), np.full((2, 3, 48), -7.0, np.float32))
    np.testing.assert_array_equal(out[:, :, :35], (images + 1).reshape(2, 3, 35))
    assert (out[:, :, 35:] == -7.0).all()


@pytest.mark.parametrize(("cores", "size"), [(1, 28), (2, 28), (1, 26), (2, 54)])
def test_a_network_on_cache_lines_moves_nothing(cores, size):
    """Unstructured bottlenecks of 14 x 14, 13 x 13, or in halves of 27 x 27 pixels: of these one
    has blocks of four rows.
    """
    mod, target = residual_network(size, rows=1), replace(INTEL, cores=cores)
    planned, lowered = chosen(mod, target)
    assert [p.aligned for p in planned] == [True] * 8 + [False]
    assert not moved(lowered)


def test_who_gains_nothing_keeps_planes_together():
    for mod, target in (
        (residual_network(28, rows=8), INTEL),
        (residual_network(32, rows=1), INTEL),
        (residual_network(28, rows=1), replace(PRESETS["zen4"], cores=2)),
        (residual_network(28, rows=1), PRESETS["haswell"]),
    ):
        planned, lowered = chosen(mod, target)
        assert not any(p.aligned for p in planned)
        assert not moved(lowered)


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("size", [28, 26, 54])
def test_networks_compute_what_others_do(cores, size):
    host = resolve("x86")
    if host.lanes != INTEL.lanes:
        pytest.skip("vectors of this host are shorter than a cache line")
    # Any such host can run that, and its lines of other cores are taken to be far away.
    tvm_target = {**host.tvm, "mcpu": "skylake-avx512"}
    mod, target = residual_network(size, rows=1), replace(host, tvm=tvm_target, cores=cores)
    assert any(p.aligned for p in chosen(mod, target)[0])
    inputs = inputs_for(mod)
    (want,) = run(mod, *inputs)
    session = tvm_pivot.build(mod, target=target, tuned=False)
    for _ in range(3):
        close(session.run(*inputs), want)
