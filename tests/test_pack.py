"""Packing is exactly invertible: bit for bit, over shapes, blocks, densities and orders."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_pivot.layout import BlockShape
from tvm_pivot.pack import (
    column_tiles,
    even_stretches,
    join,
    kept_blocks,
    pack,
    pack_sliced,
    unpack,
    unpack_sliced,
)
from tvm_pivot.pivot import gather_rows, natural_rows

SIZES = st.integers(1, 40)
DENSITIES = st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])
BLOCK_ROWS = st.sampled_from([1, 2, 3, 4, 8, 16])


def sparse_matrix(seed: int, n: int, k: int, density: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)).astype(np.float32)
    return np.where(rng.random((n, k)) < density, weight, 0).astype(np.float32)


@given(st.integers(0, 9999), SIZES, SIZES, DENSITIES, BLOCK_ROWS, st.sampled_from([1, 2, 4]))
def test_unpack_inverts_pack(seed, n, k, density, rows, unroll):
    weight = sparse_matrix(seed, n, k, density)
    packed = pack(weight, BlockShape(rows), unroll=unroll)
    assert unpack(packed).tobytes() == weight.tobytes()
    assert packed.indptr[-1] * unroll == packed.entries
    assert packed.index.size == 0 or (packed.index.min() >= 0 and packed.index.max() < k)
    assert set(packed.rows) == set(range(n)), "every output row is written"


@given(st.integers(0, 9999), SIZES, SIZES, DENSITIES, BLOCK_ROWS)
def test_rows_and_columns_may_be_reordered(seed, n, k, density, rows):
    rng = np.random.default_rng(seed)
    weight = sparse_matrix(seed, n, k, density)
    order = rng.permutation(n).astype(np.int32)
    columns = (7 + 3 * rng.permutation(k)).astype(np.int32)
    packed = pack(weight, BlockShape(rows), slots=order[natural_rows(n, rows)], columns=columns)
    assert unpack(packed, columns).tobytes() == weight.tobytes()
    assert set(packed.index) <= set(columns)


TILES = st.integers(1, 12)


@given(st.integers(0, 9999), SIZES, SIZES, DENSITIES, BLOCK_ROWS, TILES, st.sampled_from([1, 3]))
def test_unpack_inverts_pack_in_column_tiles(seed, n, k, density, rows, tiles, unroll):
    rng = np.random.default_rng(seed)
    weight = sparse_matrix(seed, n, k, density)
    tile_of = column_tiles(k, tiles, int(rng.choice([1, 4])))
    # Distinct within a tile only, as in a panel.
    columns = np.concatenate(
        [rng.permutation(np.count_nonzero(tile_of == t)) for t in range(tiles)]
    ).astype(np.int32)
    packed = pack(
        weight, BlockShape(rows), unroll=unroll, columns=columns, tiles=tiles, tile_of=tile_of
    )
    assert unpack(packed, columns, tile_of).tobytes() == weight.tobytes()
    assert packed.indptr.size == tiles * packed.row_blocks + 1
    assert packed.row_blocks == -(-n // rows)
    named = pack(weight, BlockShape(rows), unroll=unroll, tiles=tiles, tile_of=tile_of)
    assert unpack(named).tobytes() == weight.tobytes()
    if unroll == 1:
        tile = np.repeat(np.arange(tiles), np.diff(named.indptr[:: named.row_blocks]))
        assert np.array_equal(tile, tile_of[named.index]), "entries lie in their columns' tile"


@given(st.integers(0, 9999), SIZES, SIZES, DENSITIES, BLOCK_ROWS)
def test_dense_form_keeps_every_column(seed, n, k, density, rows):
    weight = sparse_matrix(seed, n, k, density)
    packed = pack(weight, BlockShape(rows), keep_all=True)
    assert packed.entries == -(-n // rows) * k
    assert unpack(packed).tobytes() == weight.tobytes()


@given(st.integers(0, 9999), SIZES, SIZES, DENSITIES, st.sampled_from([1, 4, 8, 16]))
def test_unpack_inverts_sliced_pack(seed, n, k, density, lanes):
    weight = sparse_matrix(seed, n, k, density)
    packed = pack_sliced(weight, lanes, unroll=2)
    assert unpack_sliced(packed).tobytes() == weight.tobytes()
    assert set(packed.rows) == set(range(n))


def test_sliced_rows_of_like_length_share_a_slice():
    weight = np.zeros((32, 64), np.float32)
    weight[::2, :32] = 1.0
    weight[1::2, 0] = 1.0
    packed = pack_sliced(weight, 16)
    assert sorted(np.diff(packed.indptr)) == [1, 32]


@given(st.integers(0, 9999), st.integers(1, 4), st.integers(1, 12), SIZES, BLOCK_ROWS)
def test_joined_groups_are_the_stacked_matrix(seed, groups, n, k, rows):
    parts = [sparse_matrix(seed + g, n, k, 0.3) for g in range(groups)]
    joined = join([pack(part, BlockShape(rows)) for part in parts])
    assert unpack(joined).tobytes() == np.concatenate(parts).tobytes()
    tile_of = column_tiles(k, 3, 1)
    tiled = join([pack(part, BlockShape(rows), tiles=3, tile_of=tile_of) for part in parts])
    assert unpack(tiled).tobytes() == np.concatenate(parts).tobytes()


def test_only_blocks_with_a_non_zero_are_kept():
    weight = np.zeros((8, 6), np.float32)
    weight[1, 2] = weight[7, 5] = 3.0
    kept = kept_blocks(weight != 0, natural_rows(8, 4), 4)
    assert np.argwhere(kept).tolist() == [[0, 2], [1, 5]]
    packed = pack(weight, BlockShape(4))
    assert packed.entries == 2
    assert packed.nbytes == sum(
        a.nbytes for a in (packed.index, packed.data, packed.rows, packed.indptr)
    )


def test_any_stretch_of_row_blocks_holds_about_the_same_work():
    rng = np.random.default_rng(0)
    weight = np.zeros((256, 400), np.float32)
    for row in range(256):
        weight[row, : rng.integers(1, 400)] = 1.0
    work = np.diff(pack(weight, BlockShape(1)).indptr)
    halves = work[:128].sum() / work.sum()
    assert 0.48 < halves < 0.52


@given(st.lists(st.integers(0, 99), min_size=1, max_size=200))
def test_every_row_block_is_in_one_stretch(counts):
    assert sorted(even_stretches(np.array(counts))) == list(range(len(counts)))


def test_row_blocks_of_like_work_keep_their_order():
    assert (even_stretches(np.full(64, 7)) == np.arange(64)).all()
    counts = np.random.default_rng(0).binomial(1000, 0.1, 64)
    order = even_stretches(counts)
    for stretches in (2, 4):
        shares = counts[order].reshape(stretches, -1).sum(axis=1)
        assert shares.max() < 1.03 * shares.mean()
    assert (order // 32 == np.arange(64) // 32).mean() > 0.9


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="R x 1"):
        pack(np.zeros((4, 4), np.float32), BlockShape(2, 2))
    with pytest.raises(ValueError, match="at least one row"):
        BlockShape(0)
    a, b = (pack(np.ones((4, 4), np.float32), BlockShape(r)) for r in (1, 2))
    with pytest.raises(ValueError, match="tiles of columns"):
        pack(np.zeros((4, 4), np.float32), BlockShape(1), tiles=2)
    with pytest.raises(ValueError, match="joined"):
        join([a, b])


@given(st.integers(0, 9999), SIZES, SIZES, DENSITIES, BLOCK_ROWS)
def test_gathered_rows_pack_exactly(seed, n, k, density, rows):
    weight = sparse_matrix(seed, n, k, density)
    slots = gather_rows(weight != 0, rows)
    assert slots.size % rows == 0
    assert set(slots) == set(range(n))
    assert unpack(pack(weight, BlockShape(rows), slots=slots)).tobytes() == weight.tobytes()


@given(st.integers(0, 9999), st.sampled_from([2, 4, 8, 16]), st.integers(1, 6))
def test_shuffled_blocks_are_found_again(seed, rows, blocks):
    rng = np.random.default_rng(seed)
    mask = np.repeat(rng.random((blocks, 200)) < 0.3, rows, axis=0)
    shuffled = mask[rng.permutation(mask.shape[0])]
    kept = kept_blocks(shuffled, gather_rows(shuffled, rows), rows)
    assert int(kept.sum()) * rows == int(mask.sum())


def test_aligned_blocks_stay_and_broken_ones_are_padded():
    rng = np.random.default_rng(3)
    mask = np.repeat(rng.random((6, 200)) < 0.3, 8, axis=0)
    assert gather_rows(mask, 8).tolist() == list(range(48))
    lost = np.delete(mask, [3, 20, 21], axis=0)
    assert kept_blocks(lost, gather_rows(lost, 8), 8).sum() * 8 == mask.sum()
    scattered = rng.random((20, 200)) < 0.3
    assert gather_rows(scattered, 8).tolist() == natural_rows(20, 8).tolist()
