"""A model with every size fixed: most runtimes compile for one shape, and all must get the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from ..errors import InputError
from ..importer_onnx import fix_shapes
from .reference import compute, make_inputs
from .runtimes.protocol import Port, is_static, port

Shapes = Mapping[str, int | Sequence[int]]


def with_static_shapes(path: Path, shapes: Shapes | None, folder: Path) -> Path:
    """`path`, or a copy of it in `folder` with static shapes where it has open ones.

    Args:
        shapes: sizes of symbolic dimensions, or shapes of inputs, by name.

    Raises:
        InputError: there is no such file, it is no ONNX model, or it cannot be computed.
        ModelImportError: a dimension stays open, a name matches nothing, or sizes contradict.
    """
    try:
        proto = onnx.load(str(path))
    except Exception as e:  # protobuf's errors have no common base class
        raise InputError(f"{path}: cannot be read as an ONNX model: {e}") from e
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    outputs = list(proto.graph.output)
    if not shapes and all(map(is_static, (*inputs, *outputs))):
        return path
    fix_shapes(inputs, outputs, shapes, str(path))
    del proto.graph.value_info[:]  # of the open shapes
    folder.mkdir(parents=True, exist_ok=True)
    fixed = folder / path.name
    _save(proto, fixed)
    if not all(map(is_static, outputs)):
        _declare_outputs(outputs, fixed, tuple(map(port, inputs)))
        _save(proto, fixed)
    return fixed


def _declare_outputs(
    outputs: Sequence[onnx.ValueInfoProto], model: Path, inputs: tuple[Port, ...]
) -> None:
    """Give outputs the shapes they turn out to have."""
    try:
        _, (values, _) = compute(model, make_inputs(inputs))
    except Exception as e:  # onnx and the reference have no common base class
        raise InputError(f"{model.name}: cannot be computed: {type(e).__name__}: {e}") from e
    for output, value in zip(outputs, values, strict=True):
        shape = output.type.tensor_type.shape
        shape.ClearField("dim")
        for size in value.shape:
            shape.dim.add().dim_value = size
        shape.SetInParent()


def _save(proto: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.save(proto, str(path))
    except ValueError as e:  # more than protobuf's 2 GB
        raise InputError(f"{path.name}: too large to be written with fixed sizes: {e}") from e
