"""ONNX files of the standing set, kept in a cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from .build import build_torch
from .catalogue import find
from .data import REPOSITORY
from .pruning import Variant

DEFAULT_CACHE = REPOSITORY / ".cache" / "zoo"
OPSET = 17  # the newest that every runtime of the comparison reads
INPUT_NAME = "x"
OUTPUT_NAME = "y"


def export_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    """Writes ``module`` for inputs of x's shape to ``path``, input "x", output "y", opset 17.

    The exporter folds batch norm into convolutions and constants into each other.  The file
    appears whole or not at all, so that concurrent processes may share a cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        written = Path(scratch) / path.name
        with warnings.catch_warnings():
            # The tracing exporter is deprecated in favour of one that writes opset 18 and up.
            warnings.simplefilter("ignore", DeprecationWarning)
            # What it cannot fold it leaves in the graph, which is correct.
            warnings.filterwarnings("ignore", "Constant folding")
            torch.onnx.export(
                module,
                (x,),
                str(written),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                opset_version=OPSET,
                do_constant_folding=True,
                dynamo=False,
            )
        os.replace(written, path)


def load(
    name: str,
    variant: str = "dense",
    cache_dir: Path | None = None,
    *,
    seed: int = 0,
    image: int | None = None,
    length: int | None = None,
) -> Path:
    """The ONNX file of a network (see :func:`~benchmarks.zoo.build.build_torch`), made once.

    ``cache_dir`` defaults to ``.cache/zoo`` in the repository.  Files are named after the network,
    variant, sizes and seed, and carry a fingerprint of the code that makes them: changing it
    makes new files and removes the old ones.

    Raises ValueError for networks without an ONNX form (LSTM, GRU), else as ``build_torch``.
    """
    entry = find(name).resized(image, length)
    if not entry.onnx:
        raise ValueError(f"{name} has no ONNX file: TVM imports it from torch only")
    folder = DEFAULT_CACHE if cache_dir is None else Path(cache_dir)
    key = f"{name}-{Variant.parse(variant)}-{'x'.join(map(str, entry.shape))}-s{seed}"
    path = folder / f"{key}-{_fingerprint()}.onnx"
    if not path.is_file():
        module, x = build_torch(name, variant, seed, image=image, length=length)
        export_onnx(module, x, path)
        for stale in folder.glob(f"{key}-*.onnx"):
            if stale != path:
                stale.unlink(missing_ok=True)
    return path


@functools.cache
def _fingerprint() -> str:
    """Changes with the zoo's code and with torch, the two things an export is made by."""
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:10]
