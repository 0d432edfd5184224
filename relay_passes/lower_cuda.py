"""Replace every dense and conv2d layer by a call of its packed CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar, IRModule

from ..layout import BlockShape, IntArray, PackedWeight
from ..pack import join, pack
from ..pack_tensor_cores import pack_tensor_cores
from ..schedules.cuda import choose_planes, choose_rows
from ..schedules.cuda_planes import CudaPlanes, planes_kernel, tap_tables
from ..schedules.cuda_rows import rows_kernel
from ..schedules.tensor_cores import tensor_core_kernel, window_columns
from ..targets import PivotTarget
from .cuda_layers import cuda_planes, tensor_core_problem, tensor_core_tile
from .epilogues import FusedLayer
from .graph import Rewriter, constant, dtype_of, stored
from .layers import Layer, Plan, PlannedLayer, rows_problem
from .lower_layers import Lowering, Site, lower

OPAQUE = 8  # TVM's number for a function that nothing is fused with


def lower_cuda(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget
) -> tuple[IRModule, dict[str, str]]:
    """The module with packed kernels in place of its layers, and each layer's kernel by name.

    Kernels take and give the target's storage dtype; all else stays float32, with casts between.
    """
    return lower(mod, CudaLowering(mod, planned, target))


class CudaLowering(Lowering):
    """Writes a network with CUDA kernels in place of its layers."""

    def _choice(self, planned: PlannedLayer, fused: FusedLayer) -> None:
        """Tiles are chosen here, by the rule."""

    def _conv(self, rw: Rewriter, site: Site) -> Expr:
        geometry = site.layer.geometry
        image = geometry.channels * geometry.y.size * geometry.x.size
        planes = rw.reshape(site.x, (geometry.batch, image))
        return rw.reshape(self._planes(rw, site, planes, site.residual), site.shape)

    def _planes(self, rw: Rewriter, site: Site, planes: Expr, residual: Expr | None) -> Expr:
        if site.plan.form == "tensor_cores":
            return self._tensor_cores(rw, site, planes, residual)
        problem = cuda_planes(site.layer, site.plan, site.fused.epilogue, self.target)
        tile, _ = choose_planes(problem, site.plan.entries, self.target)
        packed, more = _pack_planes(site.layer, site.plan, problem, tile.unroll, tile.vector)
        kernel = self._kernel(rw, site, (problem, tile), lambda: planes_kernel(problem, tile))
        return self._call(rw, site, kernel, problem.output, planes, packed, residual, more)

    def _tensor_cores(self, rw: Rewriter, site: Site, planes: Expr, residual: Expr | None) -> Expr:
        layer, plan = site.layer, site.plan
        problem = tensor_core_problem(layer, plan, site.fused.epilogue, self.target)
        tile, _ = tensor_core_tile(problem, plan, self.target)
        if problem.window is None:
            offsets, taps = np.arange(problem.columns, dtype=np.int32) * problem.pixels, None
        else:
            offsets, taps = window_columns(layer.geometry.channels, problem.window)
        packed = pack_tensor_cores(
            layer.matrix,
            tile.team(plan.block_rows),
            dtype=problem.dtype,
            slots=plan.slots[0],
            offsets=offsets.astype(np.int32),
            taps=taps,
            keep_all=plan.keep_all,
        )

        def make() -> tirx.PrimFunc:
            # A call of CUDA text looks like an elementwise function to TVM, which would fuse it.
            return tensor_core_kernel(problem, tile).with_attr("op_pattern", OPAQUE)

        kernel = self._kernel(rw, site, (problem, tile), make)
        tables = (*packed.tables, packed.slot_bias(site.fused.bias))
        return self._emit(rw, kernel, problem.output, planes, tables, residual)

    def _rows(self, rw: Rewriter, site: Site) -> Expr:
        plan = site.plan
        problem = rows_problem(site.layer, plan, site.fused.epilogue)
        tile, _ = choose_rows(problem, plan.entries, self.target)
        packed = pack(
            site.layer.matrix,
            BlockShape(plan.block_rows),
            slots=plan.slots[0],
            keep_all=plan.keep_all,
            longest_first=True,
        )
        dtype = self.target.storage
        key = (problem, tile, dtype)
        kernel = self._kernel(rw, site, key, lambda: rows_kernel(problem, tile, dtype))
        x = rw.reshape(site.x, (problem.inputs, problem.columns))
        y = self._call(rw, site, kernel, problem.output, x, packed, site.residual)
        return rw.reshape(y, site.shape)

    def _call(
        self,
        rw: Rewriter,
        site: Site,
        kernel: GlobalVar,
        out: tuple[int, ...],
        x: Expr,
        packed: PackedWeight,
        residual: Expr | None,
        more: tuple[IntArray, ...] = (),
    ) -> Expr:
        """Call a kernel of CUDA cores; the result has shape `out` and is float32."""
        bias, weights = site.fused.bias[packed.rows], stored(packed.data, self.target.storage)
        tables = (packed.indptr, packed.index, weights, packed.rows, bias, *more)
        return self._emit(rw, kernel, out, x, tables, residual)

    def _emit(
        self,
        rw: Rewriter,
        kernel: GlobalVar,
        out: tuple[int, ...],
        x: Expr,
        tables: Sequence[np.ndarray],
        residual: Expr | None,
    ) -> Expr:
        """The call itself: input, tables, residual."""
        dtype = self.target.storage
        args = [_cast(rw, x, dtype), *(constant(table) for table in tables)]
        if residual is not None:
            args.append(_cast(rw, rw.reshape(residual, out), dtype))
        y = rw.emit(relax.call_tir(kernel, args, relax.TensorType(out, dtype)))
        return _cast(rw, y, "float32")


def _cast(rw: Rewriter, x: Expr, dtype: str) -> Expr:
    return x if dtype_of(x) == dtype else rw.emit(relax.op.astype(x, dtype))


def _pack_planes(
    layer: Layer, plan: Plan, problem: CudaPlanes, unroll: int, vector: int
) -> tuple[PackedWeight, tuple[IntArray, ...]]:
    """The packed weight of all channel groups, offsets in its index, and the table of taps."""
    parts, taps = [], []
    for group, matrix in enumerate(layer.group_matrices()):
        offsets, bits = tap_tables(layer.geometry, group)
        part = pack(
            matrix,
            BlockShape(plan.block_rows),
            unroll=unroll,
            slots=plan.slots[group],
            keep_all=plan.keep_all,
            longest_first=True,
        )
        taps.append(bits[part.index])
        parts.append(replace(part, index=offsets[part.index] // vector))
    return join(parts), (np.concatenate(taps),) if problem.masked else ()
