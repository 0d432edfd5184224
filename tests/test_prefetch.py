"""Rows kernels that prefetch their weights compute what those without do."""

import numpy as np
import pytest
import tvm

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import pack, pack_sliced
from tvm_pivot.schedules.block_sparse import rows_kernel
from tvm_pivot.schedules.block_sparse_moves import schedule_rows
from tvm_pivot.schedules.problems import Epilogue, RowsProblem, RowsTile
from tvm_pivot.schedules.x86 import choose_rows
from tvm_pivot.targets import PRESETS, resolve


@pytest.mark.parametrize("own_columns", [False, True])
@pytest.mark.parametrize(("rows", "unroll"), [(8, 4), (16, 2), (4, 1)])
@pytest.mark.parametrize("parallel", [False, True])
def test_prefetches_change_nothing(rows, unroll, parallel, own_columns):
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((50, 70)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.8] = 0
    if own_columns:
        packed = pack_sliced(weight, rows, unroll=unroll)
    else:
        packed = pack(weight, BlockShape(rows), unroll=unroll)
    problem = RowsProblem(2, 70, 50, packed.indptr.size - 1, rows, own_columns, Epilogue())
    x = rng.standard_normal((2, 70)).astype(np.float32)
    bias = rng.standard_normal(50).astype(np.float32)
    arrays = (x, packed.indptr, packed.index, packed.data, packed.rows, bias[packed.rows])
    # Far beyond the weights, too: nothing there is read.
    for ahead in (3, 256, 1 << 24):
        tile = RowsTile(unroll, parallel, ahead)
        func = schedule_rows(rows_kernel(problem, tile), problem, tile)
        mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        lib = tvm.compile(mod, target=resolve("x86").to_tvm())
        assert "prefetch" in lib.mod.inspect_source("asm")
        out = tvm.runtime.tensor(np.full((2, 50), np.nan, np.float32))
        lib["main"](*(tvm.runtime.tensor(array) for array in arrays), out)
        want = x @ weight.T.astype(float) + bias
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-4, atol=1e-4)


def test_only_weights_beyond_the_caches_are_prefetched():
    target = PRESETS["x86-avx512"]
    problem = RowsProblem(1, 25088, 4096, 512, 8, False, Epilogue())
    assert choose_rows(problem, 1_284_505, target)[0].ahead == 256
    assert choose_rows(problem, 20_000, target)[0].ahead == 0
