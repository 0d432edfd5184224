"""Permutations: exactly invertible, and composed in the order they are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_pivot.layout import Permutation


def _permutations(size: int) -> st.SearchStrategy[Permutation]:
    return st.permutations(range(size)).map(lambda order: Permutation(np.array(order, np.int32)))


@given(st.integers(0, 12).flatmap(lambda n: st.tuples(_permutations(n), _permutations(n))))
def test_permutations_invert_and_compose(pair: tuple[Permutation, Permutation]) -> None:
    first, second = pair
    data = np.random.default_rng(0).normal(size=(3, first.size)).astype(np.float32)
    moved = first.apply(data, axis=1)
    assert all(np.array_equal(moved[:, i], data[:, o]) for i, o in enumerate(first.order))
    np.testing.assert_array_equal(first.inverse().apply(moved, axis=1), data)
    np.testing.assert_array_equal(second.apply(moved, axis=1), first.then(second).apply(data, 1))
    assert first.then(first.inverse()).is_identity


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [-1, 0], [[0, 1]]])
def test_what_is_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="each of"):
        Permutation(np.array(order, np.int32))
    assert Permutation.identity(0).is_identity
