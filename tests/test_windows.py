"""Windows: packing is exactly invertible, and lookups in registers agree with float64."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from tvm_pivot.pack import unpack_sliced
from tvm_pivot.planes import AxisGeometry, ConvGeometry
from tvm_pivot.relay_passes.detect import plan_layer
from tvm_pivot.relay_passes.layers import Layer
from tvm_pivot.schedules.block_sparse import rows_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_rows
from tvm_pivot.schedules.lookup import can_look_up
from tvm_pivot.schedules.problems import Epilogue, RowsProblem, RowsTile
from tvm_pivot.targets import PRESETS, resolve
from tvm_pivot.windows import count_steps, pack_windows

DENSITIES = st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])
EPS = float(np.finfo(np.float32).eps)


def sparse_matrix(seed, n, k, density):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    return np.where(rng.random((n, k)) < density, weight, 0).astype(np.float32)


@st.composite
def cases(draw):
    lanes, vectors = draw(st.sampled_from([(16, 1), (16, 2), (16, 3), (8, 2), (8, 4), (4, 1)]))
    return {
        "weight": sparse_matrix(
            draw(st.integers(0, 9999)),
            draw(st.integers(1, 70)),
            lanes * vectors + draw(st.integers(0, 150)),
            draw(DENSITIES),
        ),
        "lanes": lanes,
        "vectors": vectors,
        "unroll": draw(st.sampled_from([1, 2, 4])),
    }


@given(cases())
def test_unpack_inverts_pack(case):
    weight, lanes, vectors = case["weight"], case["lanes"], case["vectors"]
    packed = pack_windows(weight, lanes, vectors, unroll=case["unroll"])
    assert unpack_sliced(packed).tobytes() == weight.tobytes()
    assert set(packed.rows) == set(range(weight.shape[0]))
    assert packed.indptr[-1] * case["unroll"] == packed.starts.size
    # A kernel loads every vector of a window and looks up every index.
    assert np.all(packed.starts >= 0)
    assert np.all(packed.starts + lanes * vectors <= weight.shape[1])
    assert np.all(packed.index < lanes * vectors)


@given(cases())
def test_windows_only_move_on_and_no_step_is_empty(case):
    packed = pack_windows(case["weight"], case["lanes"], case["vectors"])
    assert np.all(np.any(packed.data, axis=1))
    steps = count_steps(case["weight"] != 0, case["lanes"], case["vectors"])
    assert packed.starts.size == steps
    inside = np.ones(packed.starts.size, bool)
    inside[packed.indptr[:-1][np.diff(packed.indptr) > 0]] = False
    assert np.all(np.diff(packed.starts)[inside[1:]] >= 0)


def test_wrong_windows_are_refused():
    with pytest.raises(ValueError, match="no window of 48 columns in a matrix of 47"):
        pack_windows(np.ones((4, 47), np.float32), 16, 3)
    with pytest.raises(ValueError, match="no window of 272"):
        pack_windows(np.ones((4, 1000), np.float32), 16, 17)
    with pytest.raises(ValueError, match="no window"):
        count_steps(np.ones((4, 10), bool), 16, 1)


@pytest.mark.parametrize("unroll, parallel", [(1, True), (4, False)])
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("lanes", [8, 16])
def test_every_window_computes_the_same(lanes, vectors, inputs, unroll, parallel):
    preset = PRESETS["x86-avx2"] if lanes == 8 else resolve("x86")
    if preset.lanes < lanes:
        pytest.skip("this machine's vectors are narrower")
    weight = sparse_matrix(vectors, 50, 150, 0.2)
    rng = np.random.default_rng(lanes)
    x = rng.standard_normal((inputs, 150)).astype(np.float32)
    bias = rng.standard_normal(50).astype(np.float32)
    packed = pack_windows(weight, lanes, vectors, unroll=unroll)
    blocks = packed.indptr.size - 1
    problem = RowsProblem(inputs, 150, 50, blocks, lanes, True, Epilogue(low=0.0), vectors)
    tile = RowsTile(unroll, parallel)
    func = schedule_rows(rows_kernel(problem, tile), problem, tile)
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    lib = tvm.compile(module, target=replace(preset, cores=2 if parallel else 1).to_tvm())
    tables = (packed.indptr, packed.index, packed.data, packed.rows, bias[packed.rows])
    out = tvm.runtime.tensor(np.full((inputs, 50), np.nan, np.float32))
    lib["main"](*[tvm.runtime.tensor(a) for a in (x, *tables, packed.starts)], out)
    exact = weight.T.astype(float)
    bound = 154 * EPS * (np.abs(x) @ np.abs(exact) + np.abs(bias))
    assert np.all(np.abs(out.numpy() - np.maximum(x @ exact + bias, 0)) <= bound)
    permute = r"vperm[it]2ps" if lanes == 16 and vectors > 1 else r"vperm(d|ps)"
    assert re.search(permute, lib.mod.inspect_source("asm")), "the lookup is an instruction"


def plan_of(weight, target, inputs=1):
    n, k = weight.shape
    geometry = ConvGeometry(1, k, n, AxisGeometry(1, 1), AxisGeometry(inputs, 1))
    layer = Layer(relax.Var("layer"), "dense", (n, k), weight, geometry)
    return plan_layer(layer, target, True).plan


@pytest.mark.parametrize("name", ["x86-avx512", "x86-avx2"])
def test_scattered_zeros_are_skipped_in_windows(name):
    target = PRESETS[name]
    for inputs in (1, 2, target.lanes // 2 - 1):
        plan = plan_of(sparse_matrix(0, 200, 300, 0.1), target, inputs)
        assert plan.own_columns
        assert plan.window
    blocks = np.repeat(sparse_matrix(1, 40, 300, 0.1), target.lanes, axis=0)
    assert not plan_of(blocks, target).own_columns
    narrow = plan_of(sparse_matrix(0, 200, target.lanes, 0.1), target)
    assert narrow.window == 0, "the input is shorter than a window"


def test_only_targets_with_a_lookup_have_windows():
    assert can_look_up(PRESETS["x86-avx2"])
    assert can_look_up(PRESETS["zen4"])
    assert not can_look_up(PRESETS["cortex-a76"])
    assert not plan_of(sparse_matrix(0, 200, 300, 0.1), PRESETS["cortex-a76"]).window
