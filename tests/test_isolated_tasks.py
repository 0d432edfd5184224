"""Parallel loops whose tasks are functions of their own compute what they did before."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import s_tir, te

from tvm_pivot.schedules.analysis import walk
from tvm_pivot.schedules.isolated_tasks import isolate_tasks


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("parallel", [True, False])
def test_tasks_are_functions(stages: int, parallel: bool) -> None:
    x = te.placeholder((24, 40), name="X")
    y = te.compute(x.shape, lambda i, j: x[i, j] * 3.0, name="stage1")
    if stages == 2:
        first = y
        y = te.compute(x.shape, lambda i, j: first[i, 39 - j] + 1.0, name="stage2")
    schedule = s_tir.Schedule(te.create_prim_func([x, y]))
    for stage in range(stages if parallel else 0):
        schedule.parallel(schedule.get_loops(schedule.get_sblock(f"stage{stage + 1}"))[0])
    func = isolate_tasks(schedule.mod["main"].with_attr("tirx.noalias", True))
    scopes = [a for a in walk(func.body, tvm.tirx.AttrStmt) if a.attr_key == "compute_scope"]
    assert len(scopes) == (stages if parallel else 0)
    main = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target="llvm"
    )["main"]
    data = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    out = tvm.runtime.tensor(np.full_like(data, np.nan))
    main(tvm.runtime.tensor(data), out)
    want = data * np.float32(3)
    np.testing.assert_array_equal(out.numpy(), want if stages == 1 else want[:, ::-1] + 1)
