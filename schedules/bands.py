"""Kernels that read images: they lay out the planes of some output rows at a time.

The planes of a large image do not fit the level-2 cache, and the planes kernel reads them in the
order of its columns, which no prefetcher can follow. A band of output rows reads few rows of the
image. These are copied, channel by channel, to planes that stay in level 2 while all row blocks
use them; the padding is added on the way, and no planes of the whole image are ever written.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad, TensorRegion
from tvm.s_tir import SBlock, SBlockRealize

from ..planes import ConvGeometry
from .analysis import substitute
from .block_sparse import OUTPUT
from .masked_stores import is_masked, masked_elsewhere
from .moves import few_tasks
from .pack_planes import clear_slack, lay_out, loop
from .problems import Bands
from .store_once import STORES_ONCE, store_freely


def in_bands(
    kernel: tirx.PrimFunc, geometry: ConvGeometry, bands: Bands, lanes: int
) -> tirx.PrimFunc:
    """A kernel for whole images from the one for a band.

    Args:
        kernel: the scheduled planes kernel of ``geometry.band(bands.rows)``, for one core; its
            output rows have gaps.
        geometry: the convolution.
        bands: at most all output rows. The last band ends with the image.
        lanes: floats of a vector.

    Returns:
        The same kernel, but X is [batch, channels, height, width], and Y and the residual are
        [batch, outputs, output height, output width].
    """
    if kernel.attrs.get(STORES_ONCE) and geometry.y.output % bands.rows:
        kernel = store_freely(kernel)
    rows, height, batch = bands.rows, geometry.y.output, geometry.batch
    band, count = geometry.band(rows), -(-height // rows)
    shape = (batch, geometry.outputs, height, geometry.x.output)
    params = {str(param.name): param for param in kernel.params}
    dtype = params["X"].ty.dtype
    planes = tirx.decl_buffer((1, band.image_floats), dtype, name="planes")
    image = (batch, geometry.channels, geometry.y.size, geometry.x.size)
    x = tirx.decl_buffer(image, dtype, name="X")
    whole = {
        params[name]: tirx.decl_buffer(shape, dtype, name=name)
        for name in (OUTPUT, "residual")
        if name in params
    }

    def task(t: Any) -> SBlockRealize:
        n, first = tirx.floordiv(t, count), tirx.floormod(t, count) * rows
        if height % rows:
            first = tirx.min(first, tirx.const(height - rows, "int32"))

        def channel(c: Any) -> tirx.Stmt:
            zero = tirx.const(0, "int32")
            parts = lay_out(geometry, band, x, planes, (n, zero), c, lanes, first)
            return parts[0] if len(parts) == 1 else tirx.SeqStmt(parts)

        steps = [
            loop(band.channels, channel),
            clear_slack(band, planes, tirx.const(0, "int32"), lanes),
            _moved(substitute(kernel.body, {params["X"]: planes}), whole, n, first),
        ]
        block = SBlock([], [], [], "band", tirx.SeqStmt(steps), alloc_buffers=[planes])
        return SBlockRealize([], tirx.const(True, "bool"), block)

    kind = tirx.ForKind.PARALLEL if bands.parallel else tirx.ForKind.SERIAL
    root = SBlock([], [], [], "root", few_tasks(loop(batch * count, task, kind)))
    replaced = {params["X"]: x, **whole}
    return tirx.PrimFunc(
        [replaced.get(param, param) for param in kernel.params],
        SBlockRealize([], tirx.const(True, "bool"), root),
        kernel.ret_type,
        kernel.attrs,
    )


def _moved(body: Any, whole: dict[Any, Any], n: Any, first: Any) -> Any:
    """`body` with the rows of a band, in Y and the residual, where they lie in whole images."""

    def place(indices: Any) -> list[Any]:
        return [n, indices[1], first + indices[2], indices[3]]

    def load(node: Any) -> Any:
        buffer = whole.get(node.source)
        return node if buffer is None else tirx.BufferLoad(buffer, place(node.indices))

    def store(node: tirx.BufferStore) -> tirx.BufferStore:
        buffer = whole.get(node.buffer)
        return node if buffer is None else tirx.BufferStore(buffer, node.value, place(node.indices))

    def masked(node: tvm.ir.Call) -> Any:
        buffer = whole.get(node.args[0]) if is_masked(node) else None
        return node if buffer is None else masked_elsewhere(node, buffer, place)

    def region(node: TensorRegion) -> Any:
        buffer = whole.get(node.source)
        if buffer is None:
            return node
        everything = [tvm.ir.Range(0, extent) for extent in buffer.ty.shape]
        return tirx.BufferRegion(buffer, everything)

    rewrites = [(TensorLoad, load), (tirx.BufferStore, store)]
    rewrites += [(TensorRegion, region), (tvm.ir.Call, masked)]
    return tvm_ffi.structural_map(body, rewrites)
