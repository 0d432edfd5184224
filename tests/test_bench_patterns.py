"""Pictures of weight matrices: PNGs, and what pivoting does in them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tvm_pivot.bench import patterns
from tvm_pivot.bench.patterns import pattern_pictures, png


def decoded(data: bytes) -> np.ndarray:
    """The palette indices of a PNG, as another decoder reads them."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        return np.array(image)


def test_png_roundtrip() -> None:
    cells = np.random.default_rng(0).integers(0, 5, (37, 91)).astype(np.uint8)
    data = png(cells, ((0, 0, 0, 0), (9, 8, 7, 255), (1, 2, 3, 4), (5, 6, 7, 8), (9, 9, 9, 9)))
    assert np.array_equal(decoded(data), cells)
    with Image.open(io.BytesIO(data)) as image:
        colours = np.array(image.convert("RGBA"))
    assert (colours[cells == 2] == (1, 2, 3, 4)).all()
    assert (colours[cells == 0][:, 3] == 0).all()


def save_dense_layers(path: Path, *masks: np.ndarray) -> Path:
    """A network of dense layers with ones where the masks [out, in] are, and batch 64."""
    nodes, weights, x = [], [], "x"
    for i, mask in enumerate(masks):
        weights.append(numpy_helper.from_array(mask.T.astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"y{i}"], name=f"layer{i}"))
        x = f"y{i}"
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [info("x", TensorProto.FLOAT, [64, masks[0].shape[1]])],
        [info(x, TensorProto.FLOAT, [64, masks[-1].shape[0]])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def planted(rows: int, columns: int, height: int, seed: int) -> np.ndarray:
    """A mask of full height x 1 blocks, a quarter of them; every column is used."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((rows // height, columns)) < 0.25
    blocks[rng.integers(0, rows // height, columns), np.arange(columns)] = True
    return np.repeat(blocks, height, axis=0)


def test_pictures_show_shuffled_rows_gathered(tmp_path: Path) -> None:
    blocks = planted(64, 80, 8, seed=1)
    order = np.random.default_rng(2).permutation(64)
    path = save_dense_layers(tmp_path / "net.onnx", blocks[order])
    (shown,) = pattern_pictures(path)
    height = int(shown.block.removesuffix("x1"))  # what the host's kernels like best
    assert height in (4, 8) and shown.pattern == f"{height}x1 permuted"
    assert shown.shape == shown.size == shown.size_after == (64, 80)
    assert shown.density == pytest.approx(blocks.mean())
    assert "gathered" in shown.order
    assert np.array_equal(decoded(shown.before) != patterns.ZERO, blocks[order])
    after = decoded(shown.after)
    assert not (after == patterns.FILL).any()  # all blocks are full again
    in_blocks = (after != patterns.ZERO).reshape(-1, height, 80)
    assert (in_blocks == in_blocks[:, :1]).all()
    supports = {mask.tobytes() for mask in blocks[::8]}
    assert {mask.tobytes() for mask in in_blocks[:, 0]} == supports
    packed = decoded(shown.packed) != patterns.ZERO
    assert np.array_equal(packed.sum(axis=1), in_blocks.reshape(64, 80).sum(axis=1))
    assert (packed[:, :-1] >= packed[:, 1:]).all()  # nothing right of a gap


def test_pictures_of_the_most_different_layers_come_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    masks = (
        planted(128, 160, 8, seed=4),
        planted(192, 128, 8, seed=5),
        rng.random((96, 192)) < 0.05,
    )
    shown = pattern_pictures(save_dense_layers(tmp_path / "net.onnx", *masks))
    assert [p.layer for p in shown[:1]] == ["w1"] and len(shown) == 3
    assert {p.pattern for p in shown[:2]} == {"8x1 blocks", "unstructured"}
    assert "already in blocks" in shown[0].order
    assert shown[0].shape == (192, 128) and shown[0].size == (96, 96)
    assert np.array_equal(decoded(shown[0].before) != 0, masks[1][:96, :96])
    assert len(pattern_pictures(tmp_path / "net.onnx", most=1)) == 1


def test_a_dense_network_has_no_pictures(tmp_path: Path) -> None:
    path = save_dense_layers(tmp_path / "net.onnx", np.ones((32, 32), bool))
    assert pattern_pictures(path) == []
