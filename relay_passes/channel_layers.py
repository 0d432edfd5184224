"""Dense and convolution layers as the places where channels begin and end.

A layer reads the channels of its input, its *columns*, and makes channels, its *rows*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tvm import relax
from tvm.ir import Call, Expr

from .canonical_layers import make_conv
from .channel_values import Channels, Known, Mask, Values
from .graph import Array, array_of, constant, dtype_of, ints, is_float, op_name, static_shape


@dataclass(frozen=True)
class ChannelLayer:
    """A layer with constant weights.

    Attributes:
        call: the conv2d or matmul.
        weight: float [rows, columns, taps]; [rows, 1, taps] where depthwise.
        depthwise: whether row i reads column i only.
        axis: the axis of its rows in its result.
        columns: the channels it reads, None if nothing is known of its input.
        foldable: [columns], which of them are constants that may move into the bias.
    """

    call: Call
    weight: Array
    depthwise: bool
    axis: int
    columns: Channels | None
    foldable: Mask

    @property
    def rows(self) -> int:
        """How many channels the layer makes."""
        return int(self.weight.shape[0])

    @cached_property
    def used(self) -> Mask:
        """[rows, columns] ([rows, 1] if depthwise): which rows depend on which varying columns."""
        nonzero = (self.weight != 0).any(axis=2)
        if self.depthwise:
            return np.asarray(nonzero & ~self.foldable[:, None])
        return np.asarray(nonzero & ~self.foldable[None, :])

    @cached_property
    def offsets(self) -> Values:
        """float64 [rows]: what the foldable columns add to each row."""
        if self.columns is None or not self.foldable.any():
            return np.zeros(self.rows)
        values = np.where(self.foldable, self.columns.values, 0)
        if self.depthwise:
            sums = self.weight[:, 0].sum(axis=1, dtype=np.float64)
            return np.asarray(sums * values)
        chosen = np.flatnonzero(self.foldable & (values != 0))
        sums = self.weight[:, chosen].sum(axis=2, dtype=np.float64)
        return np.asarray(sums @ values[chosen])

    def values(self) -> Values:
        """float64 [rows]: the rows that are constant (without the bias), NaN where they vary."""
        constant_rows = ~self.used.any(axis=1)
        return np.where(constant_rows, self.offsets, np.nan)

    def needed_columns(self, rows: Mask) -> Mask:
        """[columns]: those that the given rows depend on."""
        used = self.used
        return np.asarray(used[:, 0] & rows if self.depthwise else used[rows].any(axis=0))

    def rebuild(
        self,
        x: Expr,
        rows: Mask,
        needed: Mask,
        columns: Mask | None,
        emit: Callable[[Expr], Expr],
    ) -> Expr:
        """The layer with the kept `rows` and `columns`, what only those need, and its offsets.

        Args:
            x: the input as it is now.
            rows: mask of the rows that are kept.
            needed: mask of the rows whose values matter; the weights of the others become 0.
            columns: mask of the columns that are kept, None for all.
            emit: binds an expression to a variable.
        """
        alive = (self.used & needed[:, None])[rows]
        weight = self.weight[rows]
        if not self.depthwise and columns is not None:
            alive, weight = alive[:, columns], weight[:, columns]
        weight = np.where(alive[:, :, None], weight, weight.dtype.type(0))
        layer = self._call(x, weight)
        offsets = np.where(needed, self.offsets, 0)[rows]
        if not offsets.any():
            return layer
        form = (-1,) if op_name(self.call) == "matmul" else (1, -1, 1, 1)
        bias = constant(offsets.reshape(form), dtype_of(self.call))
        return relax.op.add(emit(layer), bias)

    def _call(self, x: Expr, weight: Array) -> Call:
        """The layer's operator with weights [rows, columns, taps]."""
        old = self.call.args[1]
        if op_name(self.call) == "matmul":
            new = weight[:, :, 0].T
        else:
            new = weight.reshape(*weight.shape[:2], *(static_shape(old) or ())[2:])
        before = array_of(old)
        assert before is not None
        same = new.shape == before.shape and np.array_equal(new, before)
        kernel = old if same else constant(new)
        if op_name(self.call) == "matmul":
            return relax.op.matmul(x, kernel)
        return make_conv(self.call, x, kernel, groups=new.shape[0] if self.depthwise else None)


def layer_of(call: Expr, known: Known) -> ChannelLayer | None:
    """The layer that a canonical expression is, None for all else (grouped convolutions too)."""
    name = op_name(call)
    if name not in ("matmul", "nn.conv2d") or not is_float(call):
        return None
    x, w = call.args[:2]
    weight, shape, x_shape = array_of(w), static_shape(call), static_shape(x)
    if weight is None or weight.dtype.kind != "f" or shape is None or x_shape is None:
        return None
    if name == "matmul":
        if weight.ndim != 2 or len(shape) < 2 or len(x_shape) != len(shape):
            return None
        return _layer(call, weight.T[:, :, None], known(x), False, len(shape) - 1, len(shape) - 1)
    groups, attrs = int(call.attrs.groups), call.attrs
    layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
    depthwise = groups > 1 and weight.shape[:2] == (groups, 1) and x_shape[1] == groups
    if layouts != ("NCHW", "OIHW", "NCHW") or (groups > 1 and not depthwise):
        return None
    flat = weight.reshape(*weight.shape[:2], -1)
    return _layer(call, flat, known(x), depthwise, 1, 1)


def _layer(
    call: Call, weight: Array, x: Channels | None, depthwise: bool, axis: int, reads: int
) -> ChannelLayer | None:
    columns = weight.shape[0] if depthwise else weight.shape[1]
    if x is None or x.axis != reads:
        if depthwise:
            return None  # its rows exist exactly where its columns do, and those stay
        return ChannelLayer(call, weight, depthwise, axis, None, np.zeros(columns, bool))
    foldable = np.isfinite(x.values)
    if op_name(call) == "nn.conv2d" and any(ints(call.attrs.padding)):
        foldable = x.values == 0  # next to zero padding no other constant is one at the borders
    return ChannelLayer(call, weight, depthwise, axis, x, foldable)
