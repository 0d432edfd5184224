"""Replace every dense and conv2d layer by a call of its packed CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax
from tvm.ir import Expr, IRModule

from ..targets import PivotTarget
from .graph import Rewriter, constant, dtype_of
from .layers import PlannedLayer
from .lower_layers import Lowering, Site, lower
from .pack_layer import LayerKernel


def lower_cuda(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget
) -> tuple[IRModule, dict[str, str]]:
    """The module with packed kernels in place of its layers, and each layer's kernel by name.

    Kernels take and give the target's storage dtype; all else stays float32, with casts between.
    """
    return lower(mod, CudaLowering(mod, planned, target))


class CudaLowering(Lowering):
    """Writes a network with CUDA kernels in place of its layers."""

    def _conv(self, rw: Rewriter, site: Site) -> Expr:
        geometry = site.layer.geometry
        image = geometry.channels * geometry.y.size * geometry.x.size
        planes = rw.reshape(site.x, (geometry.batch, image))
        return rw.reshape(self._planes(rw, site, planes, site.residual), site.shape)

    def _run(
        self, rw: Rewriter, site: Site, made: LayerKernel, x: Expr, residual: Expr | None
    ) -> Expr:
        """Call a kernel, in the target's storage dtype; the result is float32."""
        dtype = self.target.storage
        kernel = self._kernel(rw, site, made.key, made.make)
        tables = (constant(table) for table in made.tables(site.fused.bias))
        args = [_cast(rw, x, dtype), *tables]
        if residual is not None:
            args.append(_cast(rw, rw.reshape(residual, made.output), dtype))
        y = rw.emit(relax.call_tir(kernel, args, relax.TensorType(made.output, dtype)))
        return _cast(rw, y, "float32")


def _cast(rw: Rewriter, x: Expr, dtype: str) -> Expr:
    return x if dtype_of(x) == dtype else rw.emit(relax.op.astype(x, dtype))
