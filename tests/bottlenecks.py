"""Networks of bottlenecks, and how they are compiled, for tests of how images are stored."""

import numpy as np
from relax_nets import f32, make, ops
from tvm.relax import op

from tvm_pivot.relay_passes import PHASES, Compilation


def pruned(rng, outputs, inputs, kernel, rows=8):
    """Weights in blocks of so many rows, a fifth of which are kept."""
    mask = (rng.random((outputs // rows, inputs * kernel**2)) < 0.2).repeat(rows, 0)
    weight = rng.standard_normal((outputs, inputs, kernel, kernel)) / (inputs * kernel**2) ** 0.5
    return f32(2 * weight * mask.reshape(weight.shape))


def residual_network(size, channels=32, blocks=2, rows=8):
    """Bottlenecks as ResNet-50 has them, behind a stride and before another one."""
    rng = np.random.default_rng(0)

    def body(bb, x):
        def conv(x, outputs, inputs, kernel, stride=1):
            weight = pruned(rng, outputs, inputs, kernel, rows)
            return bb.emit(op.nn.conv2d(x, weight, stride, kernel // 2))

        def relu(x):
            return bb.emit(op.nn.relu(x))

        x = relu(conv(x, channels, 8, 3, 2))
        short = conv(x, 2 * channels, channels, 1)
        for _ in range(blocks):
            y = relu(conv(x if x is not short else short, channels, channels, 3))
            y = conv(y, 2 * channels, channels, 1)
            short = relu(bb.emit(op.add(y, short)))
            x = relu(conv(short, channels, 2 * channels, 1))
        y = relu(conv(x, channels, channels, 3, 2))
        return op.mean(y, [2, 3])

    return make(body, (1, 8, size, size))


def chosen(mod, target):
    """The layers once their kernels are chosen, by name, and the module with the kernels."""
    state, planned = Compilation(mod, target), []
    for phase in PHASES:
        state = phase.run(state)
        planned = planned or (state.planned if phase.name == "choose_kernels" else [])
        if phase.name == "lower_layers":
            return planned, state.mod
    raise AssertionError


def moved(mod):
    """Operators that move elements."""
    return {"permute_dims", "strided_slice", "nn.pad"} & set(ops(mod))


def close(got, want):
    scale = float(np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * scale)
