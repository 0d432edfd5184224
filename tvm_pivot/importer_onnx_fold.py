"""Shape arithmetic of ONNX graphs, evaluated while importing.

Exporters spell static shapes as graphs (Shape, Gather, Div, Concat, Reshape). Input shapes are
static here, so those nodes are constants, which TVM's frontend needs them to be.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]

# Shapes, indices and scalars; larger constants are weights, which the graph passes fold.
MAX_FOLD = 4096

_ELEMENTWISE = (
    "Abs Add And Cast CastLike Ceil Clip Div Equal Exp Floor Greater GreaterOrEqual Identity Less "
    "LessOrEqual Log Max Min Mod Mul Neg Not Or Pow Reciprocal Sign Sqrt Sub Where Xor"
)
_MOVING = "Concat Flatten Gather Reshape Size Slice Split Squeeze Transpose Unsqueeze"
_REDUCING = "ReduceMax ReduceMin ReduceProd ReduceSum"
_FILLING = "ConstantOfShape Expand Range"
FOLDABLE = frozenset(f"{_ELEMENTWISE} {_MOVING} {_REDUCING} {_FILLING}".split())
SCALAR_TYPES = {"value_float": "float32", "value_int": "int64"}
LIST_TYPES = {"value_floats": "float32", "value_ints": "int64"}


def fold_node(
    node: onnx.NodeProto, inputs: Sequence[Array | None], opset: int
) -> list[Array] | None:
    """Evaluate a node on small constants.

    Args:
        node: the node, of a standard domain.
        inputs: its input values; None where one is absent or not constant.
        opset: the version of the standard operators.

    Returns:
        One array per output, or None where the node is not to be folded or cannot be.
    """
    if node.op_type == "Constant":
        return _constant(node)
    if node.op_type not in FOLDABLE or not inputs:
        return None
    named = {}
    for name, value in zip(node.input, inputs, strict=True):
        if name and (value is None or value.size > MAX_FOLD):
            return None
        if name:
            named[name] = value
    if not _is_small(node.op_type, inputs):
        return None
    try:
        return _evaluate(node, named, opset)
    except Exception:  # the evaluator raises anything; the frontend then names the fault
        return None


def fold_shape(node: onnx.NodeProto, shape: tuple[int, ...]) -> list[Array] | None:
    """The value of a Shape or Size node on a tensor of static `shape`; None for other nodes."""
    if node.op_type == "Size":
        return [np.array(math.prod(shape), "int64")]
    if node.op_type == "Shape":
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        return [np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], "int64")]
    return None


def _constant(node: onnx.NodeProto) -> list[Array] | None:
    """The scalar and list forms of Constant, which the frontend does not read."""
    for attribute in node.attribute:
        if attribute.name in SCALAR_TYPES:
            value = onnx.helper.get_attribute_value(attribute)
            return [np.array(value, SCALAR_TYPES[attribute.name])]
        if attribute.name in LIST_TYPES:
            values = list(onnx.helper.get_attribute_value(attribute))
            return [np.array(values, LIST_TYPES[attribute.name])]
    return None


def _is_small(op_type: str, inputs: Sequence[Array | None]) -> bool:
    """Whether the result is of shape-like size; only filling operators can make it large."""
    first = inputs[0]
    if first is None:
        return False
    if op_type == "ConstantOfShape":
        return math.prod(int(size) for size in first.reshape(-1)) <= MAX_FOLD
    if op_type == "Expand" and len(inputs) == 2 and inputs[1] is not None:
        # Not the exact broadcast shape, but no smaller than it.
        target = math.prod(max(int(size), 1) for size in inputs[1].reshape(-1))
        return target * max(first.size, 1) <= MAX_FOLD
    if op_type == "Range":
        if len(inputs) != 3 or any(a is None or a.size != 1 for a in inputs):
            return False
        start, stop, step = (float(a.reshape(-1)[0]) for a in inputs if a is not None)
        return step != 0 and abs(stop - start) / abs(step) <= MAX_FOLD
    if op_type in ("Div", "Mod"):
        # On negative integers the evaluator rounds down where ONNX truncates.
        return all(a is not None and (a.dtype.kind not in "iu" or (a >= 0).all()) for a in inputs)
    total = math.prod(max(a.size, 1) for a in inputs if a is not None)
    return op_type not in _ELEMENTWISE.split() or total <= MAX_FOLD**2


def _evaluate(node: onnx.NodeProto, named: dict[str, Any], opset: int) -> list[Array]:
    from onnx.reference import ReferenceEvaluator  # slow to import, and few models need it

    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("ignore")
        results = ReferenceEvaluator(node, opsets={"": opset}).run(None, named)
    arrays = [np.asarray(result) for result in results]
    if any(array.dtype.kind not in "fiub" for array in arrays):
        raise TypeError("not an array of numbers")
    return arrays
