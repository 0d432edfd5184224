"""Names, densities and fills of weight patterns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_pivot.layout import BlockShape
from tvm_pivot.pattern import BlockMasks, classify


def blocks(rng, n, k, rows, cols, density):
    grid = rng.random((-(-n // rows), -(-k // cols))) < density
    grid.flat[0] = True
    mask = np.repeat(np.repeat(grid, rows, 0), cols, 1)[:n, :k]
    return np.where(mask, rng.standard_normal((n, k)) + 3, 0).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "cols"), [(8, 1), (16, 1), (4, 1), (4, 4), (1, 16), (8, 8), (2, 1)]
)
def test_planted_blocks_are_named(rows, cols):
    weight = blocks(np.random.default_rng(1), 64, 96, rows, cols, 0.2)
    pattern = classify(weight)
    assert pattern.name == f"{rows}x{cols} blocks"
    assert pattern.block == BlockShape(rows, cols)
    assert BlockMasks(weight != 0).fill(pattern.block) == 1.0


def test_other_names():
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((40, 30)).astype(np.float32)
    assert classify(weight).name == "dense"
    assert classify(np.zeros((4, 4), np.float32)).name == "zero"
    scattered = np.where(rng.random((40, 30)) < 0.2, weight, 0).astype(np.float32)
    pattern = classify(scattered)
    assert pattern.name == "unstructured"
    assert pattern.density == np.count_nonzero(scattered) / scattered.size
    assert BlockMasks(scattered != 0).fill(BlockShape(8)) < 0.5


@given(st.integers(0, 999), *[st.integers(1, 30)] * 2, *[st.integers(1, 9)] * 2)
def test_fill_and_mask_agree_with_the_definition(seed, n, k, rows, cols):
    mask = np.random.default_rng(seed).random((n, k)) < 0.3
    kept = slots = 0
    expected = np.zeros((-(-n // rows), -(-k // cols)), bool)
    for i in range(0, n, rows):
        for j in range(0, k, cols):
            block = mask[i : i + rows, j : j + cols]
            expected[i // rows, j // cols] = block.any()
            if block.any():
                kept += int(block.sum())
                slots += block.size
    masks = BlockMasks(mask)
    for part in BlockShape(2), BlockShape(3), BlockShape(1, 2):  # larger blocks start from these
        masks.kept(part)
    assert np.array_equal(masks.kept(BlockShape(rows, cols)), expected)
    assert masks.fill(BlockShape(rows, cols)) == (kept / slots if slots else 1.0)
