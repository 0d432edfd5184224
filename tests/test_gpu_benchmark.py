"""What the GPU check compares: its cases, and that it sees a wrong result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import check
from benchmarks.gpu.cases import LAYERS, NETWORKS, Layer, Network


def test_cases_have_names_of_their_own() -> None:
    keys = [case.key for case in (*NETWORKS, *LAYERS)]
    assert len(set(keys)) == len(keys)


def test_a_layer_keeps_whole_blocks_and_is_the_same_everywhere() -> None:
    layer = Layer(64, 96, 5, 8, 4, 0.25, "float32")
    weight = layer.weight()
    np.testing.assert_array_equal(weight, layer.weight())
    blocks = (weight != 0).reshape(8, 8, 24, 4)
    kept = blocks.any(axis=(1, 3))
    assert np.all(blocks.all(axis=(1, 3)) == kept)
    assert 0.1 < kept.mean() < 0.4
    np.testing.assert_array_equal(layer.module().weight.detach().numpy(), weight)


class Fake:
    """A session that repeats its input."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def run(self, x: Any) -> Any:
        """Its input, times a factor."""
        return x * np.float32(self.factor)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (1.5, 0.5), (np.nan, np.inf)])
def test_errors_are_relative_and_nan_is_never_right(
    factor: float, expected: float, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    ends = np.concatenate([x, np.roll(x, 2, -1)])
    np.savez(tmp_path / "a.npz", x=ends, y=ends)
    case: Any = Network("mlp", "dense", "float32", 3)
    session: Any = Fake(factor)
    assert check.error(case, session, tmp_path / "a.pivot") == pytest.approx(expected)
