"""Which images of the new function are stored in parts (see `split_images`), and their values."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import relax
from tvm.ir import Expr

from ..planes import rows_of_part
from .graph import Rewriter

Shape = tuple[int, ...]


@dataclass
class ImageParts:
    """Images [batch, channels, height, width] that are stored in parts, stretches of as many rows
    each: [batch * parts, channels, rows, width]. What the last one has too many is not zero.

    Each of them is bound as a whole too, which costs nothing since nobody reads it.

    Attributes:
        known: by whole images, their parts, and in how many each image is.
    """

    known: dict[Expr, tuple[Expr, int]] = field(default_factory=dict)

    def record(self, rw: Rewriter, value: Expr, shape: Shape, parts: int) -> Expr:
        """The whole images of `shape` that `value` holds in parts."""
        if parts == 1:
            return rw.reshape(value, shape)
        n, c, h, w = shape
        rows = rows_of_part(h, parts)
        stored = rw.reshape(value, (n * parts, c, rows, w))
        apart = rw.reshape(stored, (n, parts, c, rows, w))
        moved = rw.emit(relax.op.permute_dims(apart, (0, 2, 1, 3, 4)))
        whole = rw.reshape(moved, (n, c, parts * rows, w))
        if parts * rows > h:
            whole = rw.emit(relax.op.strided_slice(whole, [2], [0], [h]))
        self.known[whole] = (stored, parts)
        return whole

    def stored(self, x: Expr) -> tuple[Expr, int]:
        """Images as they are stored, and in how many parts each."""
        return self.known.get(x, (x, 1))

    def of(self, x: Expr, parts: int) -> Expr:
        """Images in so many parts, as they are stored."""
        stored, found = self.stored(x)
        assert found == parts
        return stored
