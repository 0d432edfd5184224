"""Packing for the tensor cores: exactly invertible, and the tables say what the kernel must do."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_pivot.fragments import STEP, fragment_order, from_bits, to_bits
from tvm_pivot.pack_tensor_cores import (
    TeamShape,
    deal,
    pack_tensor_cores,
    unpack_tensor_cores,
    walk,
)

PITCH = 144
shapes = st.builds(
    TeamShape,
    block_rows=st.sampled_from([8, 16, 32]),
    blocks=st.sampled_from([1, 2, 4]),
    warp_rows=st.integers(1, 3),
    crew=st.sampled_from([1, 2, 4]),
    slab=st.sampled_from([8, 24, 64]),
    pitch=st.just(PITCH),
    ahead=st.integers(1, 4),
)


def blocks(rng, n, k, rows, density, dtype="float16"):
    """A matrix [n, k] of rows x 1 blocks, of values that `dtype` holds."""
    values = rng.standard_normal((n, k)).astype(np.float32)
    kept = np.repeat(rng.random((-(-n // rows), k)) < density, rows, axis=0)[:n]
    return from_bits(to_bits(values, dtype), dtype) * kept


@settings(max_examples=60, deadline=None)
@given(
    team=shapes,
    n=st.integers(1, 150),
    k=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(["float16", "bfloat16", "tf32"]),
    seed=st.integers(0, 99),
)
def test_unpack_gives_the_matrix_back(team, n, k, density, dtype, seed):
    rng = np.random.default_rng(seed)
    weight = blocks(rng, n, k, team.block_rows, density, dtype)
    offsets = rng.permutation(4 * k)[:k].astype(np.int32)
    packed = pack_tensor_cores(weight, team, dtype=dtype, offsets=offsets)
    assert np.array_equal(unpack_tensor_cores(packed, offsets), weight)


@settings(max_examples=30, deadline=None)
@given(
    team=shapes,
    n=st.integers(1, 100),
    k=st.integers(1, 100),
    dtype=st.sampled_from(["float16", "tf32"]),
    seed=st.integers(0, 99),
)
def test_walking_the_tables_multiplies(team, n, k, dtype, seed):
    """Slab by slab, step by step, with what the step's team took; against float64."""
    rng = np.random.default_rng(seed)
    weight = blocks(rng, n, k, team.block_rows, 0.3, dtype)
    x = rng.standard_normal((k, 8))
    packed = pack_tensor_cores(weight, team, dtype=dtype)
    values = from_bits(packed.weights, dtype).astype(np.float64)
    row_of, column_of = fragment_order(team.block_rows, dtype)
    y = np.zeros((n, 8))
    for crew, slab, step, rows in walk(packed):
        position = packed.places[step] // PITCH
        assert crew == np.searchsorted(packed.slab_begin, slab, side="right") - 1
        assert (packed.places[step] % PITCH == 0).all()
        offset, takers = packed.columns[slab, position].T
        team_of = np.flatnonzero((packed.rows == rows).all(axis=-1).any(axis=(1, 2)))
        assert any((takers >> (t % team.crew) & 1).all() for t in team_of)
        tile = np.empty((team.block_rows, STEP))
        tile[row_of, column_of] = values[step]
        y[rows[rows >= 0]] += (tile @ x[offset])[rows >= 0]
    np.testing.assert_allclose(y, weight.astype(np.float64) @ x, rtol=1e-12, atol=1e-12)


def test_counts_of_columns_taken_are_those_of_the_bits():
    rng = np.random.default_rng(0)
    team = TeamShape(16, 1, 2, 4, 24, PITCH, 2)
    packed = pack_tensor_cores(blocks(rng, 256, 100, 16, 0.1), team)
    bits = packed.columns[:, :, 1, None] >> np.arange(4) & 1
    assert np.array_equal(packed.taken, bits.sum(axis=1))
    assert (packed.columns[:, :, 1] < 16).all(), "no taps were given"
    assert packed.slab_begin.size == 3, "two crews"


def test_every_row_is_written_once():
    rng = np.random.default_rng(1)
    team = TeamShape(8, 2, 3, 2, 64, PITCH, 1)
    packed = pack_tensor_cores(blocks(rng, 203, 50, 8, 0.2), team)
    rows = packed.rows[packed.rows >= 0]
    assert set(rows) == set(range(203))
    bias = rng.standard_normal(203).astype(np.float32)
    assert np.array_equal(packed.slot_bias(bias)[packed.rows >= 0], bias[rows])
    assert not packed.slot_bias(bias)[packed.rows < 0].any()


def test_work_is_dealt_out_evenly():
    rng = np.random.default_rng(2)
    counts = rng.binomial(128, 0.1, 128)
    hands = deal(counts, TeamShape(16, 2, 8, 4, 64, PITCH, 1))
    work = np.where(hands >= 0, counts[hands], 0).sum(axis=2)
    assert work.max() - work.min() <= 4, "warps"
    assert np.ptp(work.sum(axis=1)) <= 8, "teams"


def test_columns_read_together_lie_in_different_banks():
    rng = np.random.default_rng(3)
    # Runs of 16 columns: no two of the eight that are read at once share banks.
    weight = np.kron(rng.random((8, 32)) < 0.3, np.ones((16, 16))).astype(np.float32)
    packed = pack_tensor_cores(weight, TeamShape(16, 1, 4, 1, 64, PITCH, 1))
    eights = packed.places[: packed.steps].reshape(-1, 8) // PITCH % 8
    assert (np.sort(eights, axis=1) == np.arange(8)).all()


def test_columns_at_random_are_spread_over_the_banks():
    rng = np.random.default_rng(5)
    weight = blocks(rng, 512, 512, 8, 0.1)
    packed = pack_tensor_cores(weight, TeamShape(8, 4, 8, 1, 512, PITCH, 1))
    eights = packed.places[: packed.steps].reshape(-1, 8) // PITCH
    # How often the busiest bank is read; 2.6 times on average for columns picked at random.
    turns = [np.bincount(np.unique(eight) % 8).max() for eight in eights]
    assert np.mean(turns) < 1.3


def test_bfloat16_is_rounded_to_nearest_even():
    values = np.random.default_rng(4).standard_normal(1000).astype(np.float32)
    values = np.append(values, np.float32([1.00390625, 1.01171875, 0.0, -0.0]))
    assert np.array_equal(
        to_bits(values, "bfloat16"), values.astype(ml_dtypes.bfloat16).view(np.uint16)
    )


def test_tf32_is_rounded_to_nearest_and_ties_away_from_zero():
    values = np.random.default_rng(6).standard_normal(1000) * 2.0 ** np.arange(-20, 20).repeat(25)
    values = np.append(values.astype(np.float32), np.float32([1 + 2**-11, -1 - 3 * 2**-11, 0.0]))
    mantissa, exponent = np.frexp(values.astype(np.float64))
    away = np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), mantissa)
    got = from_bits(to_bits(values, "tf32"), "tf32")
    assert np.array_equal(got.astype(np.float64), np.ldexp(away / 2**11, exponent))


def test_tf32_columns_read_together_lie_in_different_banks():
    rng = np.random.default_rng(7)
    weight = blocks(rng, 512, 512, 8, 0.1, "tf32")
    packed = pack_tensor_cores(weight, TeamShape(8, 4, 8, 1, 256, PITCH, 1), dtype="tf32")
    # Lane 4 g + t reads column 4 t + i, in the i-th of four loads.
    fours = (packed.places[: packed.steps] // PITCH).reshape(-1, 4, 4).transpose(0, 2, 1)
    turns = [np.bincount(np.unique(four) % 4).max() for four in fours.reshape(-1, 4)]
    # 2.1 times on average for columns picked at random.
    assert np.mean(turns) < 1.3


def test_refuses_other_blocks():
    with pytest.raises(ValueError, match="8, 16 or 32 rows"):
        pack_tensor_cores(np.ones((8, 8), np.float32), TeamShape(4, 1, 1, 1, 64, PITCH, 1))
