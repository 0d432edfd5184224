"""The benchmark of single layers runs and checks what it times."""

import pytest

from benchmarks.layers import measure
from tvm_pivot.targets import resolve


@pytest.mark.parametrize("rows", [1, 8])
def test_a_layer_is_measured_beside_its_dense_forms(rows: int) -> None:
    found = measure((48, 64, 32), rows, 0.2, 1, resolve("x86-avx2"))
    assert found["plan"].endswith("x1")
    assert 0.1 < found["density"] < 0.3
    assert all(found[f"{name}_us_min"] > 0 for name in ("torch", "sparse", "own_dense"))
