"""Small Relax networks for the tests of the graph passes, and a way to run them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import Expr, IRModule

from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.graph import constant, live_bindings, op_name, static_shape

# unoptimised machine code: five times faster to compile, and these nets are tiny
LLVM = {"kind": "llvm", "opt-level": 0}
RNG = np.random.default_rng(0)


def run(mod: IRModule, *inputs: np.ndarray) -> list[np.ndarray]:
    """The results of `main`, compiled by TVM without any of our passes."""
    executable = tvm.compile(relax.get_pipeline("zero")(mod), target=tvm.target.Target(LLVM))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(x) for x in inputs])
    return [t.numpy() for t in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]


def inputs_for(mod: IRModule, seed: int = 0) -> list[np.ndarray]:
    """Random inputs for `main`."""
    rng = np.random.default_rng(seed)
    shapes = [static_shape(p) for p in mod["main"].params]
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def assert_same_function(before: IRModule, after: IRModule, rtol: float = 2e-4) -> None:
    """Both modules compute the same, up to rounding, on random inputs."""
    relax.analysis.well_formed(after)  # raises if not
    inputs = inputs_for(before)
    expected, actual = run(before, *inputs), run(after, *inputs)
    assert len(expected) == len(actual)
    for e, a in zip(expected, actual, strict=True):
        assert e.shape == a.shape and e.dtype == a.dtype
        scale = float(np.abs(e).max(initial=0)) + 1e-6
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * scale)


def make(body: Callable[..., Expr | Sequence[Expr]], *shapes: Sequence[int]) -> IRModule:
    """A module whose `main` computes `body(builder, *inputs)` of float32 inputs."""
    params = [relax.Var(f"x{i}", relax.TensorType(s, "float32")) for i, s in enumerate(shapes)]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = body(builder, *params)
            output = builder.emit_output(result if isinstance(result, Expr) else tuple(result))
        builder.emit_func_output(output)
    return builder.get()


def f32(value: object) -> Expr:
    """A float32 constant."""
    return constant(np.asarray(value, dtype="float32"))


def ops(mod: IRModule) -> list[str]:
    """The names of the operators `main` calls, in order."""
    return [name for _, value in live_bindings(mod["main"]) if (name := op_name(value))]


def calls(mod: IRModule, name: str) -> list[Expr]:
    """The calls of one operator in `main`, in order."""
    return [value for _, value in live_bindings(mod["main"]) if op_name(value) == name]


def normal(*shape: int) -> np.ndarray:
    """Random float32 numbers."""
    return RNG.normal(size=shape).astype("float32")


def checked(body: Callable[..., Expr | Sequence[Expr]], *shapes: Sequence[int]) -> IRModule:
    """The canonical form of a small net, after a check that it computes the same."""
    mod = make(body, *shapes)
    out = canonicalize(mod)
    assert_same_function(mod, out)
    assert ops(canonicalize(out)) == ops(out)
    return out


def chained(*steps: Callable[[Expr], Expr]) -> Callable[..., Expr]:
    """A net that applies one operator after the other."""

    def body(bb: relax.BlockBuilder, x: Expr) -> Expr:
        for step in steps:
            x = bb.emit(step(x))
        return x

    return body


def conv(w: np.ndarray, **attrs: object) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.nn.conv2d(x, f32(w), **attrs)


def add(value: np.ndarray | float) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.add(x, f32(value))


def times(value: np.ndarray | float) -> Callable[[Expr], Expr]:
    return lambda x: relax.op.multiply(x, f32(value))


def batch_norm(channels: int, axis: int = 1, **attrs: object) -> Callable[[Expr], Expr]:
    gamma, beta, mean = (normal(channels) for _ in range(3))
    variance = RNG.uniform(0.5, 2, channels)
    stats = [f32(v) for v in (gamma, beta, mean, variance)]
    attrs = {"training": False, **attrs}
    return lambda x: relax.TupleGetItem(relax.op.nn.batch_norm(x, *stats, axis=axis, **attrs), 0)


def load_onnx(path: Path, opset: int | None = None) -> IRModule:
    """A network from a file; skips the test where there is none."""
    if not path.exists():
        pytest.skip(f"{path} is not there")
    onnx = pytest.importorskip("onnx")
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx.load(path)
    if opset is not None:
        model = onnx.version_converter.convert_version(model, opset)
    # old exporters list the weights among the inputs
    weights = {w.name for w in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return from_onnx(model)


class RandomNet:
    """Draws a network of convolutions and what lies between them, with many dead channels.

    Every tensor is NCHW with at most 6 channels and 6 x 6 pixels, so that a net compiles and
    runs in a moment. `choose` decides on the structure, `rng` on the numbers.
    """

    def __init__(self, choose: random.Random, seed: int, steps: int = 9) -> None:
        self.choose = choose
        self.rng = np.random.default_rng(seed)
        self.steps = steps

    def build(self) -> IRModule:
        """The module."""
        return make(self._body, (2, 3, 6, 6))

    def _body(self, bb: relax.BlockBuilder, x: Expr) -> list[Expr]:
        self.bb = bb
        self.tensors = [self.emit(self.conv(x))]
        for _ in range(self.steps):
            made = self.choose.choice(self._steps())(self._pick())
            if made is not None:
                self.tensors.append(self.emit(made))
        heads = [self.dense_head(self.tensors[-1])]
        if self.choose.random() < 0.4:
            heads.append(self._pick())
        return heads

    def _steps(self) -> list[Callable[[Expr], Expr | None]]:
        often = [self.conv, self.conv, self.depthwise, self.activation, self.residual, self.pool]
        rest = [self.join, self.per_channel, self.channel_pad, self.channel_slice]
        return [*often, *rest, self.scale_by_mean, self.views]

    def emit(self, value: Expr) -> Expr:
        """Bind an expression."""
        return self.bb.emit(value)

    def _pick(self) -> Expr:
        # the latest tensors most often, so that nets are deep rather than wide
        recent = self.tensors[-3:] if self.choose.random() < 0.8 else self.tensors
        return self.choose.choice(recent)

    def weights(self, rows: int, columns: int, *taps: int) -> np.ndarray:
        """Weights [rows, columns, *taps] with dead rows and columns, or nothing but zeros."""
        w = self.rng.normal(size=(rows, columns, *taps))
        w[self.rng.random(rows) < 0.3] = 0
        w[:, self.rng.random(columns) < 0.3] = 0
        if self.choose.random() < 0.07:
            w[:] = 0
        return w * (self.rng.random(w.shape) < 0.7)

    def values(self, n: int) -> np.ndarray:
        """Numbers of which some are 0."""
        return self.rng.normal(size=n) * (self.rng.random(n) < 0.6)

    def conv(self, x: Expr) -> Expr | None:
        """A convolution of 1 or 3 taps, padded or not, with or without a bias."""
        _, channels, height, width = static_shape(x)
        rows, size = self.choose.randint(1, 6), self.choose.choice([1, 3])
        if min(height, width) < size:
            size = 1
        w = f32(self.weights(rows, channels, size, size))
        padding, strides = self.choose.choice([0, size // 2]), self.choose.choice([1, 1, 2])
        y = self.emit(relax.op.nn.conv2d(x, w, strides=strides, padding=padding))
        if self.choose.random() < 0.7:
            return relax.op.add(y, f32(self.values(rows).reshape(1, -1, 1, 1)))
        return relax.op.abs(y)

    def depthwise(self, x: Expr) -> Expr:
        """A depthwise 3x3 convolution that keeps the size."""
        channels = static_shape(x)[1]
        w = f32(self.weights(channels, 1, 3, 3))
        return relax.op.nn.conv2d(
            x, w, padding=self.choose.choice([1, [1, 1, 1, 1]]), groups=channels
        )

    def activation(self, x: Expr) -> Expr:
        """An elementwise function."""
        return self.choose.choice(
            [
                relax.op.nn.relu,
                relax.op.sigmoid,
                relax.op.nn.silu,
                relax.op.nn.gelu,
                lambda v: relax.op.nn.leakyrelu(v, 0.1),
                lambda v: relax.op.clip(v, -0.5, 0.5),
                lambda v: relax.op.nn.prelu(v, f32(self.values(static_shape(v)[1]))),
            ]
        )(x)

    def residual(self, x: Expr) -> Expr | None:
        """An operator of two tensors of equal shape."""
        partners = [t for t in self.tensors if static_shape(t) == static_shape(x)]
        kind = self.choose.choice(
            [relax.op.add, relax.op.subtract, relax.op.multiply, relax.op.maximum]
        )
        return kind(x, self.choose.choice(partners))

    def pool(self, x: Expr) -> Expr | None:
        """Max or average pooling, with every treatment of the border."""
        if min(static_shape(x)[2:]) < 3:
            return None
        border = {"padding": self.choose.choice([0, 1]), "ceil_mode": self.choose.random() < 0.3}
        strides = self.choose.choice([1, 2])
        if self.choose.random() < 0.5:
            return relax.op.nn.max_pool2d(x, (3, 3), strides, **border)
        counted = self.choose.random() < 0.5
        return relax.op.nn.avg_pool2d(x, (3, 3), strides, count_include_pad=counted, **border)

    def join(self, x: Expr) -> Expr | None:
        """A concatenation along channels, or along the batch and back by a slice."""
        n, channels, *size = static_shape(x)
        partners = [t for t in self.tensors if static_shape(t)[2:] == tuple(size)]
        partner = self.choose.choice(partners)
        if static_shape(partner)[1] == channels and self.choose.random() < 0.3:
            both = self.emit(relax.op.concat([x, partner], 0))
            return relax.op.strided_slice(both, [0], [1], [1 + n])
        if static_shape(partner)[1] + channels > 8:
            return None
        return relax.op.concat([x, partner], 1)

    def per_channel(self, x: Expr) -> Expr:
        """A scale or shift per channel, some of them 0; sometimes one per pixel."""
        channels, height, width = static_shape(x)[1:]
        form = self.choose.choice(
            [(1, channels, 1, 1), (channels, height, width), (1, 1, 1, width)]
        )
        value = f32(self.values(int(np.prod(form))).reshape(form))
        return self.choose.choice([relax.op.multiply, relax.op.add])(x, value)

    def channel_pad(self, x: Expr) -> Expr:
        """Padding by whole channels, or of the planes, with 0 or another constant."""
        width = self.choose.choice([[0, 0, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 1, 1]])
        return relax.op.nn.pad(x, width, "constant", self.choose.choice([0.0, 0.5]))

    def channel_slice(self, x: Expr) -> Expr:
        """Some of the channels, every pixel or every other one."""
        channels = static_shape(x)[1]
        begin = self.choose.randrange(channels)
        stride = self.choose.choice([1, 1, 2])
        return relax.op.strided_slice(x, [1, 3], [begin, 0], [channels, 9], [stride, 1])

    def scale_by_mean(self, x: Expr) -> Expr:
        """Each channel times its own mean."""
        return relax.op.multiply(x, self.emit(relax.op.mean(x, [2, 3], True)))

    def views(self, x: Expr) -> Expr:
        """Reshapes and permutations there and back, around an activation."""
        n, channels, height, width = static_shape(x)
        if self.choose.random() < 0.5:
            y = self.emit(relax.op.reshape(x, (n, channels, 1, height * width)))
        else:
            y = self.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
        y = self.emit(relax.op.nn.relu(y))
        if static_shape(y)[1] == channels and static_shape(y)[2] == 1:
            return relax.op.reshape(y, (n, channels, height, width))
        return relax.op.permute_dims(y, [0, 3, 1, 2])

    def dense_head(self, x: Expr) -> Expr:
        """Two dense layers over the flattened planes, or over their means."""
        n, channels, height, width = static_shape(x)
        if self.choose.random() < 0.3:
            flat = self.emit(relax.op.mean(x, [2, 3]))
        else:
            flat = self.emit(relax.op.reshape(x, (n, channels * height * width)))
        for columns in (7, 4):
            w = f32(self.weights(columns, static_shape(flat)[1]).T)
            y = self.emit(relax.op.matmul(flat, w))
            y = self.emit(relax.op.add(y, f32(self.values(columns))))
            flat = self.emit(relax.op.nn.relu(y)) if columns == 7 else y
        return flat
