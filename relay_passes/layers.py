"""The layers of a canonical module: what each one computes, and how it is to be run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from tvm.ir import Call, IRModule, Var

from ..layout import FloatArray, IntArray
from ..planes import AxisGeometry, ConvGeometry
from ..report import SharedOrder
from ..schedules.choices import Choice
from ..schedules.followers import Follower
from ..schedules.leaders import Leader
from ..schedules.problems import Epilogue, RowsProblem
from .graph import (
    MAIN,
    array_of,
    dtype_of,
    ints,
    is_straight_line,
    live_bindings,
    op_name,
    static_shape,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A dense or conv2d layer with constant float32 weights.

    Attributes:
        var: the variable that the layer's sum is bound to in the canonical module.
        op: ``"dense"`` or ``"conv2d"``.
        shape: the weight's shape, rows first: [N, K] or [O, I / groups, kh, kw].
        matrix: the weight as a matrix [N, K / groups], columns in (channel, tap) order.
        geometry: the convolution, or a dense layer's as one: its rows are the pixels, of several
            images where they are in parts (see `split_tokens`).
    """

    var: Var
    op: Literal["dense", "conv2d"]
    shape: tuple[int, ...]
    matrix: FloatArray
    geometry: ConvGeometry

    @property
    def name(self) -> str:
        return str(self.var.name)

    @property
    def pixels(self) -> int:
        """Output pixels (a dense layer's rows) of all images."""
        return self.geometry.batch * self.geometry.y.output * self.geometry.x.output

    @property
    def row_inputs(self) -> int | None:
        """Input rows, where input and output are plain row-major matrices; else None."""
        if self.op == "dense":
            return self.pixels
        g = self.geometry
        one_pixel = g.direct and g.y.size * g.x.size == 1 and g.groups == 1
        return g.batch if one_pixel else None

    def group_matrices(self) -> list[FloatArray]:
        """The matrix of each channel group: [N / groups, K / groups]."""
        return np.split(self.matrix, self.geometry.groups)


@dataclass(frozen=True, eq=False)
class Plan:
    """How a layer is to be run.

    Attributes:
        form: ``"planes"`` (vectors over pixels), ``"rows"`` (matrix-vector), ``"depthwise"`` or
            ``"tensor_cores"``.
        block_rows: R; in the rows form also the length of the vector.
        own_columns: rows form only: every row of a block has columns of its own.
        keep_all: the dense form: blocks of zeros are kept.
        entries: packed entries (steps, with own columns).
        cycles: predicted cycles on one core.
        slots: the row in each slot of the row blocks, for each channel group (see `pivot`).
        window: with own columns, vectors of the input that hold the columns of a step, or 0.
        pivot: what the order of the rows was made for (see `Pivot.kind`); empty for their own.
        natural_entries: packed entries that the same blocks have in the rows' own order.
        unfolded: the planes are unfolded along x (see `ConvGeometry`).
    """

    form: Literal["planes", "rows", "depthwise", "tensor_cores"]
    block_rows: int
    own_columns: bool
    keep_all: bool
    entries: int
    cycles: float
    slots: tuple[IntArray, ...] = ()
    window: int = 0
    pivot: str = ""
    natural_entries: int = 0
    unfolded: bool = False

    @property
    def row_blocks(self) -> int:
        """Row blocks of all channel groups."""
        return sum(slots.size for slots in self.slots) // self.block_rows


def laid_out(layer: Layer, plan: Plan) -> Layer:
    """The layer with its planes as the plan wants them."""
    return replace(layer, geometry=replace(layer.geometry, unfolded=plan.unfolded))


def in_parts(layer: Layer, parts: int) -> Layer:
    """The layer for images of which each is so many (see `ConvGeometry.in_parts`)."""
    return replace(layer, geometry=layer.geometry.in_parts(parts))


def on_cache_lines(layer: Layer) -> Layer:
    """A direct layer for planes that begin with cache lines (see `ConvGeometry.aligned`)."""
    return replace(layer, geometry=layer.geometry.aligned())


@dataclass(frozen=True, eq=False)
class Handover:
    """What a layer's kernel does beside the layer (see `follow_in_bands`).

    Attributes:
        follower: the operation that follows in its bands.
        end: the variable that its result is bound to.
        inner: the variables between the layer's sum and that one.
        tables: constants of the follower.
    """

    follower: Follower
    end: Var
    inner: frozenset[Var]
    tables: tuple[FloatArray, ...]


@dataclass(frozen=True, eq=False)
class Lead:
    """What a layer's kernel does before the layer (see `lead_in_bands`).

    Attributes:
        leader: how it computes the layer before it.
        layer: that layer.
        plan: its plan.
        bias: its bias, float32 [N].
        inner: the variables from its sum to what the kernel's layer reads.
    """

    leader: Leader
    layer: Layer
    plan: Plan
    bias: FloatArray
    inner: frozenset[Var]


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """A layer and its plan.

    Attributes:
        layer: the layer.
        plan: the plan with the fewest predicted cycles.
        dense_cycles: predicted cycles of the best dense plan.
        sparse: whether sparse plans were considered.
        shared: orders that its rows or columns share with other layers (see `fuse_permutations`).
        choice: how its kernel is made (see `choose_kernels`); None until that is chosen.
        record: the tuning record that the choice is from; empty where the rule chose.
        handover: what its kernel does behind it; None for nothing.
        lead: what its kernel does before it; None for nothing.
        within: the layer whose kernel computes this one, too; empty if it has its own.
        parts: in how many stretches of rows its output's images are stored (see `split_images`).
        aligned: whether the planes of these begin with cache lines (see `align_planes`).
    """

    layer: Layer
    plan: Plan
    dense_cycles: float
    sparse: bool
    shared: tuple[SharedOrder, ...] = ()
    choice: Choice | None = None
    record: str = ""
    handover: Handover | None = None
    lead: Lead | None = None
    within: str = ""
    parts: int = 1
    aligned: bool = False

    @property
    def alone(self) -> bool:
        """Whether its kernel computes this layer and no other operation."""
        return self.handover is None and self.lead is None and not self.within

    @property
    def skips(self) -> bool:
        """Whether the plan skips any zeros."""
        columns = self.layer.matrix.shape[1]
        return not self.plan.keep_all and self.plan.entries < self.plan.row_blocks * columns


def rows_problem(layer: Layer, plan: Plan, epilogue: Epilogue) -> RowsProblem:
    """The layer as the rows kernel sees it."""
    n, k = layer.matrix.shape
    inputs = layer.row_inputs or 0
    return RowsProblem(
        inputs, k, n, plan.row_blocks, plan.block_rows, plan.own_columns, epilogue, plan.window
    )


def find_layers(mod: IRModule) -> Iterator[Layer]:
    """Every dense and conv2d layer of a canonical module, in order; none beside branches."""
    if not is_straight_line(mod[MAIN]):
        return
    for var, value in live_bindings(mod[MAIN]):
        layer = None
        if op_name(value) == "nn.conv2d":
            layer = _conv2d(var, value)
        elif op_name(value) == "matmul":
            layer = _dense(var, value)
        if layer is not None:
            yield layer


def _weight(call: Call) -> FloatArray | None:
    if any(dtype_of(e) != "float32" for e in (*call.args, call)):
        return None
    value = array_of(call.args[1])
    return None if value is None or value.size == 0 else np.asarray(value, np.float32)


def _dense(var: Var, call: Call) -> Layer | None:
    weight, shape = _weight(call), static_shape(call.args[0])
    if weight is None or weight.ndim != 2 or shape is None or 0 in shape:
        return None
    inputs = int(np.prod(shape[:-1]))
    geometry = ConvGeometry(
        1, weight.shape[0], weight.shape[1], AxisGeometry(1, 1), AxisGeometry(inputs, 1)
    )
    matrix = np.ascontiguousarray(weight.T)
    return Layer(var, "dense", matrix.shape, matrix, geometry)


def _conv2d(var: Var, call: Call) -> Layer | None:
    weight, shape = _weight(call), static_shape(call.args[0])
    out = static_shape(call)
    attrs = call.attrs
    plain = (attrs.data_layout, attrs.kernel_layout) == ("NCHW", "OIHW")
    if weight is None or shape is None or out is None or not plain or 0 in shape + out:
        return None
    top, left, bottom, right = ints(attrs.padding)
    if min(top, left, bottom, right) < 0:
        return None
    strides, dilation = ints(attrs.strides), ints(attrs.dilation)
    y, x = (
        AxisGeometry(shape[2 + i], weight.shape[2 + i], strides[i], dilation[i], *pad)
        for i, pad in enumerate(((top, bottom), (left, right)))
    )
    geometry = ConvGeometry(shape[0], shape[1], weight.shape[0], y, x, int(attrs.groups))
    matrix = weight.reshape(weight.shape[0], -1)
    return Layer(var, "conv2d", weight.shape, matrix, geometry)
