"""Fold per-channel scales and shifts, batch_norm among them, into the layer they follow.

A chain such as conv -> +bias -> batch_norm -> *constant -> /constant becomes
``conv(x, weight * scale) + shift``. The chain is collected in float64 and rounded once, so a
weight of zero stays zero and nothing is rounded twice. A batch_norm that follows no such layer
becomes one multiply and one add.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm import relax
from tvm.ir import Call, Expr, IRModule, Var

from .canonical_layers import CONVS, conv1d_as_conv2d, make_conv
from .graph import (
    MAIN,
    Array,
    Rewriter,
    array_of,
    constant,
    count_uses,
    dtype_of,
    is_float,
    op_name,
    static_shape,
    step_name,
    telling,
)

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """``base * scale + shift`` with one scale and shift per channel, not yet written.

    Attributes:
        base: a layer call with constant weights, or the variable a batch_norm normalises.
        axis: the channel axis of its value.
        scale: float64 [channels], None for 1.
        shift: float64 [channels], None for 0.
        name: what the layer's variable is called.
    """

    base: Expr
    axis: int
    name: str = ""
    scale: Vector | None = None
    shift: Vector | None = None

    def times(self, factor: Vector) -> Chain:
        """The chain followed by a multiplication."""
        scale = factor if self.scale is None else self.scale * factor
        return replace(self, scale=scale, shift=None if self.shift is None else self.shift * factor)

    def plus(self, term: Vector) -> Chain:
        """The chain followed by an addition."""
        return replace(self, shift=term if self.shift is None else self.shift + term)


def fold_channels(mod: IRModule) -> IRModule:
    """Write every per-channel chain of `main` as one layer, or one multiply and add."""
    return Rewriter(mod).run(_Folder(count_uses(mod[MAIN]), mod[MAIN].body.body).visit)


class _Folder:
    """Writes a chain at each of its steps; a longer chain starts again from the layer.

    So the shorter ones are dead code, which the caller removes.
    """

    def __init__(self, uses: Counter[Var], result: Expr) -> None:
        self.uses = uses
        self.result = result
        # the chains, by their new variable, that nothing but their next step would read
        self.chains: dict[Expr, Chain] = {}

    def visit(self, rw: Rewriter, var: Var, value: Expr) -> Expr:
        """Start or extend a chain at this binding."""
        chain = self._extended(rw, value) or _started(rw, var, value)
        if chain is None:
            return value
        written = write(rw, chain)
        if self.uses[var] > 1 or var.same_as(self.result):
            return written
        new = rw.emit(written)
        self.chains[new] = chain
        return new

    def _extended(self, rw: Rewriter, value: Expr) -> Chain | None:
        """The chain that ends in `value`, if it continues one or normalises a tensor."""
        if isinstance(value, relax.TupleGetItem):
            norm = rw.definition(value.tuple_value)
            return self._normalised(norm) if value.index == 0 else None
        name = op_name(value)
        chain = self.chains.get(value.args[0]) if name in ("add", "multiply") else None
        if chain is None:
            return None
        operand = per_channel(array_of(value.args[1]), chain.axis, static_shape(value.args[0]))
        if operand is None:
            return None
        return chain.plus(operand) if name == "add" else chain.times(operand)

    def _normalised(self, norm: Expr) -> Chain | None:
        """The chain that a batch_norm by constant statistics ends."""
        if op_name(norm) != "nn.batch_norm" or norm.attrs.training:
            return None
        x, *rest = norm.args
        values, shape = [array_of(e) for e in rest], static_shape(x)
        if shape is None or any(v is None for v in values) or not is_float(x):
            return None
        gamma, beta, mean, variance = (np.asarray(v, np.float64) for v in values)
        axis = int(norm.attrs.axis) % len(shape)
        with np.errstate(all="ignore"):
            scale = 1 / np.sqrt(variance + float(norm.attrs.epsilon))
            scale = scale * gamma if norm.attrs.scale else scale
            shift = -mean * scale + (beta if norm.attrs.center else 0)
        chain = self.chains.get(x)
        if chain is None or chain.axis != axis:
            chain = Chain(x, axis)
        return chain.times(scale).plus(shift)


def _started(rw: Rewriter, var: Var, value: Expr) -> Chain | None:
    """The chain that a layer with constant weights begins."""
    name = op_name(value)
    if name not in (*CONVS, "matmul"):
        return None
    weight, shape = array_of(value.args[1]), static_shape(rw.builder.normalize(value))
    dtypes = {dtype_of(value.args[0]), dtype_of(value.args[1]), dtype_of(value)}
    if weight is None or shape is None or len(dtypes) != 1 or not is_float(value):
        return None
    if name == "matmul":
        plain = weight.ndim == 2 and len(shape) > 1
        return Chain(value, len(shape) - 1, telling(var.name)) if plain else None
    layouts = (value.attrs.data_layout, value.attrs.kernel_layout, value.attrs.out_layout)
    canonical = layouts in (("NCHW", "OIHW", "NCHW"), ("NCW", "OIW", "NCW"))
    return Chain(value, 1, telling(var.name)) if canonical else None


def per_channel(value: Array | None, axis: int, shape: tuple[int, ...] | None) -> Vector | None:
    """A constant that differs along `axis` only, as a vector [channels]; None for others."""
    if value is None or shape is None or value.ndim > len(shape):
        return None
    aligned = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    channels = shape[axis]
    if any(d != 1 for i, d in enumerate(aligned.shape) if i != axis):
        return None
    if aligned.shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(aligned.reshape(-1), (channels,)).astype(np.float64)


def write(rw: Rewriter, chain: Chain) -> Expr:
    """The expression of a chain: a layer and its bias, or a multiply and an add."""
    base = chain.base
    if not isinstance(base, Call):
        return _affine(rw, base, chain)
    weight = array_of(base.args[1])
    assert weight is not None
    scaled = _scaled(weight, chain.scale, -1 if op_name(base) == "matmul" else 0)
    if scaled is None:
        return _affine(rw, rw.emit(base, step_name(chain.name)), chain)
    kernel = base.args[1] if chain.scale is None else constant(scaled)
    if op_name(base) == "nn.conv1d":
        planes = conv1d_as_conv2d(rw, base, base.args[0], scaled)
        layer = rw.emit(planes, step_name(chain.name))
        biased = _affine(rw, layer, replace(chain, scale=None))
        return relax.op.reshape(rw.emit(biased), static_shape(base))
    if op_name(base) == "nn.conv2d":
        layer = make_conv(base, base.args[0], kernel)
    else:
        layer = relax.op.matmul(base.args[0], kernel)
    return _affine(rw, rw.emit(layer, step_name(chain.name)), replace(chain, scale=None))


def _scaled(weight: Array, scale: Vector | None, axis: int) -> Array | None:
    """Weights times a scale per output channel, rounded once; None where that overflows."""
    if scale is None:
        return weight
    form = [1] * weight.ndim
    form[axis] = -1
    with np.errstate(all="ignore"):
        product = np.multiply(weight, scale.reshape(form), dtype=np.float64).astype(weight.dtype)
    # a zero weight under an infinite scale is NaN: then the scale stays where it was
    return product if np.isfinite(product).all() else None


def _affine(rw: Rewriter, x: Expr, chain: Chain) -> Expr:
    """``x * scale + shift`` as operators, leaving out what has no effect."""
    typed = rw.builder.normalize(x) if isinstance(x, Call) else x
    shape = static_shape(typed)
    assert shape is not None
    if op_name(rw.definition(x)) == "matmul":
        form: tuple[int, ...] = (-1,)
    else:
        form = tuple(-1 if i == chain.axis else 1 for i in range(len(shape)))
    if chain.scale is not None and np.any(chain.scale != 1):
        x = relax.op.multiply(rw.emit(x), constant(chain.scale.reshape(form), dtype_of(typed)))
    if chain.shift is not None and np.any(chain.shift != 0):
        x = relax.op.add(rw.emit(x), constant(chain.shift.reshape(form), dtype_of(typed)))
    return x
