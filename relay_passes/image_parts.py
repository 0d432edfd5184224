"""How the new function stores images (see `split_images`, `align_planes`), and their values."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import relax
from tvm.ir import Expr

from ..planes import aligned_floats, rows_of_part
from .graph import Rewriter

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stored:
    """Images as they are stored.

    Attributes:
        value: their value.
        parts: in how many stretches of rows each image is.
        aligned: whether every plane begins with a cache line.
    """

    value: Expr
    parts: int = 1
    aligned: bool = False


@dataclass
class ImageParts:
    """Images [batch, channels, height, width] that are stored otherwise: in parts, stretches of as
    many rows each, [batch * parts, channels, rows, width], where what the last one has too many is
    not zero; or with planes on whole cache lines (see `Parts`).

    Each of them is bound as it would be otherwise too, which costs nothing since nobody reads it.

    Attributes:
        known: how they are stored, by images as they would be otherwise.
    """

    known: dict[Expr, Stored] = field(default_factory=dict)

    def record(
        self, rw: Rewriter, value: Expr, shape: Shape, parts: int, aligned: bool = False
    ) -> Expr:
        """The images of `shape` that `value` holds in parts, or with aligned planes."""
        if parts == 1 and not aligned:
            return rw.reshape(value, shape)
        n, c, h, w = shape
        rows = rows_of_part(h, parts)
        pixels = rows * w
        if aligned:
            stored = rw.reshape(value, (n * parts, c, aligned_floats(pixels)))
            planes = rw.emit(relax.op.strided_slice(stored, [2], [0], [pixels]))
        else:
            planes = stored = rw.reshape(value, (n * parts, c, rows, w))
        apart = rw.reshape(planes, (n, parts, c, rows, w))
        moved = rw.emit(relax.op.permute_dims(apart, (0, 2, 1, 3, 4)))
        whole = rw.reshape(moved, (n, c, parts * rows, w))
        if parts * rows > h:
            whole = rw.emit(relax.op.strided_slice(whole, [2], [0], [h]))
        self.known[whole] = Stored(stored, parts, aligned)
        return whole

    def stored(self, x: Expr) -> Stored:
        """Images as they are stored."""
        return self.known.get(x, Stored(x))

    def of(self, x: Expr, parts: int, aligned: bool = False) -> Expr:
        """The value of images that are stored so."""
        stored = self.stored(x)
        assert (stored.parts, stored.aligned) == (parts, aligned)
        return stored.value
