"""Find what can be fused behind a layer's sum: + bias, + residual, clamp, in this order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from tvm.ir import Call, Expr, IRModule, Var

from ..layout import FloatArray
from ..schedules.problems import Epilogue
from .clamps import clamp_bounds
from .graph import MAIN, array_of, count_uses, dtype_of, live_bindings, op_name, static_shape
from .layers import Layer


@dataclass
class FusedLayer:
    """A layer with the operations fused behind it.

    Attributes:
        layer: the layer.
        end: the variable the last fused operation is bound to.
        inner: the variables of the chain before `end`; nothing else uses them.
        bias: float32 [N].
        residual: the tensor that is added, of the output's shape; None without one.
        epilogue: the same for the kernel.
    """

    layer: Layer
    end: Var
    bias: FloatArray
    inner: set[Var] = field(default_factory=set)
    residual: Expr | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)


def fuse_epilogues(mod: IRModule, layers: list[Layer]) -> list[FusedLayer]:
    """For each layer, the longest chain behind it that its kernel can compute, each op once."""
    func = mod[MAIN]
    uses = count_uses(func)
    users: dict[Var, tuple[Var, Expr]] = {}
    for var, value in live_bindings(func):
        if isinstance(value, Call):
            users.update({arg: (var, value) for arg in value.args if isinstance(arg, Var)})
    taken: set[Var] = set()
    fused = []
    # Backwards: of two layers that meet in an addition, the later one can add the earlier.
    for layer in reversed(layers):
        chain = FusedLayer(layer, layer.var, np.zeros(layer.geometry.outputs, np.float32))
        while uses[chain.end] == 1 and chain.end in users:
            var, value = users[chain.end]
            if var in taken or not _absorb(chain, value):
                break
            chain.inner.add(chain.end)
            chain.end = var
            taken.add(var)
        fused.append(chain)
    return fused[::-1]


def _absorb(chain: FusedLayer, value: Expr) -> bool:
    """Take `value`, the only user of the chain's end, into the chain if the kernel can do it."""
    clamped = chain.epilogue.low is not None or chain.epilogue.high is not None
    if not isinstance(value, Call) or clamped:
        return False
    if dtype_of(value) != "float32" or static_shape(value) != static_shape(chain.end):
        return False
    bounds = clamp_bounds(value)
    if bounds is not None:
        low, high = (None if math.isinf(b) else b for b in bounds)
        chain.epilogue = replace(chain.epilogue, low=low, high=high)
        return True
    if op_name(value) != "add":
        return False
    first = value.args[0].same_as(chain.end)
    other = value.args[1] if first else value.args[0]
    constant = array_of(other)
    if constant is not None:
        return _absorb_bias(chain, constant, static_shape(value) or ())
    if chain.residual is not None or static_shape(other) != static_shape(value):
        return False
    chain.residual = other
    chain.epilogue = replace(chain.epilogue, residual=True)
    return True


def _absorb_bias(chain: FusedLayer, value: np.ndarray, shape: tuple[int, ...]) -> bool:
    axis = 1 if chain.layer.op == "conv2d" else len(shape) - 1
    padded = (1,) * (len(shape) - value.ndim) + value.shape
    if chain.residual is not None or any(e != 1 for i, e in enumerate(padded) if i != axis):
        return False
    chain.bias = (chain.bias + value.reshape(-1)).astype(np.float32)
    return True
