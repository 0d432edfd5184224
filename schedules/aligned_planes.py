"""Images whose planes begin with cache lines: the rewrite of kernels that read or write them.

Where planes lie one right behind the other, and their pixels fill no whole lines, vectors straddle
two of them, and kernels that mostly load copy their inputs first. Cores that write neighbouring
planes would take a line from each other again and again.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any

from tvm import tirx

from ..planes import aligned_floats
from .placement import Place, moved, shifted


def with_aligned(func: tirx.PrimFunc, names: Collection[str]) -> tirx.PrimFunc:
    """A scheduled function with some of its parameters on whole cache lines.

    Args:
        func: the function.
        names: of parameters [images, channels, pixels] or [images, channels, height, width]. They
            become [images, channels, aligned_floats(pixels)]; the last ones are not touched.
    """
    places: dict[Any, tuple[Any, Place]] = {}
    for param in func.params:
        if param.name in names:
            images, channels, *pixels = (int(extent) for extent in param.ty.shape)
            shape = (images, channels, aligned_floats(prod(pixels)))
            new = tirx.decl_buffer(shape, param.ty.dtype, name=param.name)
            places[param] = (new, _flat(pixels[-1]) if len(pixels) > 1 else list)
    params = [places[param][0] if param in places else param for param in func.params]
    return tirx.PrimFunc(params, moved(func.body, places), func.ret_type, func.attrs)


def _flat(width: int) -> Place:
    """Where a pixel is, by its row and column."""

    def place(at: Any) -> list[Any]:
        image, channel, row, column = at
        return [image, channel, shifted(column, row * width)]

    return place
