"""ONNX files of the standing set, kept in a cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from . import files
from .build import build_torch, masks
from .catalogue import Entry, find
from .data import REPOSITORY, data_file
from .pruning import Variant
from .vision import CifarBlock

DEFAULT_CACHE = REPOSITORY / ".cache" / "zoo"
OPSET = 17  # the newest that every runtime of the comparison reads
INPUT_NAME = "x"
OUTPUT_NAME = "y"


def export_onnx(module: nn.Module, x: Tensor, path: Path) -> None:
    """Writes ``module`` for inputs of x's shape to ``path``, input "x", output "y", opset 17.

    The exporter folds batch norm into convolutions and constants into each other.  The file
    appears whole or not at all, so that concurrent processes may share a cache.
    """
    with _appearing(path) as written:
        with warnings.catch_warnings():
            # The tracing exporter is deprecated in favour of one that writes opset 18 and up.
            warnings.simplefilter("ignore", DeprecationWarning)
            # What it cannot fold it leaves in the graph, which is correct.
            warnings.filterwarnings("ignore", "Constant folding")
            # Sizes are static here, so checks and states that are traced once stay right.
            warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size")
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
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
        # The exporter computes the shape of an initial state, and how much to pad.
        if any(isinstance(layer, (nn.RNNBase, CifarBlock)) for layer in module.modules()):
            files.fold(written, written)
        with torch.no_grad():
            files.declare_output(written, tuple(module(x).shape))


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A place to write what then appears at ``path`` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        written = Path(scratch) / path.name
        yield written
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
    makes new files and removes the old ones.  A caller short of disk space (VGG-16 is 553 MB in
    every variant) may delete the file after use.

    Raises as ``build_torch``.
    """
    entry = find(name).resized(image, length)
    asked = Variant.parse(variant)
    folder = DEFAULT_CACHE if cache_dir is None else Path(cache_dir)
    key = f"{name}-{asked}-{'x'.join(map(str, entry.shape))}-s{seed}"
    path = folder / f"{key}-{_fingerprint()}.onnx"
    if not path.is_file():
        if entry.file is not None:
            _write_file(entry, entry.file, asked, seed, path)
        else:
            module, x = build_torch(name, variant, seed, image=image, length=length)
            export_onnx(module, x, path)
        for stale in folder.glob(f"{key}-*.onnx"):
            if stale != path:
                stale.unlink(missing_ok=True)
    return path


def _write_file(entry: Entry, file: str, variant: Variant, seed: int, path: Path) -> None:
    """Writes a variant of a network that comes as an ONNX file, under the file's own names."""
    model = files.read(data_file(file), OPSET)
    if variant.kind != "dense":
        files.prune_initializers(model, lambda weights: masks(entry, weights, variant, seed))
    with _appearing(path) as written:
        files.fold(model, written)


@functools.cache
def _fingerprint() -> str:
    """Changes with the zoo's code and with torch, the two things an export is made by."""
    digest = hashlib.sha256(torch.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:10]
