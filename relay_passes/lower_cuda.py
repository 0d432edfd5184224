"""Replace every dense and conv2d layer by a call of its packed CUDA kernel."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr, IRModule

from ..targets import PivotTarget
from .graph import Rewriter
from .layers import PlannedLayer
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

    def _conv(self, rw: Rewriter, site: Site) -> Expr:
        geometry = site.layer.geometry
        image = geometry.channels * geometry.y.size * geometry.x.size
        planes = rw.reshape(site.x, (geometry.batch, image))
        out = self._run(rw, site, self._made(site), planes, site.residual)
        return rw.reshape(out, site.shape)
