"""What a user calls a layer: the name of its weight, found again by a sample of its values."""

from __future__ import annotations

import re
import zlib
from itertools import pairwise

import numpy as np
import numpy.typing as npt

# Recognises a weight without reading all of it: shape, dtype, checksum of a sample.
Fingerprint = tuple[tuple[int, ...], str, int]
NamedWeights = tuple[tuple[str, Fingerprint], ...]

_SAMPLES = 4096


def fingerprint(array: npt.NDArray[np.generic]) -> Fingerprint:
    """Tells the weights of a model apart; equal weights have equal fingerprints."""
    flat = array.reshape(-1)
    sample = np.ascontiguousarray(flat[:: max(1, flat.size // _SAMPLES)])
    return array.shape, str(array.dtype), zlib.crc32(sample.tobytes())


def layer_name(weight: str, node: str = "") -> str:
    """``layer1.0.conv1.weight`` -> ``layer1.0.conv1``; where an exporter made the weight's name
    up, from the node's path: ``/layer1/layer1.0/conv1/Conv`` -> ``layer1.0.conv1``."""
    if not node or not re.match(r"onnx::|_?v_|val_|\d+$", weight):
        return re.sub(r"[._/]?(weight|kernel)$", "", weight) or weight
    path = node.strip("/").split("/")
    steps = path[:-1] or path
    inner = [a for a, b in pairwise(steps) if not b.startswith(f"{a}.")]
    return ".".join([*inner, steps[-1]])
