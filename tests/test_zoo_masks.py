"""Variants are parsed, and masks keep what they should: whole blocks, the largest first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.zoo import pruning
from benchmarks.zoo.pruning import Variant

# --- variants -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("dense", Variant()),
        ("8x1@0.1", Variant("block", 0.1, (8, 1))),
        ("1x16@.25", Variant("block", 0.25, (1, 16))),
        ("dlmc@0.1", Variant("dlmc", 0.1)),
        ("diag@0.125", Variant("diag", 0.125)),
        ("hidden-diag@0.25", Variant("hidden-diag", 0.25)),
    ],
)
def test_variant_is_parsed_and_printed_back(text: str, variant: Variant) -> None:
    assert Variant.parse(text) == variant
    assert Variant.parse(str(variant)) == variant


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sparse", "unknown variant"),
        ("8x1", "unknown variant"),
        ("8x@0.1", "unknown variant"),
        ("8x1@0.1 ", "unknown variant"),
        ("8x1@0", "density must be"),
        ("8x1@1.5", "density must be"),
        ("0x1@0.5", "block sides"),
        ("diag@0.3", "1/n"),
    ],
)
def test_bad_variant_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Variant.parse(text)


# --- masks ----------------------------------------------------------------------------------


@st.composite
def pruning_cases(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int], float, str]:
    shape: tuple[int, ...] = (draw(st.integers(1, 20)), draw(st.integers(1, 12)))
    if draw(st.booleans()):
        shape = (*shape, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    seed = draw(st.integers(0, 2**32 - 1))
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    block = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return weight, block, draw(st.floats(0.01, 1.0)), draw(st.sampled_from(["taps", "channels"]))


@given(pruning_cases())
def test_magnitude_mask_keeps_the_best_whole_blocks(
    case: tuple[np.ndarray, tuple[int, int], float, pruning.ColumnOrder],
) -> None:
    weight, block, density, order = case
    mask = pruning.magnitude_mask(weight, block, density, order)
    assert mask.shape == weight.shape
    values, kept = (pruning.as_matrix(array, order) for array in (weight, mask))
    kept_scores: list[float] = []
    dropped_scores: list[float] = []
    for row in range(0, values.shape[0], block[0]):
        for column in range(0, values.shape[1], block[1]):
            part = np.s_[row : row + block[0], column : column + block[1]]
            assert kept[part].all() or not kept[part].any(), "a block was split"
            scores = kept_scores if kept[part].any() else dropped_scores
            scores.append(float(np.mean(values[part].astype(np.float64) ** 2)))
    blocks = len(kept_scores) + len(dropped_scores)
    assert len(kept_scores) == max(1, round(blocks * density))
    assert not dropped_scores or min(kept_scores) >= max(dropped_scores) * (1 - 1e-12)


@given(pruning_cases())
def test_matrix_view_is_inverted(
    case: tuple[np.ndarray, tuple[int, int], float, pruning.ColumnOrder],
) -> None:
    weight, _, _, order = case
    matrix = pruning.as_matrix(weight, order)
    assert matrix.shape == (weight.shape[0], weight[0].size)
    np.testing.assert_array_equal(pruning.from_matrix(matrix, weight.shape, order), weight)


def test_column_orders_differ_where_they_should() -> None:
    weight = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)  # value = 4 i + 2 y + x
    assert pruning.as_matrix(weight, "taps").tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert pruning.as_matrix(weight, "channels").tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_apply_mask_keeps_the_norm_and_refuses_nonsense() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    mask = pruning.magnitude_mask(weight, (4, 2), 0.2)
    pruned = pruning.apply_mask(weight, mask)
    assert pruned.dtype == np.float32
    np.testing.assert_array_equal(pruned != 0, mask)
    np.testing.assert_allclose(np.linalg.norm(pruned), np.linalg.norm(weight), rtol=1e-6)
    ratio = pruned[mask] / weight[mask]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)  # the values themselves are kept
    with pytest.raises(ValueError, match="does not fit"):
        pruning.apply_mask(weight, mask.T)
    with pytest.raises(ValueError, match="every non-zero"):
        pruning.apply_mask(weight, np.zeros_like(mask))


def test_block_diagonal_mask_and_its_hidden_form() -> None:
    plain = pruning.block_diagonal_mask((8, 6, 3, 3), 2)
    assert plain.mean() == 0.5
    assert plain[:4, :3].all()
    assert plain[4:, 3:].all()
    hidden = pruning.block_diagonal_mask((8, 6, 3, 3), 2, np.random.default_rng(1))
    assert not np.array_equal(hidden, plain)
    # Sorting the channels by what they connect to brings the two blocks back.
    rows = np.argsort(~hidden[:, 0, 0, 0], kind="stable")
    columns = np.argsort(~hidden[rows[0], :, 0, 0], kind="stable")
    np.testing.assert_array_equal(hidden[rows][:, columns], plain)
    with pytest.raises(ValueError, match="do not fit"):
        pruning.block_diagonal_mask((8, 2), 4)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.sampled_from([(1, 1), (4, 1), (1, 3), (2, 2)]),
    density=st.sampled_from([0.05, 0.3, 0.5, 1.0]),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_mask_is_that_of_a_stable_sort(
    rows: int, columns: int, block: tuple[int, int], density: float, levels: int, seed: int
) -> None:
    """Few levels of magnitude make many ties, which go to the earlier block."""
    weight = np.random.default_rng(seed).integers(-levels, levels + 1, (rows, columns))
    scores = np.array(
        [
            [
                np.mean(np.square(weight[r : r + block[0], c : c + block[1]].astype(np.float64)))
                for c in range(0, columns, block[1])
            ]
            for r in range(0, rows, block[0])
        ]
    )
    order = np.argsort(-scores.ravel(), kind="stable")
    expected = np.zeros((rows, columns), np.bool_)
    for index in order[: max(1, round(scores.size * density))]:
        r, c = np.unravel_index(index, scores.shape)
        r, c = int(r) * block[0], int(c) * block[1]
        expected[r : r + block[0], c : c + block[1]] = True
    got = pruning.magnitude_mask(weight.astype(np.float32), block, density)
    np.testing.assert_array_equal(got, expected)
