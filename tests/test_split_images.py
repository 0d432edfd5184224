"""Images in parts: planes and bands of them, bit for bit, whole networks, and where they are."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
from bottlenecks import chosen, close, moved, pruned, residual_network
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planes_oracle import (
    convolution,
    geometries,
    packed_for,
    planes_of,
    problem_of,
    tables_for,
)
from relax_nets import f32, inputs_for, make, run
from tvm.relax import op

import tvm_pivot
from tvm_pivot.errors import PivotError
from tvm_pivot.planes import AxisGeometry, ConvGeometry, Parts, rows_of_part
from tvm_pivot.schedules.bands import in_bands
from tvm_pivot.schedules.block_sparse import planes_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_planes
from tvm_pivot.schedules.pack_planes import pack_planes, stored_shape
from tvm_pivot.schedules.problems import Bands, Epilogue
from tvm_pivot.schedules.x86 import choose_planes
from tvm_pivot.targets import PRESETS, resolve

# Runs on every host that the tests need, and lines of other cores are far away.
INTEL = replace(PRESETS["haswell"], cores=2)


def cut(images, parts, rng):
    """Images in parts; what the last one has too many is anything but zero."""
    n, c, height, width = images.shape
    rows = rows_of_part(height, parts)
    beyond = rng.standard_normal((n, c, rows * parts - height, width)).astype(np.float32)
    whole = np.concatenate([images, beyond], axis=2)
    apart = whole.reshape(n, c, parts, rows, width).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(apart).reshape(n * parts, c, rows, width)


def joined(images, parts, height):
    """The whole images that are in parts."""
    n, c, rows, width = images.shape
    apart = images.reshape(n // parts, parts, c, rows, width).transpose(0, 2, 1, 3, 4)
    return apart.reshape(n // parts, c, parts * rows, width)[:, :, :height]


def compiled(func):
    """A callable that takes and writes NumPy arrays."""
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    main = tvm.compile(mod, target=resolve("x86").to_tvm())["main"]

    def call(*arrays):
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        main(*tensors)
        return tensors[-1].numpy()

    return call


def filled(size, most):
    """How many parts of as many rows each so many rows may be in: all of them have some."""
    return [p for p in range(1, most + 1) if -(-size // rows_of_part(size, p)) == p]


@given(geometries(st.booleans()), st.data())
@settings(max_examples=40, deadline=None)
def test_planes_of_parts_hold_the_rows_that_these_read(g, data):
    read = data.draw(st.sampled_from(filled(g.y.size, 3)))
    written = data.draw(st.sampled_from(filled(g.y.output, 3)))
    assume(not g.in_parts(written).direct)
    lanes, parallel = data.draw(st.sampled_from([4, 8, 16])), data.draw(st.booleans())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((g.batch, g.channels, g.y.size, g.x.size)).astype(np.float32)
    stored, want = cut(x, read, rng), planes_of(g, written, x)
    assert stored.shape == stored_shape(g, read)
    pack = compiled(pack_planes(g, lanes, parallel, parts=Parts(read, written)))
    np.testing.assert_array_equal(pack(stored, np.full_like(want, np.nan)), want)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("read", "written"), [(1, 2), (2, 1), (2, 2), (3, 2), (2, 4)])
@pytest.mark.parametrize("parallel", [False, True])
def test_bands_read_and_write_parts(stride, read, written, parallel):
    axis = AxisGeometry(17, 3, stride, 1, 1, 1)
    g, rng = ConvGeometry(2, 6, 16, axis, axis), np.random.default_rng(stride)
    epilogue = Epilogue(residual=True, low=-1.0, high=1.0)
    weight = rng.standard_normal((16, 54)) * (rng.random((2, 54)) < 0.3).repeat(8, 0)
    weight = weight.astype(np.float32)
    band = g.band(2)
    problem = replace(problem_of(band, 8, 2, epilogue), batch=1)
    tile, _ = choose_planes(problem, 40, replace(resolve("x86"), cores=1))
    packed, more = packed_for(band, problem, weight, tile)
    kernel = schedule_planes(planes_kernel(problem, tile), problem, tile)
    call = compiled(in_bands(kernel, g, Bands(2, parallel), 8, None, Parts(read, written)))
    x = rng.standard_normal((2, 6, 17, 17)).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32)
    residual = rng.standard_normal((2, 16, g.y.output, g.x.output)).astype(np.float32)
    other = cut(residual, written, rng)
    tables = tables_for(packed, bias, more)
    got = call(cut(x, read, rng), *tables, other, np.full(other.shape, np.nan, np.float32))
    assert np.isfinite(got).all()
    want, magnitude = convolution(g, weight, x, bias, residual, epilogue)
    error = np.abs(joined(got, written, g.y.output) - want)
    assert (error <= 60 * np.finfo(np.float32).eps * magnitude).all()


@pytest.mark.parametrize(
    ("cores", "size", "parts"), [(2, 56, 2), (2, 54, 2), (3, 56, 3), (4, 56, 4), (6, 56, 6)]
)
def test_a_network_in_parts_moves_nothing(cores, size, parts):
    mod, target = residual_network(size), replace(INTEL, cores=cores)
    planned, lowered = chosen(mod, target)
    assert [p.parts for p in planned] == [parts] * 8 + [planned[-1].parts]
    assert not moved(lowered)
    inputs = inputs_for(mod)
    session = tvm_pivot.build(mod, target=target, tuned=False)
    (want,) = run(mod, *inputs)
    for threads in (1, 2):
        session.set_threads(threads)
        close(session.run(*inputs), want)


@pytest.mark.parametrize(
    "target", [replace(INTEL, cores=1), replace(PRESETS["zen4"], cores=2)], ids=["one core", "zen"]
)
def test_one_core_and_near_lines_keep_whole_images(target):
    planned, lowered = chosen(residual_network(56), target)
    assert {p.parts for p in planned} == {1}
    assert not moved(lowered)


def test_a_network_for_one_thread_is_compiled_for_one_core():
    mod = residual_network(56)
    whole, parts = (
        tvm_pivot.build(mod, target=INTEL, tuned=False, threads=threads) for threads in (1, 2)
    )
    assert (whole.manifest.target.cores, parts.manifest.target.cores) == (1, 2)
    inputs = inputs_for(mod)
    close(whole.run(*inputs), run(mod, *inputs)[0])
    for wrong in (0, 1000):
        with pytest.raises(PivotError, match="threads must be"):
            tvm_pivot.build(mod, target=INTEL, threads=wrong)


def test_many_images_are_shared_as_they_are():
    rng = np.random.default_rng(0)
    weights = pruned(rng, 32, 16, 3), pruned(rng, 32, 32, 1)

    def body(bb, x):
        x = bb.emit(op.nn.conv2d(x, weights[0], 1, 1))
        x = bb.emit(op.nn.conv2d(x, weights[1]))
        return op.mean(bb.emit(op.nn.conv2d(x, weights[1], 2)), [2, 3])

    for batch, parts in ((1, 2), (2, 1), (3, 2)):
        planned, _ = chosen(make(body, (batch, 16, 28, 28)), INTEL)
        assert [p.parts for p in planned] == [parts, parts, 1], batch


@pytest.mark.parametrize("size", [7, 64])
def test_small_and_large_images_stay_whole(size):
    planned, _ = chosen(residual_network(2 * size), INTEL)
    assert {p.parts for p in planned[:-1]} == {1}


def test_layers_of_many_weights_share_these():
    rng = np.random.default_rng(0)
    weights = [pruned(rng, 256, 256, kernel) for kernel in (3, 1)]

    def body(bb, x):
        x = bb.emit(op.nn.conv2d(x, weights[0], 1, 1))
        x = bb.emit(op.nn.conv2d(x, weights[1], 2))
        return bb.emit(op.sum(x, [1]))

    mod = make(body, (1, 256, 28, 28))
    for l2_bytes, parts in ((256 << 10, [1, 1]), (4 << 20, [2, 1])):
        planned, _ = chosen(mod, replace(INTEL, l2_bytes=l2_bytes))
        assert [p.parts for p in planned] == parts


def test_who_reads_an_image_as_it_lies_keeps_it_whole():
    """A sum over channels reads a large image: so do layers before it, as far as any is direct."""
    rng = np.random.default_rng(0)
    weights = [pruned(rng, 512, 512, kernel) for kernel in (3, 3, 1)]

    def body(bb, x):
        x = bb.emit(op.nn.conv2d(x, weights[0], 1, 1))
        x = bb.emit(op.nn.conv2d(x, weights[1], 1, 1))
        x = bb.emit(op.nn.conv2d(x, weights[2]))
        return op.sum(x, [1])

    mod = make(body, (1, 512, 28, 28))
    planned, lowered = chosen(mod, replace(INTEL, l2_bytes=16 << 20))
    assert [p.parts for p in planned] == [2, 1, 1]
    assert not moved(lowered)


def test_what_others_read_stays_whole():
    """The image that is added to is read beside, and so all that it is tied to is whole."""
    rng = np.random.default_rng(0)
    weights = [pruned(rng, 32, 32, kernel) for kernel in (3, 1, 3, 1)]

    def body(bb, x):
        x = bb.emit(op.nn.conv2d(x, weights[0], 1, 1))
        y = bb.emit(op.nn.relu(bb.emit(op.add(bb.emit(op.nn.conv2d(x, weights[1])), x))))
        z = bb.emit(op.nn.conv2d(y, weights[2], 1, 1))
        return [bb.emit(op.nn.conv2d(z, weights[3])), bb.emit(op.exp(y))]

    mod = make(body, (1, 32, 15, 15))
    planned, lowered = chosen(mod, INTEL)
    assert [p.parts for p in planned] == [1, 1, 1, 1]
    assert not moved(lowered)
    inputs = inputs_for(mod)
    got = tvm_pivot.build(mod, target=INTEL, tuned=False).run(*inputs)
    for one, want in zip(got, run(mod, *inputs), strict=True):
        close(one, want)


def test_filtered_stems_store_whole_images():
    rng = np.random.default_rng(0)

    def body(bb, x):
        def conv(x, outputs, channels, kernel, stride):
            weight = rng.standard_normal((outputs, channels, kernel, kernel)).astype(np.float32)
            y = bb.emit(op.nn.conv2d(x, f32(weight / 8), stride, kernel // 2))
            return bb.emit(op.nn.relu(y))

        return op.mean(conv(conv(conv(x, 64, 3, 7, 2), 64, 64, 1, 1), 64, 64, 3, 1), [2, 3])

    mod = make(body, (1, 3, 64, 64))
    planned, lowered = chosen(mod, replace(INTEL, cores=2))
    assert [p.choice.form for p in planned] == ["winograd", "planes", "planes"]
    assert planned[0].parts == 1
    assert not moved(lowered)
    inputs = inputs_for(mod)
    session = tvm_pivot.build(mod, target=INTEL, tuned=False, threads=2)
    close(session.run(*inputs), run(mod, *inputs)[0])
