"""TVM's ONNX frontend, run node by node so that every failure knows its node."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import tvm
from tvm import IRModule, relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend

from .errors import ModelImportError
from .importer_common import brief, check_size
from .importer_onnx_fold import MAX_FOLD, fold_node, fold_shape
from .importer_onnx_recurrent import GATES, Operand, operand_names, unroll
from .importer_onnx_refusals import refusal, used_names

# Tensors that the frontend itself would fill while importing (ConstantOfShape, Range) beyond this
# many elements come from damaged models only.
MAX_FILLED = 2**26


def frontend_operators() -> frozenset[str]:
    """Names of the operators that are converted (Loop and Scan, for example, are not)."""
    return frozenset(onnx_frontend._get_convert_map()) | {"If", *GATES}


def convert_graph(
    proto: onnx.ModelProto,
    weights: dict[str, npt.NDArray[Any]],
    shapes: dict[str, tuple[int, ...]],
    opset: int,
    source: str,
) -> IRModule:
    """Convert a checked model.

    Args:
        proto: the model.
        weights: inputs of its graph to make constant.
        shapes: the static shapes of its other inputs.
        opset: the version of the standard operators.
        source: how messages name the model.

    Returns:
        A module with a pure `main` of dataflow form, unless the model branches on data (If).

    Raises:
        ModelImportError: a node cannot be converted; the message names it.
    """
    importer = _Importer(weights, shapes, source)
    mod = importer.from_onnx(proto.graph, opset)
    # The frontend's own bookkeeping of inputs; the parameters say the same.
    mod["main"] = mod["main"].without_attr("num_input")
    # A model with an If is built without dataflow blocks, though the If may have been decided.
    return relax.transform.ConvertToDataflow(1)(mod)


class _OperatorFailed(BaseException):
    """Carries a conversion error past the frontend's `except Exception`, which prints tensors."""

    def __init__(self, operator: str, node: str, error: Exception) -> None:
        super().__init__(operator)
        self.operator, self.node, self.error = operator, node, error


class _Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    """The frontend with weights from outside, located errors and size limits."""

    def __init__(
        self,
        weights: dict[str, npt.NDArray[Any]],
        shapes: dict[str, tuple[int, ...]],
        source: str,
    ) -> None:
        super().__init__({name: list(shape) for name, shape in shapes.items()}, "float32")
        self._weights, self._source = weights, source
        self._used: set[str] = set()

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._add_weight(tensor.name, onnx.numpy_helper.to_array(tensor))
        for name, array in self._weights.items():
            self._add_weight(name, array)

    def _add_weight(self, name: str, array: npt.NDArray[Any]) -> None:
        try:
            self._nodes[name] = _constant(array)
        except Exception as error:  # strings and exotic number types
            raise ModelImportError(
                f"{self._source}: weight {name!r} of type {array.dtype} is not supported; convert "
                "it to float32 or an integer type"
            ) from error

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Checked before, with the name of the node; the frontend does not know what we unroll."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        self._used = used_names(graph)
        self._construct(graph.node)
        for output in graph.output:
            self._nodes[output.name] = self._as_tensor(output)

    def _construct(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            reason = refusal(node, self._used)
            if reason:
                raise ModelImportError(f"{self._source}: {_named(node)}: {reason}")
            try:
                if not (self._fold(node) or self._take_branch(node) or self._unroll(node)):
                    super()._construct_nodes(SimpleNamespace(node=[node]))
            except _OperatorFailed as failed:
                # Inside an If the failing node is another one than `node`.
                inner = f", in its {failed.operator} {failed.node!r}" * (node.op_type == "If")
                raise self._failure(node, inner, failed.error) from failed.error
            except ModelImportError:
                raise
            except Exception as error:
                raise self._failure(node, "", error) from error

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Evaluate shape arithmetic; whether the node's outputs are now constants."""
        if node.domain not in ("", "ai.onnx"):
            return False
        values = [self._nodes.get(name) for name in node.input]
        ty = getattr(values[0], "ty", None) if values else None
        results = None
        if isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr):
            results = fold_shape(node, tuple(map(int, ty.shape))) if _is_static(ty.shape) else None
        if results is None:
            results = fold_node(node, [constant_array(value) for value in values], self.opset)
        if results is None or len(results) < len(node.output):
            return False
        for name, array in zip(node.output, results, strict=False):
            self._nodes[name] = _constant(array)
        return True

    def _take_branch(self, node: onnx.NodeProto) -> bool:
        """Convert the chosen branch of an If with a constant condition in place of the If."""
        condition = constant_array(self._nodes.get(node.input[0])) if node.input else None
        if node.op_type != "If" or condition is None or condition.size != 1:
            return False
        wanted = "then_branch" if condition.reshape(-1)[0] else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == wanted)
        # Values of an outer graph are visible inside, and names are unique across both.
        for tensor in branch.initializer:
            self._add_weight(tensor.name, onnx.numpy_helper.to_array(tensor))
        self._construct(branch.node)
        for name, output in zip(node.output, branch.output, strict=True):
            self._nodes[name] = self._nodes[output.name]
        return True

    def _unroll(self, node: onnx.NodeProto) -> bool:
        """Convert the steps of an LSTM, GRU or RNN in place of it."""
        if node.op_type not in GATES or node.domain not in ("", "ai.onnx"):
            return False
        names = operand_names(node)
        unrolled = unroll(node, {key: self._operand(name) for key, name in names.items()})
        for name, array in unrolled.constants.items():
            self._nodes[name] = _constant(array)
        self._construct(unrolled.nodes)
        return True

    def _operand(self, name: str) -> Operand:
        value = self._nodes[name]
        if not isinstance(value.ty, relax.TensorType) or not isinstance(
            value.ty.shape, relax.ShapeExpr
        ):
            raise ValueError(f"the shape of {name!r} is not known")
        array = value.value.numpy() if isinstance(value, tvm.ir.GenericConst) else None
        return Operand(name, tuple(map(int, value.ty.shape)), str(value.ty.dtype), array)

    def _convert_operator(
        self, op_name: str, inputs: list[Any], attrs: dict[str, Any], opset: int
    ) -> relax.Expr:
        node = str(attrs.get("tvm_custom", {}).get("name", ""))
        try:
            _check_present(op_name, inputs, opset)
            _check_filled(op_name, node, inputs, self._source)
            result = super()._convert_operator(op_name, inputs, attrs, opset)
            if isinstance(result, relax.Expr):
                _check_type(result.ty, f"the result of {op_name} node {node!r}", self._source)
        except Exception as error:
            raise _OperatorFailed(op_name, node, error) from error
        return result

    def _failure(self, node: onnx.NodeProto, inner: str, error: Exception) -> ModelImportError:
        if isinstance(error, ModelImportError):
            return error
        return ModelImportError(
            f"{self._source}: {_named(node)}{inner} cannot be imported "
            f"({brief(error)}); check its attributes and input shapes, "
            "or rewrite it with other operators"
        )

    def _as_tensor(self, output: onnx.ValueInfoProto) -> relax.Expr:
        """The value of a graph output, with a static shape where the model promises one."""
        value = self._nodes.get(output.name)
        if value is None:
            raise ModelImportError(
                f"{self._source}: output {output.name!r} is computed by no node; remove it from "
                "the graph's outputs or export the model again"
            )
        if isinstance(value, relax.ShapeExpr) and _is_static(value):
            return _constant(np.array([int(d) for d in value], "int64"))
        ty, declared = value.ty, output.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in declared.shape.dim]
        is_open = isinstance(ty, relax.TensorType) and not (
            isinstance(ty.shape, relax.ShapeExpr) and _is_static(ty.shape)
        )
        if not is_open or not dims or min(dims) < 0 or ty.ndim not in (-1, len(dims)):
            return value
        # Checked at run time: the sizes depend on data that the exporter knew more about.
        return self.bb.match_cast(value, relax.TensorType(dims, ty.dtype))


def _named(node: onnx.NodeProto) -> str:
    name = repr(node.name) if node.name else f"without a name, of output {list(node.output)}"
    return f"{node.op_type} node {name}"


def _constant(array: npt.NDArray[Any]) -> relax.Expr:
    # By way of a TVM tensor: relax.const would narrow a NumPy array of 64-bit numbers to 32.
    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))


def _is_static(shape: Any) -> bool:
    return all(isinstance(dim, tirx.IntImm) for dim in shape)


def _check_present(op_name: str, inputs: list[Any], opset: int) -> None:
    """Refuse an empty name for an input that is not optional: TVM can crash on the gap."""
    if not onnx.defs.has(op_name):
        return
    formal = onnx.defs.get_schema(op_name, opset, "").inputs
    for position, value in enumerate(inputs):
        if value is None and formal:
            wanted = formal[min(position, len(formal) - 1)]
            if wanted.option != onnx.defs.OpSchema.FormalParameterOption.Optional:
                raise ValueError(f"input {position} ({wanted.name}) is missing")


def _check_filled(op_name: str, node: str, inputs: list[Any], source: str) -> None:
    """Refuse fills of absurd size before NumPy allocates them."""
    arrays = [constant_array(value) for value in inputs]
    if op_name == "ConstantOfShape" and arrays and arrays[0] is not None:
        size = float(np.prod(arrays[0].astype(float)))
    elif op_name == "Range" and len(arrays) == 3:
        if any(a is None or a.size != 1 for a in arrays):
            return
        start, stop, step = (float(a.reshape(-1)[0]) for a in arrays if a is not None)
        size = abs(stop - start) / abs(step) if step else 0.0
    else:
        return
    if not size <= MAX_FILLED:
        raise ModelImportError(
            f"{source}: {op_name} node {node!r} makes {size:.3g} constant elements (at most "
            f"{MAX_FILLED} are allowed); bind smaller input shapes, or get an undamaged copy"
        )


def constant_array(value: Any) -> npt.NDArray[Any] | None:
    """The value of a small Relax constant or a static shape; None for anything else."""
    if isinstance(value, relax.ShapeExpr) and _is_static(value):
        return np.array([int(d) for d in value], "int64")
    # `numpy()` copies, so the size comes first.
    if isinstance(value, tvm.ir.GenericConst) and math.prod(value.value.shape) <= MAX_FOLD:
        return np.asarray(value.value.numpy())
    return None


def _check_type(ty: Any, what: str, source: str) -> None:
    """Check the size of every tensor of static shape in a Relax type."""
    if isinstance(ty, relax.TupleType):
        for field in ty.fields:
            _check_type(field, what, source)
    elif isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr):
        sizes = [int(d) for d in ty.shape if isinstance(d, tirx.IntImm)]
        check_size(sizes, what, source)
