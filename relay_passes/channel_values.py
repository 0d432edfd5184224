"""What each operator does to channels: their constant values, and which of them belong together.

A tensor's *channels* are the entries along one of its axes. For every operator through which
channels pass, an `Effect` says which channels of its inputs are tied to which of its output,
which output channels are constant, and how to write the operator again when channels are gone.
Operators without an entry here need all their inputs, and nothing is known of their results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit
from tvm.ir import Call, Expr

from .fold_channels import per_channel
from .graph import Array, array_of, constant, ints, is_float, op_name, static_shape

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor.

    Attributes:
        axis: which axis they lie on.
        values: float64 [channels]: what all elements of a channel are, NaN where they vary.
    """

    axis: int
    values: Values


@dataclass(frozen=True)
class Tie:
    """Channels ``source[inner[i]]`` that exist exactly if channels ``outer[i]`` of a result do."""

    source: Expr
    inner: Index
    outer: Index


@dataclass(frozen=True)
class Effect:
    """What an operator does to channels.

    Attributes:
        out: the channels of its result.
        ties: how those follow from the channels of its inputs.
        rebuild: ``(inputs as they are now, mask of kept result channels, their masks) -> call``;
            inputs are the tied ones, in the order of `ties`.
        constants: the constant arguments with an entry per channel, and on which of their axes.
    """

    out: Channels
    ties: tuple[Tie, ...]
    rebuild: Callable[[Sequence[Expr], Mask, Sequence[Mask]], Expr]
    constants: tuple[tuple[int, int], ...] = ()


Known = Callable[[Expr], Channels | None]
Rule = Callable[[Call, Known], Effect | None]


def finite(values: Array) -> Values:
    """Values with NaN for whatever is not a finite number."""
    return np.where(np.isfinite(values), values, np.nan).astype(np.float64)


def every(n: int) -> Index:
    """The indices of n channels."""
    return np.arange(n, dtype=np.intp)


def _with_first(call: Call, first: Expr) -> Call:
    """The same call on another first argument."""
    return Call(call.op, [first, *call.args[1:]], call.attrs)


# --- elementwise --------------------------------------------------------------------------------


def _number(call: Call, position: int) -> float:
    return float(call.args[position].value)


FUNCTIONS: dict[str, Callable[[Call, Values], Values]] = {
    "abs": lambda _, x: np.abs(x),
    "clip": lambda c, x: np.clip(x, _number(c, 1), _number(c, 2)),
    "erf": lambda _, x: np.asarray(erf(x)),
    "exp": lambda _, x: np.exp(x),
    "negative": lambda _, x: -x,
    "nn.gelu": lambda _, x: np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2)))),
    "nn.gelu_tanh": lambda _, x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "nn.leakyrelu": lambda c, x: np.where(x < 0, x * float(c.attrs.alpha), x),
    "nn.relu": lambda _, x: np.maximum(x, 0),
    "nn.silu": lambda _, x: np.asarray(x * expit(x)),
    "sigmoid": lambda _, x: np.asarray(expit(x)),
    "sqrt": lambda _, x: np.sqrt(x),
    "square": lambda _, x: x * x,
    "tanh": lambda _, x: np.tanh(x),
}
# operators whose value on a constant is not worked out here
PASSING = ("log", "nn.selu", "nn.softplus", "rsqrt", "sin", "cos")
BINARY: dict[str, Callable[[Values, Values], Values]] = {
    "add": np.add,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "multiply": np.multiply,
    "subtract": np.subtract,
}


def same_channels(call: Call, known: Known, values: Callable[[Values], Values]) -> Effect | None:
    """An operator that works on each channel by itself and keeps the channel axis in place."""
    source = call.args[0]
    x = known(source)
    if x is None:
        return None
    same = every(len(x.values))
    with np.errstate(all="ignore"):
        out = Channels(x.axis, finite(values(x.values)))
    return Effect(out, (Tie(source, same, same),), lambda new, _, __: _with_first(call, new[0]))


def elementwise(call: Call, known: Known) -> Effect | None:
    """A function of one tensor."""
    function = FUNCTIONS.get(op_name(call))
    if function is None:
        return same_channels(call, known, varying)
    return same_channels(call, known, lambda x: function(call, x))


def varying(x: Values) -> Values:
    """Nothing is known of any channel."""
    return np.full(x.shape, np.nan)


def binary(call: Call, known: Known) -> Effect | None:
    """A broadcasting operator of two tensors, or of a tensor and a constant."""
    shape = static_shape(call)
    axes = {k.axis - len(static_shape(a) or ()) for a in call.args if (k := known(a)) is not None}
    if shape is None or len(axes) != 1 or not is_float(call):
        return None
    axis = axes.pop() + len(shape)
    operands = [_operand(a, known, axis, shape) for a in call.args]
    if any(o is None for o in operands):
        return None
    with np.errstate(all="ignore"):
        out = BINARY[op_name(call)](*(o for o in operands if o is not None))
    if op_name(call) == "multiply":
        out[np.any([o == 0 for o in operands], axis=0)] = 0  # of finite numbers
    same = every(shape[axis])
    tied = [i for i, a in enumerate(call.args) if known(a) is not None]
    ties = tuple(Tie(call.args[i], same, same) for i in tied)

    def rebuild(new: Sequence[Expr], keep: Mask, _: Sequence[Mask]) -> Expr:
        args = [sliced(a, axis - len(shape), keep) for a in call.args]
        for i, expr in zip(tied, new, strict=True):
            args[i] = expr
        return Call(call.op, args, call.attrs)

    along = tuple(
        (i, axis - len(shape)) for i, a in enumerate(call.args) if _varies(a, axis, shape)
    )
    return Effect(Channels(axis, finite(out)), ties, rebuild, along)


def _varies(expr: Expr, axis: int, shape: tuple[int, ...]) -> bool:
    """Whether an operand is a constant with an entry for each channel of the result."""
    value, behind = array_of(expr), len(shape) - axis
    return value is not None and value.ndim >= behind and value.shape[-behind] > 1


def _operand(expr: Expr, known: Known, axis: int, shape: tuple[int, ...]) -> Values | None:
    """An operand's values per channel of the result; None where channels would not match up."""
    channels, value = known(expr), array_of(expr)
    if channels is not None:
        return channels.values if len(channels.values) == shape[axis] else None
    if value is None or np.broadcast_shapes(value.shape, shape) != shape:
        return None
    flat = per_channel(value, axis, shape)
    return np.full(shape[axis], np.nan) if flat is None else flat


def sliced(expr: Expr, axis: int, keep: Mask) -> Expr:
    """A constant without the channels that are gone; `axis` counts from the back."""
    value = array_of(expr)
    if value is None or value.ndim < -axis or value.shape[axis] == 1 or keep.all():
        return expr
    return constant(np.compress(keep, value, axis=axis))


def prelu(call: Call, known: Known) -> Effect | None:
    """A relu with a slope per channel."""
    x, slope = known(call.args[0]), array_of(call.args[1])
    shape = static_shape(call)
    if x is None or slope is None or shape is None or int(call.attrs.axis) % len(shape) != x.axis:
        return None
    if slope.shape not in ((1,), (shape[x.axis],)):
        return None
    effect = same_channels(call, known, lambda v: np.where(v < 0, v * slope, v))

    def rebuild(new: Sequence[Expr], keep: Mask, _: Sequence[Mask]) -> Expr:
        return Call(call.op, [new[0], sliced(call.args[1], -1, keep)], call.attrs)

    along = ((1, -1),) if slope.size > 1 else ()
    return None if effect is None else Effect(effect.out, effect.ties, rebuild, along)


# --- pooling ------------------------------------------------------------------------------------


def pool(call: Call, known: Known) -> Effect | None:
    """Pooling within channels; where padding counts, or could fill a window, zeros survive."""
    x, attrs, name = known(call.args[0]), call.attrs, op_name(call)
    if x is None or x.axis != 1 or attrs.layout not in ("NCW", "NCHW", "NCDHW"):
        return None
    if "adaptive" in name:
        return same_channels(call, known, np.copy)
    padding, window = ints(attrs.padding), ints(attrs.pool_size)
    overhangs = bool(attrs.ceil_mode) or max(padding) >= min(window)
    if "max" in name:
        return same_channels(call, known, varying if overhangs else np.copy)
    if overhangs or (bool(attrs.count_include_pad) and any(padding)):
        return same_channels(call, known, lambda v: np.where(v == 0, v, np.nan))
    return same_channels(call, known, np.copy)


def resize(call: Call, known: Known) -> Effect | None:
    """Nearest and linear interpolation of a constant is the constant."""
    x = known(call.args[0])
    if x is None or x.axis != 1 or call.attrs.layout != "NCHW":
        return None
    attrs = call.attrs
    plain = attrs.method in ("nearest_neighbor", "linear")
    plain &= attrs.coordinate_transformation_mode != "tf_crop_and_resize"
    return same_channels(call, known, np.copy if plain else varying)


def mean(call: Call, known: Known) -> Effect | None:
    """A mean over other axes than that of the channels."""
    x, shape = known(call.args[0]), static_shape(call.args[0])
    if x is None or shape is None or call.attrs.axis is None:
        return None
    axes = [a % len(shape) for a in ints(call.attrs.axis)]
    if x.axis in axes:
        return None
    effect = same_channels(call, known, np.copy)
    moved = 0 if call.attrs.keepdims else sum(a < x.axis for a in axes)
    if effect is None:
        return None
    return Effect(Channels(x.axis - moved, effect.out.values), effect.ties, effect.rebuild)


RULES: dict[str, Rule] = {
    **dict.fromkeys((*FUNCTIONS, *PASSING), elementwise),
    **dict.fromkeys(BINARY, binary),
    **dict.fromkeys(
        (f"nn.{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg") for d in (1, 2, 3)), pool
    ),
    "image.resize2d": resize,
    "mean": mean,
    "nn.prelu": prelu,
}
