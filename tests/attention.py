"""A multi-head attention between pruned dense layers, with its definition in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from relax_nets import make
from tvm import relax
from tvm.ir import Expr, IRModule

from tvm_pivot.relay_passes import PHASES, Compilation
from tvm_pivot.relay_passes.graph import MAIN, live_bindings, op_name
from tvm_pivot.targets import PivotTarget, resolve

Array = NDArray[np.float64]


def lowered_ops(mod: IRModule, target: PivotTarget | None = None) -> list[str]:
    """Names of the operators in main once its layers are kernels."""
    state = Compilation(mod, target or resolve("x86"))
    for phase in PHASES:
        state = phase.run(state)
        if phase.name == "lower_layers":
            break
    return [op_name(value) for _, value in live_bindings(state.mod[MAIN])]


def weights(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """A pruned weight [rows, columns] that keeps products with it at about the size of inputs."""
    mask = rng.random((rows, columns)) < 0.5
    mask[:, 0] = mask[0] = True  # no dead rows or columns
    return np.where(mask, rng.standard_normal((rows, columns)), 0).astype("f") / np.sqrt(rows / 2)


class Attention:
    """Multi-head attention of `tokens` queries to `keys` keys, with residual and layer norm."""

    def __init__(self, seed: int, heads: int, head: int, mask: str, split_transpose: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.heads, self.head, self.mask, self.split = heads, head, mask, split_transpose
        self.width = heads * head
        self.weights = [weights(self.rng, self.width, self.width) for _ in range(4)]
        self.gamma, self.beta = self.rng.standard_normal((2, self.width)).astype("f")

    def module(self, batch: int, tokens: int, keys: int) -> IRModule:
        def body(builder: relax.BlockBuilder, x: Expr, memory: Expr, mask: Expr) -> Expr:
            emit, op = builder.emit, relax.op

            def heads(y: Expr, weight: NDArray[np.float32], length: int, axes: list[int]) -> Expr:
                y = emit(op.matmul(y, relax.const(weight)))
                y = emit(op.reshape(y, (batch, length, self.heads, self.head)))
                return emit(op.permute_dims(y, axes))

            q = heads(x, self.weights[0], tokens, [0, 2, 1, 3])
            if self.split:
                k = heads(memory, self.weights[1], keys, [0, 2, 1, 3])
                k = emit(op.permute_dims(k, [0, 1, 3, 2]))
            else:
                k = heads(memory, self.weights[1], keys, [0, 2, 3, 1])
            v = heads(memory, self.weights[2], keys, [0, 2, 1, 3])
            scores = emit(op.matmul(q, k))
            scores = emit(op.multiply(scores, relax.const(np.float32(self.head**-0.5))))
            if self.mask != "none":
                scores = emit(op.add(scores, mask))
            o = emit(op.matmul(emit(op.nn.softmax(scores, -1)), v))
            o = emit(op.permute_dims(o, [0, 2, 1, 3]))
            o = emit(op.reshape(o, (batch, tokens, self.width)))
            o = emit(op.matmul(o, relax.const(self.weights[3])))
            o = emit(op.add(x, o))
            gamma, beta = relax.const(self.gamma), relax.const(self.beta)
            return op.nn.layer_norm(o, gamma, beta, [-1], 1e-5)

        shapes = [(batch, n, self.width) for n in (tokens, keys)]
        return make(body, *shapes, self.mask_shape(batch, tokens, keys))

    def mask_shape(self, batch: int, tokens: int, keys: int) -> tuple[int, ...]:
        shapes = {"keys": (batch, 1, 1, keys), "causal": (tokens, keys)}
        return shapes.get(self.mask, (batch, self.heads, tokens, keys))

    def reference(self, x: Array, memory: Array, mask: Array) -> Array:
        def heads(y: Array, weight: NDArray[np.float32]) -> Array:
            y = y @ weight.astype(np.float64)
            return y.reshape(*y.shape[:2], self.heads, self.head).transpose(0, 2, 1, 3)

        q = heads(x, self.weights[0])
        k, v = (heads(memory, w) for w in self.weights[1:3])
        scores = q @ k.swapaxes(2, 3) * self.head**-0.5
        scores = np.exp(scores + (mask if self.mask != "none" else 0))
        o = (scores / scores.sum(-1, keepdims=True)) @ v
        y = x + o.transpose(0, 2, 1, 3).reshape(x.shape) @ self.weights[3]
        centred = y - y.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * self.gamma + self.beta

    def inputs(self, batch: int, tokens: int, keys: int) -> list[NDArray[np.float32]]:
        shapes = [(batch, tokens, self.width), (batch, keys, self.width)]
        shapes.append(self.mask_shape(batch, tokens, keys))
        return [self.rng.standard_normal(shape).astype("f") for shape in shapes]
