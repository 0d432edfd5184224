"""ONNX models: read, made static and current, then handed to TVM's frontend."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from tvm import IRModule

from .errors import ModelImportError
from .importer_common import DeclaredInput, Shapes, bind_shapes, brief
from .importer_onnx_frontend import convert_graph, frontend_operators
from .importer_onnx_recurrent import GATES, named_weights
from .importer_onnx_weights import Weight, take_weights
from .layer_names import Fingerprint, NamedWeights, fingerprint, layer_name
from .relay_passes.name_layers import name_layers

OLDEST_OPSET = 1
# The frontend reads most operators in their opset 13 form; older models are converted to 17.
# Opsets 11 and 12 differ so little that the frontend may read them when conversion fails.
CURRENT_OPSET = 13
CONVERT_TO = 17
READABLE_OPSET = 11
STANDARD_DOMAINS = ("", "ai.onnx")

# TVM reads these by name as the com.microsoft operators of ONNX Runtime, in no other domain.
MICROSOFT_ONLY = frozenset(
    {
        "AllClassNMS",
        "Attention",
        "BiasGelu",
        "EmbedLayerNormalization",
        "FastGelu",
        "MatMulInteger16",
        "SkipLayerNormalization",
    }
)
MICROSOFT_TOO = frozenset({"Gelu"})
# Functions of functions: the deepest in ONNX today takes three rounds.
MAX_EXPANSIONS = 8
MAX_NODES = 1_000_000


def import_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto, shapes: Shapes | None
) -> tuple[IRModule, list[str], list[str], str]:
    """Import an ONNX model.

    Args:
        model: a path, or a loaded model (which is not changed).
        shapes: sizes of symbolic dimensions or shapes of inputs, by name.

    Returns:
        A module whose `main` takes the run-time inputs, the names of inputs and of outputs in
        order, and the source as messages name it.

    Raises:
        ModelImportError: the model cannot be read or imported; the message says where and why.
    """
    folder: Path | None = None
    if isinstance(model, onnx.ModelProto):
        source = f"ONNX model {model.graph.name!r}"
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    else:
        path = Path(model)
        source, folder = str(path), path.parent
        proto = _read(path, source)
    try:
        return _import(proto, folder, shapes, source)
    except ModelImportError:
        raise
    except Exception as error:  # whatever the protobuf, ONNX or TVM code raised on a damaged model
        raise ModelImportError(
            f"{source}: cannot be imported: {brief(error)}; the model may be damaged: check it "
            "with onnx.checker.check_model, or export it again"
        ) from error


def _read(path: Path, source: str) -> onnx.ModelProto:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ModelImportError(
            f"{source}: cannot be read ({error}); give the path of an .onnx file"
        ) from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # DecodeError lives in google.protobuf, no dependency of ours
        raise ModelImportError(
            f"{source}: is not an ONNX model, or is damaged ({brief(error)}); export it again. "
            "PyTorch files (.pt, .pt2, .pth) are loaded in Python and passed as objects"
        ) from error
    return proto


def _import(
    proto: onnx.ModelProto, folder: Path | None, shapes: Shapes | None, source: str
) -> tuple[IRModule, list[str], list[str], str]:
    graph = proto.graph
    if not graph.output:
        raise ModelImportError(
            f"{source}: holds no graph with outputs; it is empty, truncated, or no ONNX model"
        )
    _check_operators(proto, source)
    _check_functions(proto, source)
    weights = take_weights(proto, folder, source)
    inputs = [item for item in graph.input if item.name not in weights]
    shape_of = fix_shapes(inputs, list(graph.output), shapes, source)
    names = [item.name for item in inputs], [item.name for item in graph.output]
    _make_checkable(proto, source)
    proto = _expand_functions(proto, source)
    proto = _update_opset(proto, source)
    left = {item.name for item in proto.graph.input}
    if not left.issuperset((*names[0], *weights)):
        raise ModelImportError(
            f"{source}: inputs were lost while the operators were updated to opset {CONVERT_TO}; "
            f"export the model with opset {CURRENT_OPSET} or newer"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # renamed variables: the caller keeps the user's names
        mod = convert_graph(proto, weights, shape_of, opset_of(proto), source)
    mod = name_layers(mod, _layer_names(proto, weights))
    return mod, names[0], names[1], source


def _layer_names(proto: onnx.ModelProto, weights: dict[str, Weight]) -> NamedWeights:
    """What to call the nodes that multiply with a weight."""
    small = {t.name: t for t in proto.graph.initializer if t.name not in weights}
    marks = {name: fingerprint(value) for name, value in weights.items()}
    named: list[tuple[str, Fingerprint]] = []
    for node in _nodes(proto.graph):
        if node.op_type in GATES:
            arrays = {n: onnx.numpy_helper.to_array(small[n]) for n in node.input if n in small}
            found = named_weights(node, {**weights, **arrays})
            named += [(name, fingerprint(matrix)) for name, matrix in found]
            continue
        for name in node.input[1:2]:
            if name in small and node.op_type in ("Conv", "Gemm", "MatMul"):
                marks.setdefault(name, fingerprint(onnx.numpy_helper.to_array(small[name])))
            if name in marks:
                named.append((layer_name(name, node.name), marks[name]))
    return tuple(named)


def _nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or function, subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def describe(node: onnx.NodeProto) -> str:
    """How messages name a node: by name, else by what it computes."""
    if node.name:
        return f"node {node.name!r}"
    return f"the unnamed node that computes {', '.join(map(repr, node.output)) or 'nothing'}"


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operators, 0 where the model does not say."""
    found = [e.version for e in proto.opset_import if e.domain in STANDARD_DOMAINS]
    return max(found, default=0)


def _check_operators(proto: onnx.ModelProto, source: str) -> None:
    """Refuse the first operator that neither TVM knows nor ONNX can expand."""
    opset = opset_of(proto)
    if not OLDEST_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise ModelImportError(
            f"{source}: declares opset {opset or None}; opsets {OLDEST_OPSET} to "
            f"{onnx.defs.onnx_opset_version()} can be read. Export the model with one of them"
            + (" or upgrade the onnx package" if opset > OLDEST_OPSET else "")
        )
    local = {(function.domain, function.name) for function in proto.functions}
    for scope in (proto.graph, *proto.functions):
        for node in _nodes(scope):
            if (node.domain, node.op_type) not in local and not (
                _readable(node) or _expandable(node, opset)
            ):
                raise _unsupported(node, source)


def _readable(node: onnx.NodeProto) -> bool:
    """Whether TVM's frontend reads the node's operator, with this domain's meaning."""
    if node.domain in STANDARD_DOMAINS:
        return node.op_type in frontend_operators() - MICROSOFT_ONLY
    return node.domain == "com.microsoft" and node.op_type in MICROSOFT_ONLY | MICROSOFT_TOO


def _expandable(node: onnx.NodeProto, opset: int) -> bool:
    """Whether ONNX defines a standard operator as a function of others."""
    if node.domain not in STANDARD_DOMAINS or not onnx.defs.has(node.op_type):
        return False
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _unsupported(node: onnx.NodeProto, source: str) -> ModelImportError:
    name = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
    if node.domain in STANDARD_DOMAINS:
        remedy = "replace it with other operators, or cut the model before it"
    else:
        remedy = "export the model with standard ONNX operators only"
    return ModelImportError(
        f"{source}: operator {name} ({describe(node)}) is not supported; {remedy}"
    )


def fix_shapes(
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    shapes: Shapes | None,
    source: str,
) -> dict[str, tuple[int, ...]]:
    """Write the bound sizes into inputs and outputs, in place.

    Args:
        inputs: those of a graph, weights left out.
        outputs: of the same graph; dimensions that no input names stay open.
        shapes: sizes of symbolic dimensions or shapes of inputs, by name.
        source: how messages name the model.

    Returns:
        The shapes of the inputs by name.

    Raises:
        ModelImportError: a dimension stays open, a name matches nothing, or sizes contradict.
    """
    declared = [_declared(item, source) for item in inputs]
    shape_of, by_symbol = bind_shapes(declared, shapes, source)
    for item in inputs:
        dims = item.type.tensor_type.shape
        dims.ClearField("dim")
        for size in shape_of[item.name]:
            dims.dim.add().dim_value = size
        dims.SetInParent()
    for item in outputs:
        if item.type.WhichOneof("value") not in (None, "tensor_type"):
            raise ModelImportError(
                f"{source}: output {item.name!r} is not a tensor; models that give sequences, maps "
                "or optional values are not supported: cut that part off the model"
            )
        for dim in item.type.tensor_type.shape.dim:
            if dim.dim_param in by_symbol:
                dim.dim_value = by_symbol[dim.dim_param]
    return shape_of


def _declared(item: onnx.ValueInfoProto, source: str) -> DeclaredInput:
    tensor = item.type.tensor_type
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        kind = np.dtype(object)
    if not item.type.HasField("tensor_type") or kind.kind in "OUSc":
        raise ModelImportError(
            f"{source}: input {item.name!r} is not a tensor of numbers; models over sequences, "
            "maps, strings or complex numbers are not supported: cut that part off the model"
        )
    if not tensor.HasField("shape"):
        return DeclaredInput(item.name, None)
    dims: list[int | str | None] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            dims.append(dim.dim_value)
        else:  # exporters write -1, an empty name or nothing at all for "any size"
            dims.append(dim.dim_param or None)
    return DeclaredInput(item.name, tuple(dims))


def _make_checkable(proto: onnx.ModelProto, source: str) -> None:
    """Run ONNX's checker, after the repairs that keep it to faults that matter."""
    # From version 4 on weights need not be inputs; from 8 on models may hold functions.
    proto.ir_version = max(proto.ir_version, 8)
    del proto.graph.value_info[:]
    for item in proto.graph.output:
        # The type of an output is computed, yet the checker wants one declared.
        tensor = item.type.tensor_type
        tensor.elem_type = tensor.elem_type or onnx.TensorProto.FLOAT
        tensor.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # ValidationError, or what pybind makes of a broken string
        context = " ".join(str(error).split())[:400]
        raise ModelImportError(
            f"{source}: is not a valid ONNX model: {context}; export it again"
        ) from error


def _expand_functions(proto: onnx.ModelProto, source: str) -> onnx.ModelProto:
    """Inline the model's own functions, and standard operators that only ONNX can expand."""
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    for _ in range(MAX_EXPANSIONS):
        unread = [node for node in _nodes(proto.graph) if not _readable(node)]
        if not all(_expandable(node, opset_of(proto)) for node in unread):
            break
        if not unread:
            return proto
        names = sorted({node.op_type for node in unread})
        ids = [(domain, name) for name in names for domain in STANDARD_DOMAINS]
        try:
            proto = onnx.inliner.inline_selected_functions(proto, ids, False, True)
        except Exception as error:  # RuntimeError: a function body for another opset or use
            raise _unsupported(unread[0], source) from error
    fatal = [node for node in unread if not _expandable(node, opset_of(proto))] or unread
    raise _unsupported(fatal[0], source)


def _check_functions(proto: onnx.ModelProto, source: str) -> None:
    """Refuse functions that call themselves, or that expand without sensible bound."""
    bodies = {(function.domain, function.name): function for function in proto.functions}
    sizes: dict[tuple[str, str], int | None] = {}

    def size_of(scope: onnx.GraphProto | onnx.FunctionProto) -> int:
        return sum(expand((node.domain, node.op_type)) for node in _nodes(scope))

    def expand(key: tuple[str, str]) -> int:
        if key not in bodies:
            return 1
        if key not in sizes:
            sizes[key] = None  # being expanded
            sizes[key] = size_of(bodies[key])
        size = sizes[key]
        if size is None:
            raise ModelImportError(
                f"{source}: function {key[0]}.{key[1]} calls itself; export the model again"
            )
        return size

    total = size_of(proto.graph)
    if total > MAX_NODES:
        raise ModelImportError(
            f"{source}: its functions expand to {total:.3g} nodes (at most {MAX_NODES}); "
            "export a smaller model"
        )


def _update_opset(proto: onnx.ModelProto, source: str) -> onnx.ModelProto:
    """Convert models older than `CURRENT_OPSET`."""
    opset = opset_of(proto)
    if opset >= CURRENT_OPSET:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, CONVERT_TO)
    except Exception as error:  # ConvertError, and RuntimeError for failed assertions in C++
        if opset >= READABLE_OPSET:
            return proto
        raise ModelImportError(
            f"{source}: opset {opset} cannot be converted to {CONVERT_TO}: {brief(error)}; export "
            f"the model with opset {CURRENT_OPSET} or newer"
        ) from error
