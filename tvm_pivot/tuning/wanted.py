"""What a candidate has to compute: some of a layer's outputs, in float64, from known inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..layout import FloatArray
from .on_gpu.measure import random_values
from .tasks import LayerTask

# Pixels that are compared, all rows of each: the first, the last, and others.
PIXELS = 48


def wanted_outputs(task: LayerTask, bias: FloatArray) -> tuple[list[int], npt.NDArray[np.float64]]:
    """Numbers of some pixels, through all images, and what the layer has there: [pixels, rows].

    The input is ``random_values(..., 0)`` as [batch, channels, height, width], the residual
    ``random_values(..., 1)`` as [batch, rows, pixels].
    """
    g, layer, epilogue = task.geometry, task.layer, task.epilogue
    each = g.y.output * g.x.output
    total = g.batch * each
    some = np.random.default_rng(0).integers(0, total, PIXELS)
    pixels = sorted({0, total - 1, *map(int, some)})
    size = (g.batch, g.channels, g.y.size, g.x.size)
    image = random_values(int(np.prod(size)), 0).reshape(size)
    matrices = [matrix.astype(np.float64) for matrix in layer.group_matrices()]
    wanted = np.empty((len(pixels), g.outputs))
    for i, pixel in enumerate(pixels):
        row, column = divmod(pixel % each, g.x.output)
        ys, xs = (
            place * axis.stride + np.arange(axis.kernel) * axis.dilation - axis.before
            for place, axis in ((row, g.y), (column, g.x))
        )
        inside = ((ys >= 0) & (ys < g.y.size))[:, None] & ((xs >= 0) & (xs < g.x.size))
        taps = image[pixel // each][
            :, np.clip(ys, 0, g.y.size - 1)[:, None], np.clip(xs, 0, g.x.size - 1)
        ]
        parts = np.split(taps * inside, g.groups)
        pairs = zip(matrices, parts, strict=True)
        wanted[i] = np.concatenate([matrix @ part.ravel() for matrix, part in pairs])
    wanted += bias
    if epilogue.residual:
        other = random_values(total * g.outputs, 1).reshape(g.batch, g.outputs, each)
        chosen = np.array(pixels)
        wanted += other[chosen // each, :, chosen % each]
    low, high = epilogue.low, epilogue.high
    return pixels, np.clip(
        wanted, -np.inf if low is None else low, np.inf if high is None else high
    )
