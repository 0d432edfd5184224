"""Replace every dense and conv2d layer by a call of its packed, scheduled kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar, IRModule, Var

from ..planes import WHOLE, ConvGeometry, Parts
from ..schedules.choices import Choice
from ..schedules.pack_planes import pack_planes
from ..targets import PivotTarget
from .epilogues import FusedLayer, fuse_epilogues
from .feature_major import FeatureMajor
from .graph import MAIN, Rewriter, constant, dtype_of, static_shape
from .image_parts import ImageParts
from .layer_kernels import layer_kernel, rule_choice
from .layers import Handover, Layer, Lead, Plan, PlannedLayer, laid_out
from .pack_layer import LayerKernel

# From more floats than this on all cores copy: each then fetches less of what another one has
# written.
PARALLEL_FLOATS = 1 << 14


def lower_layers(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget
) -> tuple[IRModule, dict[str, str]]:
    """The module with packed kernels in place of its layers, and each layer's kernel by name."""
    return lower(mod, Lowering(mod, planned, target))


def lower(mod: IRModule, lowering: Lowering) -> tuple[IRModule, dict[str, str]]:
    """The module as `lowering` writes it, and each layer's kernel by name."""
    lowered = Rewriter(mod).run(lowering.visit)
    for name, func in lowering.kernels.functions.items():
        lowered[lowering.kernels.globals[name]] = func
    lowered = relax.transform.CanonicalizeBindings()(lowered)
    lowered = relax.transform.DeadCodeElimination([MAIN])(lowered)
    return lowered, {str(var.name): kernel for var, kernel in lowering.kernel_of.items()}


@dataclass
class Kernels:
    """Kernels by what they compute: layers that are alike share one."""

    globals: dict[str, GlobalVar] = field(default_factory=dict)
    functions: dict[str, tirx.PrimFunc] = field(default_factory=dict)
    names: dict[object, str] = field(default_factory=dict)

    def add(
        self, rw: Rewriter, key: object, prefix: str, make: Callable[[], tirx.PrimFunc]
    ) -> GlobalVar:
        """The kernel of `key`; `make` makes it the first time."""
        if key not in self.names:
            name = f"{prefix}_{len(self.names)}"
            func = make().with_attr("global_symbol", name)
            self.names[key] = name
            self.functions[name] = func
            self.globals[name] = rw.builder.add_func(func, name)
        return self.globals[self.names[key]]


@dataclass(frozen=True, eq=False)
class Site:
    """A layer where it stands in the new function.

    Attributes:
        fused: the layer and its epilogue.
        plan: how to run it.
        x: its input.
        residual: what its epilogue adds, in the shape of the output.
        shape: the output's shape in the graph.
        choice: how its kernel is made.
        handover: what its kernel does behind it.
        lead: what its kernel does before it.
        parts: how its input's and its output's images are stored.
    """

    fused: FusedLayer
    plan: Plan
    x: Expr
    residual: Expr | None
    shape: tuple[int, ...]
    choice: Choice
    handover: Handover | None = None
    lead: Lead | None = None
    parts: Parts = WHOLE

    @property
    def layer(self) -> Layer:
        return self.fused.layer


class Lowering:
    """Writes a network with CPU kernels in place of its layers."""

    def __init__(self, mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget) -> None:
        fused = fuse_epilogues(mod, [p.layer for p in planned])
        plans = {p.layer.var: p for p in planned}
        self.target = target
        self.ends = {f.end: (f, plans[f.layer.var]) for f in fused}
        self.inner = {var for f in fused for var in f.inner}
        for one in fused:
            handover = plans[one.layer.var].handover
            if handover is not None:
                self.inner |= handover.inner
                self.ends[handover.end] = self.ends.pop(one.end)
        for lead in (p.lead for p in planned if p.lead is not None):
            self.inner |= lead.inner
        self.starts = {f.layer.var for f in fused}
        self.inputs: dict[Var, Expr] = {}
        self.kernels = Kernels()
        self.kernel_of: dict[Var, str] = {}
        self.planes: dict[object, Expr] = {}
        self.feature_major = FeatureMajor(target)
        self.image_parts = ImageParts()

    def visit(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """Put a layer's kernel where its fused chain ends; pass everything else on."""
        if var in self.starts:
            self.inputs[var] = value.args[0]
        if var in self.inner:
            # Computed by the kernel at the end of its chain; nothing else reads it.
            return value.args[0]
        if var not in self.ends:
            return self.feature_major.follow(rw, var, value)
        fused, planned = self.ends[var]
        plan, choice = planned.plan, self._choice(planned, fused)
        shape = static_shape(var)
        assert shape is not None
        residual = fused.residual
        if isinstance(residual, Var):
            residual = rw.remap.get(residual, residual)
        handover, lead = planned.handover, planned.lead
        x = self.inputs[fused.layer.var if lead is None else lead.layer.var]
        parts = Parts(written=planned.parts, written_aligned=planned.aligned)
        site = Site(fused, plan, x, residual, shape, choice, handover, lead, parts)
        if plan.form == "rows":
            return self._rows(rw, site)
        if plan.form == "depthwise":
            return self._run(rw, site, self._made(site), site.x, site.residual)
        return self._dense(rw, site) if site.layer.op == "dense" else self._conv(rw, site)

    def _choice(self, planned: PlannedLayer, fused: FusedLayer) -> Choice:
        """How a layer's kernel is made."""
        if planned.choice is not None:
            return planned.choice
        return rule_choice(fused.layer, planned.plan, fused.epilogue, self.target)

    def _conv(self, rw: Rewriter, site: Site) -> Expr:
        g, images = laid_out(site.layer, site.plan).geometry, self.image_parts
        written = site.parts.written, site.parts.written_aligned
        other = None if site.residual is None else images.of(site.residual, *written)
        if g.direct:
            part = g.in_parts(site.parts.written)
            part = part.aligned() if site.parts.written_aligned else part
            x = rw.reshape(images.of(site.x, *written), (part.batch, part.image_floats))
        else:
            read = images.stored(site.x)
            parts = replace(site.parts, read=read.parts, read_aligned=read.aligned)
            x, site = read.value, replace(site, parts=parts)
            if not site.choice.band_rows:
                x = self._packed(rw, x, g, site.parts)
        made = self._run(rw, site, self._made(site), x, other)
        return images.record(rw, made, site.shape, *written)

    def _dense(self, rw: Rewriter, site: Site) -> Expr:
        """Rows become pixels: the kernel reads and writes [parts, features, rows]."""
        g, known = site.layer.geometry, self.feature_major
        parts = g.batch
        planes = rw.reshape(known.of(rw, site.x, parts), (parts, g.image_floats))
        other = None if site.residual is None else known.of(rw, site.residual, parts)
        matrix = self._run(rw, site, self._made(site), planes, other)
        return known.record(rw, matrix, site.shape, parts)

    def _rows(self, rw: Rewriter, site: Site) -> Expr:
        inputs = site.layer.row_inputs
        assert inputs is not None
        x = rw.reshape(site.x, (inputs, site.layer.matrix.shape[1]))
        return rw.reshape(self._run(rw, site, self._made(site), x, site.residual), site.shape)

    def _made(self, site: Site) -> LayerKernel:
        epilogue, plan, choice = site.fused.epilogue, site.plan, site.choice
        beside = site.handover, site.lead, site.parts
        return layer_kernel(site.layer, plan, epilogue, choice, self.target, *beside)

    def _run(
        self, rw: Rewriter, site: Site, made: LayerKernel, x: Expr, residual: Expr | None
    ) -> Expr:
        """Call a kernel on its input, its tables and the residual."""
        kernel = self._kernel(rw, site, made.key, made.make)
        tables = (constant(table) for table in made.tables(site.fused.bias))
        args = [_cast(rw, x, made.dtype), *tables]
        if residual is not None:
            args.append(_cast(rw, rw.reshape(residual, made.residual or made.output), made.dtype))
        out = relax.TensorType(made.output, made.dtype)
        return _cast(rw, rw.emit(relax.call_tir(kernel, args, out)), "float32")

    def _kernel(
        self, rw: Rewriter, site: Site, key: object, make: Callable[[], tirx.PrimFunc]
    ) -> GlobalVar:
        kernel = self.kernels.add(rw, key, f"{site.layer.op}_{kind(site.plan, site.choice)}", make)
        self.kernel_of[site.layer.var] = str(kernel.name_hint)
        return kernel

    def _packed(self, rw: Rewriter, x: Expr, g: ConvGeometry, parts: Parts) -> Expr:
        """The planes of `x`; layers that read it the same way share them."""
        parts = replace(parts, written_aligned=False)  # planes are padded anyhow
        layout = (replace(g, outputs=0, groups=1), parts)
        key = (x, layout)
        if key not in self.planes:
            parallel = self.target.cores > 1 and g.batch * g.image_floats > PARALLEL_FLOATS
            lanes, dtype = self.target.stored_lanes, self.target.precision

            def make() -> tirx.PrimFunc:
                return pack_planes(g, lanes, parallel, dtype, parts)

            kernel = self.kernels.add(rw, layout, "pack_planes", make)
            planes = g.in_parts(parts.written)
            out = relax.TensorType((planes.batch, planes.image_floats), dtype)
            args = [_cast(rw, x, dtype)]
            self.planes[key] = rw.emit(relax.call_tir(kernel, args, out))
        return self.planes[key]


def _cast(rw: Rewriter, x: Expr, dtype: str) -> Expr:
    """`x` as another dtype, if it is not of that one."""
    return x if dtype_of(x) == dtype else rw.emit(relax.op.astype(x, dtype))


def kind(plan: Plan, choice: Choice) -> str:
    """A word for how a layer is run, in its kernel's name."""
    if choice.form == "winograd":
        return f"winograd_{choice.block_rows}x1"
    if plan.own_columns:
        return f"window{plan.window}_{plan.block_rows}" if plan.window else f"sell{plan.block_rows}"
    if plan.form == "depthwise":
        return "depthwise"
    return f"{'dense' if plan.keep_all else 'sparse'}_{plan.form}_{plan.block_rows}x1"
