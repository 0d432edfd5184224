"""Models in: ONNX files, torch modules or Relax modules become one static Relax function."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax, tirx

from .errors import ModelImportError
from .importer_common import DeclaredInput, Shapes, bind_shapes, brief, check_size
from .tensors import TensorSpec

Imported = tuple[IRModule, list[str], list[str], str]


@dataclass(frozen=True)
class ImportedModel:
    """A model in Relax.

    Attributes:
        mod: its `main` takes exactly `inputs`, in order, and returns `outputs`, in order: one
            tensor, or a tuple of tensors. Weights are constants, shapes are static.
        inputs: the run-time inputs under the user's names (variables in `mod` may differ).
        outputs: the results.
        source: the file or object, as messages name it.
    """

    mod: IRModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source: str


def import_model(
    model: Any,
    *,
    example_inputs: Any = None,
    params: Mapping[str, Any] | None = None,
    shapes: Mapping[str, int | Sequence[int]] | None = None,
) -> ImportedModel:
    """Import a model.

    Args:
        model: the path of an ONNX file, an `onnx.ModelProto`, a `torch.nn.Module`, a
            `torch.export.ExportedProgram`, or a Relax `IRModule`.
        example_inputs: for a `torch.nn.Module`: tensors of the shapes and dtypes to compile for.
        params: for a Relax module: arrays for those parameters of `main` that are weights.
        shapes: sizes of symbolic dimensions (`{"batch": 1}`) or shapes of whole inputs
            (`{"x": (1, 3, 224, 224)}`). Dimensions that the model fixes cannot be changed.

    Returns:
        The model with static shapes and weights bound. `model` itself is not changed.

    Raises:
        ModelImportError: the model cannot be read, converted or made static. The message names
            the file or object, the node, input or weight, and the remedy.
    """
    kind = _kind(model)
    for name, value, fits in (
        ("example_inputs", example_inputs, "torch"),
        ("params", params, "relax"),
    ):
        if value is not None and kind != fits:
            raise ModelImportError(
                f"{name} is only for {'torch modules' if fits == 'torch' else 'Relax modules'}, "
                f"not for {_what(model)}; leave it out"
            )
    imported: Imported
    if kind == "onnx":
        from .importer_onnx import import_onnx

        return _finish(import_onnx(model, shapes))
    if kind == "torch":
        from .importer_torch import import_torch

        imported = import_torch(model, example_inputs)
    else:
        imported = _import_relax(model, params or {})
    return _finish(_bind_symbols(imported, shapes))


def _kind(model: Any) -> str:
    """Which importer reads the object; packages that are not installed are not imported."""
    if isinstance(model, (str, os.PathLike)):
        return "onnx"
    if isinstance(model, IRModule):
        return "relax"
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__}
    if ("onnx", "ModelProto") in bases:
        return "onnx"
    if bases & {("torch", "Module"), ("torch", "ExportedProgram")}:
        return "torch"
    raise ModelImportError(
        f"cannot import {_what(model)}; give the path of an ONNX file, an onnx.ModelProto, a "
        "torch.nn.Module with example_inputs, a torch.export.ExportedProgram, or a Relax IRModule"
    )


def _what(model: Any) -> str:
    return repr(model) if isinstance(model, (str, os.PathLike)) else f"a {type(model).__name__}"


def _import_relax(mod: IRModule, params: Mapping[str, Any]) -> Imported:
    """Bind the weights of a Relax module that the user built."""
    source = "Relax module"
    main = _main(mod, source)
    if not relax.analysis.check_well_formed(mod):
        raise ModelImportError(
            f"{source}: is not well-formed; see the log of relax.analysis.well_formed(mod)"
        )
    declared = {param.name: param for param in main.params}
    if len(declared) != len(main.params):
        raise ModelImportError(f"{source}: main has two parameters of one name; rename one")
    bound = {}
    for name, value in params.items():
        if name not in declared:
            raise ModelImportError(
                f"{source}: params names {name!r}, but main's parameters are "
                f"{', '.join(map(repr, declared)) or 'none'}"
            )
        bound[name] = _weight(declared[name], value, source)
    mod = relax.transform.BindParams("main", bound)(mod)
    inputs = [param.name for param in mod["main"].params]
    return mod, inputs, [], source


def _main(mod: IRModule, source: str) -> relax.Function:
    names = [var.name_hint for var in mod.get_global_vars()]
    if "main" not in names or not isinstance(mod["main"], relax.Function):
        raise ModelImportError(
            f"{source}: has no Relax function 'main' (it has: {', '.join(names) or 'nothing'}); "
            "name the entry function 'main'"
        )
    return mod["main"]


def _weight(param: relax.Var, value: Any, source: str) -> Any:
    """The user's array as a TVM tensor, checked against the parameter it is for."""
    if isinstance(value, tvm.runtime.Tensor):
        value = value.numpy()
    if hasattr(value, "detach"):  # a torch tensor or parameter
        value = value.detach().cpu().numpy()
    array = np.ascontiguousarray(value)
    shape, dtype = np.shape(value), str(array.dtype)
    ty = param.ty
    dims = _dims(ty)
    fits = (
        dims is not None
        and len(dims) == len(shape)
        and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True)
        )
    )
    if not fits or str(ty.dtype) != dtype:
        raise ModelImportError(
            f"{source}: params[{param.name!r}] is {dtype}{list(shape)}, but main declares {ty}; "
            "convert or reshape the array"
        )
    return tvm.runtime.tensor(array.reshape(shape))


def _dims(ty: Any) -> tuple[int | str, ...] | None:
    """The extents of a tensor type, symbolic ones as text; None where the shape is not known."""
    if not isinstance(ty, relax.TensorType) or not isinstance(ty.shape, relax.ShapeExpr):
        return None
    return tuple(int(d) if isinstance(d, tirx.IntImm) else str(d) for d in ty.shape)


def _bind_symbols(imported: Imported, shapes: Shapes | None) -> Imported:
    """Replace the symbolic dimensions of `main` by the user's sizes."""
    mod, inputs, outputs, source = imported
    main = _main(mod, source)
    declared = []
    for name, param in zip(inputs, main.params, strict=True):
        if not isinstance(param.ty, relax.TensorType):
            raise ModelImportError(
                f"{source}: input {name!r} is no tensor but {param.ty}; only tensors can be inputs"
            )
        declared.append(DeclaredInput(name, _dims(param.ty)))
    bound, symbols = bind_shapes(declared, shapes, source)
    known = {var.name for var in relax.analysis.defined_symbolic_vars(main)}
    sizes = {name: size for name, size in symbols.items() if name in known}
    if sizes:
        mod = relax.transform.BindSymbolicVars(sizes, "main")(mod)
    for name, param in zip(inputs, mod["main"].params, strict=True):
        if _dims(param.ty) != bound[name]:
            raise ModelImportError(
                f"{source}: input {name!r} keeps the shape {param.ty} where {bound[name]} was "
                "asked for; give the size of every symbolic variable in it, or export the model "
                "with static shapes"
            )
    return mod, inputs, outputs, source


def _finish(imported: Imported) -> ImportedModel:
    """Check that everything is static and of sane size, and describe inputs and outputs."""
    mod, inputs, names, source = imported
    main = _main(mod, source)
    ret = main.ret_ty
    fields = list(ret.fields) if isinstance(ret, relax.TupleType) else [ret]
    if not names:
        names = ["output"] if len(fields) == 1 else [f"output_{i}" for i in range(len(fields))]
    if len(names) != len(fields):
        raise ModelImportError(
            f"{source}: declares {len(names)} outputs ({', '.join(names[:10])}) but computes "
            f"{len(fields)}; return plain tensors, in one flat tuple"
        )
    names = _distinct(names)
    _check_bindings(main, source)
    return ImportedModel(
        mod=mod,
        inputs=tuple(
            _spec(name, param.ty, "input", source)
            for name, param in zip(inputs, main.params, strict=True)
        ),
        outputs=tuple(
            _spec(name, field, "output", source) for name, field in zip(names, fields, strict=True)
        ),
        source=source,
    )


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number added where a model returns one tensor twice."""
    result: list[str] = []
    for name in names:
        fresh, count = name, 1
        while fresh in result or (count > 1 and fresh in names):
            fresh, count = f"{name}_{count}", count + 1
        result.append(fresh)
    return result


def _spec(name: str, ty: Any, role: str, source: str) -> TensorSpec:
    if not isinstance(ty, relax.TensorType):
        raise ModelImportError(
            f"{source}: {role} {name!r} is no tensor but {ty}; only tensors can be {role}s"
        )
    dims = _dims(ty)
    sizes = tuple(dim for dim in dims or () if isinstance(dim, int))
    if dims is None or len(sizes) != len(dims):
        raise ModelImportError(
            f"{source}: {role} {name!r} has the shape {'unknown' if dims is None else dims}, which "
            "depends on data or on an open size; cut the model before the operator that makes it "
            "so (NonZero, NonMaxSuppression, ...), or fix the sizes with shapes="
        )
    check_size(sizes, f"{role} {name!r}", source)
    return TensorSpec(name, sizes, str(ty.dtype))


def _check_bindings(main: relax.Function, source: str) -> None:
    """Check every intermediate size, so that no later pass allocates an absurd one."""

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Var) and (dims := _dims(expr.ty)) is not None:
            sizes = [dim for dim in dims if isinstance(dim, int)]
            check_size(sizes, f"tensor {expr.name!r}", source)

    try:
        relax.analysis.post_order_visit(main.body, visit)
    except ModelImportError:
        raise
    except Exception as error:  # the visitor runs in C++, which may wrap what `visit` raised
        cause = error.__cause__ if isinstance(error.__cause__, ModelImportError) else None
        raise cause or ModelImportError(f"{source}: cannot be checked: {brief(error)}") from error
