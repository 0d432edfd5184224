"""Replace every dense and conv2d layer by a call of its packed, scheduled kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar, IRModule, Var

from ..layout import BlockShape, PackedWeight, SlicedWeight
from ..pack import join, pack, pack_sliced
from ..planes import ConvGeometry
from ..schedules import tile_rule
from ..schedules.block_sparse import planes_kernel, rows_kernel
from ..schedules.block_sparse_moves import schedule_planes, schedule_rows
from ..schedules.pack_planes import pack_planes
from ..targets import PivotTarget
from .detect import planes_problem, rows_problem
from .epilogues import FusedLayer, fuse_epilogues
from .feature_major import FeatureMajor
from .graph import MAIN, Rewriter, constant, static_shape
from .layers import Plan, PlannedLayer

# Fewer floats than this are copied faster by one core than by waking another.
PARALLEL_FLOATS = 1 << 17


def lower_layers(
    mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget
) -> tuple[IRModule, dict[str, str]]:
    """The module with packed kernels in place of its layers, and each layer's kernel by name."""
    lowering = _Lowering(mod, planned, target)
    lowered = Rewriter(mod).run(lowering.visit)
    for name, func in lowering.kernels.functions.items():
        lowered[lowering.kernels.globals[name]] = func
    lowered = relax.transform.CanonicalizeBindings()(lowered)
    lowered = relax.transform.DeadCodeElimination([MAIN])(lowered)
    return lowered, {str(var.name): kernel for var, kernel in lowering.kernel_of.items()}


@dataclass
class _Kernels:
    """Kernels by what they compute: layers that are alike share one."""

    globals: dict[str, GlobalVar] = field(default_factory=dict)
    functions: dict[str, tirx.PrimFunc] = field(default_factory=dict)
    names: dict[object, str] = field(default_factory=dict)

    def add(self, rw: Rewriter, key: object, prefix: str, make: object) -> GlobalVar:
        if key not in self.names:
            name = f"{prefix}_{len(self.names)}"
            func = make()  # type: ignore[operator]
            self.names[key] = name
            self.functions[name] = func.with_attr("global_symbol", name)
            self.globals[name] = rw.builder.add_func(func, name)
        return self.globals[self.names[key]]


class _Lowering:
    def __init__(self, mod: IRModule, planned: Sequence[PlannedLayer], target: PivotTarget) -> None:
        fused = fuse_epilogues(mod, [p.layer for p in planned])
        plans = {p.layer.var: p.plan for p in planned}
        self.target = target
        self.ends = {f.end: (f, plans[f.layer.var]) for f in fused}
        self.inner = {var for f in fused for var in f.inner}
        self.calls = {f.layer.var: f for f in fused}
        self.inputs: dict[Var, Expr] = {}
        self.kernels = _Kernels()
        self.kernel_of: dict[Var, str] = {}
        self.planes: dict[object, Expr] = {}
        self.feature_major = FeatureMajor()

    def visit(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        if var in self.calls:
            self.inputs[var] = value.args[0]
        if var in self.inner:
            # Computed by the kernel at the end of its chain; nothing else reads it.
            return value.args[0]
        if var not in self.ends:
            return self.feature_major.follow(rw, var, value)
        fused, plan = self.ends[var]
        layer = fused.layer
        residual = None if fused.residual is None else _new(rw, fused.residual)
        x = self.inputs[layer.var]
        shape = static_shape(var)
        assert shape is not None
        if plan.form == "rows":
            return self._rows(rw, fused, plan, x, residual, shape)
        if layer.op == "dense":
            return self._dense(rw, fused, plan, x, residual, shape)
        return self._conv(rw, fused, plan, x, residual, shape)

    def _conv(
        self,
        rw: Rewriter,
        fused: FusedLayer,
        plan: Plan,
        x: Expr,
        residual: Expr | None,
        shape: tuple[int, ...],
    ) -> Expr:
        g = fused.layer.geometry
        if g.direct:
            planes = rw.emit(relax.op.reshape(x, (g.batch, g.image_floats)))
        else:
            planes = self._packed(rw, x, g)
        return _reshaped(rw, self._planes(rw, fused, plan, planes, residual), shape)

    def _dense(
        self,
        rw: Rewriter,
        fused: FusedLayer,
        plan: Plan,
        x: Expr,
        residual: Expr | None,
        shape: tuple[int, ...],
    ) -> Expr:
        """Rows become pixels: the kernel reads and writes [features, rows]."""
        planes = rw.emit(relax.op.reshape(self.feature_major.of(rw, x), (1, -1)))
        other = None if residual is None else self.feature_major.of(rw, residual)
        y = self._planes(rw, fused, plan, planes, other)
        matrix = rw.emit(relax.op.reshape(y, (shape[-1], int(np.prod(shape[:-1])))))
        return self.feature_major.record(rw, matrix, shape)

    def _planes(
        self, rw: Rewriter, fused: FusedLayer, plan: Plan, planes: Expr, residual: Expr | None
    ) -> Expr:
        layer = fused.layer
        problem = planes_problem(layer, plan, fused.epilogue)
        tile, _ = tile_rule(self.target).choose_planes(problem, plan.entries, self.target)

        def make() -> tirx.PrimFunc:
            return schedule_planes(planes_kernel(problem, tile), problem, tile)

        kernel = self.kernels.add(rw, (problem, tile), f"{layer.op}_{_kind(plan)}", make)
        parts = [
            pack(
                matrix,
                BlockShape(plan.block_rows),
                slots=plan.slots[group],
                columns=layer.geometry.offsets(group),
                keep_all=plan.keep_all,
            )
            for group, matrix in enumerate(layer.group_matrices())
        ]
        out = (
            (problem.batch, problem.rows, problem.pixels)
            if problem.compact
            else (problem.batch, problem.rows, problem.height, problem.width)
        )
        return self._call(rw, fused, kernel, planes, join(parts), residual, out)

    def _rows(
        self,
        rw: Rewriter,
        fused: FusedLayer,
        plan: Plan,
        x: Expr,
        residual: Expr | None,
        shape: tuple[int, ...],
    ) -> Expr:
        layer = fused.layer
        problem = rows_problem(layer, plan, fused.epilogue)
        tile, _ = tile_rule(self.target).choose_rows(problem, plan.entries, self.target)

        def make() -> tirx.PrimFunc:
            return schedule_rows(rows_kernel(problem, tile), problem, tile)

        kernel = self.kernels.add(rw, (problem, tile), f"{layer.op}_{_kind(plan)}", make)
        packed: PackedWeight | SlicedWeight
        if plan.own_columns:
            packed = pack_sliced(layer.matrix, plan.block_rows, unroll=tile.unroll)
        else:
            packed = pack(
                layer.matrix,
                BlockShape(plan.block_rows),
                unroll=tile.unroll,
                slots=plan.slots[0],
                keep_all=plan.keep_all,
            )
        matrix = _reshaped(rw, x, (problem.inputs, problem.columns))
        out = (problem.inputs, problem.rows)
        y = self._call(rw, fused, kernel, matrix, packed, residual, out)
        return _reshaped(rw, y, shape)

    def _call(
        self,
        rw: Rewriter,
        fused: FusedLayer,
        kernel: GlobalVar,
        x: Expr,
        packed: PackedWeight | SlicedWeight,
        residual: Expr | None,
        out: tuple[int, ...],
    ) -> Expr:
        self.kernel_of[fused.layer.var] = str(kernel.name_hint)
        tables = (packed.indptr, packed.index, packed.data, packed.rows, fused.bias[packed.rows])
        args = [x, *(constant(table) for table in tables)]
        if residual is not None:
            args.append(_reshaped(rw, residual, out))
        return rw.emit(relax.call_tir(kernel, args, relax.TensorType(out, "float32")))

    def _packed(self, rw: Rewriter, x: Expr, g: ConvGeometry) -> Expr:
        """The planes of `x`; layers that read it the same way share them."""
        layout = replace(g, outputs=0, groups=1)
        key = (x, layout)
        if key not in self.planes:
            parallel = self.target.cores > 1 and g.batch * g.image_floats > PARALLEL_FLOATS

            def make() -> tirx.PrimFunc:
                return pack_planes(g, self.target.lanes, parallel)

            kernel = self.kernels.add(rw, layout, "pack_planes", make)
            out = relax.TensorType((g.batch, g.image_floats), "float32")
            self.planes[key] = rw.emit(relax.call_tir(kernel, [x], out))
        return self.planes[key]


def _kind(plan: Plan) -> str:
    if plan.own_columns:
        return f"sell{plan.block_rows}"
    return f"{'dense' if plan.keep_all else 'sparse'}_{plan.form}_{plan.block_rows}x1"


def _new(rw: Rewriter, expr: Expr) -> Expr:
    return rw.remap.get(expr, expr) if isinstance(expr, Var) else expr


def _reshaped(rw: Rewriter, x: Expr, shape: tuple[int, ...]) -> Expr:
    return x if static_shape(x) == shape else rw.emit(relax.op.reshape(x, shape))
