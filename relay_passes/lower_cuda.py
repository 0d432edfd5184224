"""Replace every dense and conv2d layer by a call of its packed CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tvm import relax
from tvm.ir import Expr, GlobalVar, IRModule

from ..layout import BlockShape, IntArray, PackedWeight
from ..pack import join, pack
from ..schedules.cuda import choose_planes, choose_rows
from ..schedules.cuda_planes import CudaPlanes, planes_kernel, tap_tables
from ..schedules.cuda_rows import rows_kernel
from ..targets import PivotTarget
from .cuda_layers import cuda_planes
from .epilogues import FusedLayer
from .graph import Rewriter, constant, dtype_of
from .layers import Layer, Plan, PlannedLayer, rows_problem
from .lower_layers import Lowering, Site, lower


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
        problem = cuda_planes(site.layer, site.plan, site.fused.epilogue, self.target)
        tile, _ = choose_planes(problem, site.plan.entries, self.target)
        packed, more = _pack_planes(site.layer, site.plan, problem, tile.unroll, tile.vector)
        kernel = self._kernel(rw, site, (problem, tile), lambda: planes_kernel(problem, tile))
        return self._call(rw, site, kernel, problem.output, planes, packed, residual, more)

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
        dtype = self.target.precision
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
        """Call a kernel, with casts around it; the result has shape `out` and is float32."""
        dtype = self.target.precision
        bias = site.fused.bias[packed.rows]
        tables = (packed.indptr, packed.index, packed.data.astype(dtype), packed.rows, bias, *more)
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
