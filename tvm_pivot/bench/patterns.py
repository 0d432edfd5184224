"""Pictures of weight matrices: where the non-zeros are, and where pivoting brings them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..layout import IntArray
from ..pattern import FULL

if TYPE_CHECKING:
    from ..relay_passes.layers import Layer, PlannedLayer

Mask = npt.NDArray[np.bool_]
Cells = npt.NDArray[np.uint8]

# Rows and columns shown of a larger matrix: single weights stay visible, also on a phone.
WINDOW = 96

# What a cell shows; even and odd row blocks differ, so that one sees where they meet.
ZERO, NONZERO, EVEN, ODD, FILL = range(5)
# RGBA; chosen to be seen on white and on near-black. Zeros are transparent.
_PALETTE = (
    (0, 0, 0, 0),
    (112, 128, 150, 255),
    (224, 83, 27, 255),
    (245, 150, 84, 255),
    (224, 83, 27, 90),
)


@dataclass(frozen=True)
class PatternPicture:
    """The top left corner of one layer's weight matrix, before and after pivoting.

    Pictures are PNGs with one pixel per weight: rows are output channels, columns
    (input channel, tap). They are meant to be enlarged without smoothing.

    Attributes:
        layer: the layer's name.
        pattern: as in `LayerReport`.
        density: kept weights / all weights.
        shape: of the whole matrix, (rows, columns).
        block: what the kernel keeps or drops together, e.g. ``"8x1"``.
        order: what happened to the rows, in words.
        before: the weights as the model has them.
        after: rows in the kernel's order; kept blocks coloured, zeros in them pale.
        packed: the same blocks moved together, as the kernel reads them.
        size: (rows, columns) of `before`.
        size_after: (rows, columns) of `after` and `packed`.
    """

    layer: str
    pattern: str
    density: float
    shape: tuple[int, int]
    block: str
    order: str
    before: bytes
    after: bytes
    packed: bytes
    size: tuple[int, int]
    size_after: tuple[int, int]


def pattern_pictures(model: Path, most: int = 6) -> list[PatternPicture]:
    """Pictures of the layers of an ONNX file that run sparse: large ones, of all patterns.

    Args:
        model: the file; nothing is compiled.
        most: how many pictures.

    Returns:
        Largest first among those of different patterns, then among those of different shapes;
        none where no layer runs sparse.

    Raises:
        ModelImportError: the file cannot be read.
        CompileError: see `tvm_pivot.inspect`.
    """
    from ..importer import import_model
    from ..relay_passes import PHASES, Compilation
    from ..targets import resolve

    state = Compilation(import_model(model).mod, resolve("x86"))
    for phase in PHASES:
        if phase.analysis:
            state = phase.run(state)
    names = {report.name: report.pattern for report in state.reports}
    planned = [p for p in state.planned if p.skips and min(p.layer.matrix.shape) > 1]
    patterns = [names[p.layer.name] for p in planned]
    chosen = _choose([(t, p.layer.matrix.shape) for t, p in zip(patterns, planned, strict=True)])
    return [
        _picture(state.originals[planned[i].layer.name], planned[i], patterns[i])
        for i in chosen[:most]
    ]


def _choose(layers: Sequence[tuple[str, tuple[int, ...]]]) -> list[int]:
    """Which layers, given (pattern, shape), to show: new patterns first, then new shapes."""
    by_size = sorted(range(len(layers)), key=lambda i: -int(np.prod(layers[i][1])))
    chosen: dict[int, None] = {}
    patterns: set[str] = set()
    for i in by_size:
        if layers[i][0] not in patterns:
            patterns.add(layers[i][0])
            chosen[i] = None
    shapes = {layers[i] for i in chosen}
    for i in by_size:
        if layers[i] not in shapes:
            shapes.add(layers[i])
            chosen[i] = None
    return list(chosen)


def _picture(original: Layer, planned: PlannedLayer, pattern: str) -> PatternPicture:
    plan = planned.plan
    mask = planned.layer.matrix != 0
    slots = _slots(planned)
    rows = mask[slots]
    height = 1 if plan.own_columns else plan.block_rows
    after = window(block_cells(rows, height, plan.block_rows))
    before = window((original.matrix != 0).astype(np.uint8) * np.uint8(NONZERO))
    return PatternPicture(
        layer=planned.layer.name,
        pattern=pattern,
        density=float(np.count_nonzero(original.matrix)) / original.matrix.size,
        shape=(original.matrix.shape[0], original.matrix.shape[1]),
        block=f"{height}x1",
        order=_order(original, planned, slots),
        before=png(before, _PALETTE),
        after=png(after, _PALETTE),
        packed=png(pushed_left(after), _PALETTE),
        size=(before.shape[0], before.shape[1]),
        size_after=(after.shape[0], after.shape[1]),
    )


def _slots(planned: PlannedLayer) -> IntArray:
    """The row in each slot, over all channel groups."""
    mask = planned.layer.matrix != 0
    if planned.plan.own_columns:  # such a kernel takes rows of about equal length together
        return np.argsort(-np.count_nonzero(mask, axis=1), kind="stable").astype(np.int32)
    height = mask.shape[0] // len(planned.plan.slots)
    return np.concatenate([s + g * height for g, s in enumerate(planned.plan.slots)])


def _order(original: Layer, planned: PlannedLayer, slots: IntArray) -> str:
    rows, columns = planned.layer.matrix.shape
    entries = planned.plan.entries * planned.plan.block_rows
    if planned.plan.own_columns:
        said = "rows sorted by length, each with columns of its own"
    elif np.array_equal(slots[:rows], np.arange(rows)):
        full = np.count_nonzero(planned.layer.matrix) >= FULL * entries
        said = "rows already in blocks" if full else "rows stay where they are"
    else:
        said = "rows of equal columns gathered into blocks"
    dropped = [
        f"{gone} dead {what}"
        for gone, what in (
            (original.matrix.shape[0] - rows, "rows"),
            (original.matrix.shape[1] - columns, "columns"),
        )
        if gone > 0
    ]
    return "; ".join([said, *([f"{' and '.join(dropped)} dropped"] if dropped else [])])


def block_cells(rows: Mask, block_rows: int, stripe: int) -> Cells:
    """What each weight of a mask [slots, K], rows in the kernel's order, is to the kernel.

    Args:
        rows: where the weights are non-zero.
        block_rows: R of the R x 1 blocks that are kept or dropped together; divides the slots.
        stripe: rows after which the colour changes.
    """
    kept = np.repeat(rows.reshape(-1, block_rows, rows.shape[1]).any(axis=1), block_rows, axis=0)
    odd = (np.arange(rows.shape[0]) // stripe % 2).astype(np.bool_)[:, None]
    shown = np.where(rows, np.where(odd, ODD, EVEN), np.where(kept, FILL, ZERO))
    return shown.astype(np.uint8)


def pushed_left(cells: Cells) -> Cells:
    """Each row with its zeros taken out; blank on the right."""
    order = np.argsort(cells == ZERO, axis=1, kind="stable")
    return np.take_along_axis(cells, order, axis=1)


def window(cells: Cells) -> Cells:
    """The top left corner, at most `WINDOW` on each side."""
    return cells[:WINDOW, :WINDOW]


def png(cells: Cells, palette: Sequence[tuple[int, int, int, int]]) -> bytes:
    """A PNG of indices into a palette of RGBA colours, one pixel each.

    Args:
        cells: [height, width].
        palette: up to 256 colours.
    """
    height, width = cells.shape
    scanlines = np.zeros((height, width + 1), np.uint8)  # each begins with its filter: none
    scanlines[:, 1:] = cells
    chunks: Iterator[tuple[bytes, bytes]] = iter(
        (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            (b"PLTE", b"".join(bytes(colour[:3]) for colour in palette)),
            (b"tRNS", bytes(colour[3] for colour in palette)),
            (b"IDAT", zlib.compress(scanlines.tobytes(), 9)),
            (b"IEND", b""),
        )
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
