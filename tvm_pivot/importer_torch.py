"""PyTorch models, through torch.export. Imported only for users who bring a torch object."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tvm import IRModule
from tvm.relax.frontend.torch import from_exported_program

from .errors import ModelImportError
from .importer_common import brief
from .layer_names import NamedWeights, fingerprint, layer_name
from .relay_passes.name_layers import name_layers

EXAMPLE = "import_model(net, example_inputs=(torch.zeros(1, 3, 224, 224),))"


def import_torch(model: Any, example_inputs: Any) -> tuple[IRModule, list[str], list[str], str]:
    """Import a `torch.nn.Module` or a `torch.export.ExportedProgram`.

    Args:
        model: the module, traced in evaluation mode (its training flags are restored), or an
            exported program.
        example_inputs: for a module only: a tensor, a tuple of tensors, or a mapping of keyword
            arguments. Their shapes and dtypes are those the compiled model takes.

    Returns:
        A module whose `main` takes the run-time inputs (symbolic shapes are kept), the names of
        inputs and of outputs in order, and the source as messages name it.

    Raises:
        ModelImportError: example inputs are missing, or the model cannot be exported or converted.
    """
    if isinstance(model, torch.export.ExportedProgram):
        source = "torch ExportedProgram"
        if example_inputs is not None:
            raise ModelImportError(
                f"{source}: example_inputs is for torch.nn.Module; an exported program has its own"
            )
        program = model
    else:
        source = f"torch module {type(model).__name__}"
        program = _export(model, example_inputs, source)
    mod = name_layers(_convert(program, source), _layer_names(program))
    signature = program.graph_signature
    given = [str(name) for name in signature.user_inputs]
    params = [param.name for param in mod["main"].params]
    names = given if len(given) == len(params) else params
    outputs = [str(name) for name in signature.user_outputs]
    return mod, names, outputs, source


def _layer_names(program: Any) -> NamedWeights:
    return tuple(
        (layer_name(name), fingerprint(value.detach().cpu().numpy()))
        for name, value in program.state_dict.items()
        if value.dim() > 1 and value.dtype in (torch.float32, torch.float64, torch.float16)
    )


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, with every submodule's own flag restored."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _export(model: torch.nn.Module, example_inputs: Any, source: str) -> Any:
    args, kwargs = _arguments(example_inputs, source)
    try:
        with _evaluation(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs)
    except Exception as error:  # torch.export raises many kinds, from the user's code too
        raise ModelImportError(
            f"{source}: torch.export cannot trace it with these example_inputs "
            f"({brief(error)}); make `torch.export.export(net, example_inputs)` work first, "
            "or export it to ONNX"
        ) from error


def _arguments(example_inputs: Any, source: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        raise ModelImportError(f"{source}: needs example_inputs to be traced, e.g. {EXAMPLE}")
    kwargs: dict[str, Any] = {}
    args: tuple[Any, ...] = ()
    if isinstance(example_inputs, torch.Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    if not args and not kwargs:
        raise ModelImportError(
            f"{source}: example_inputs must be a tensor, a tuple of tensors or a mapping of "
            f"keyword arguments, and not empty, e.g. {EXAMPLE}"
        )
    for position, value in [*enumerate(args), *kwargs.items()]:
        if not isinstance(value, torch.Tensor):
            raise ModelImportError(
                f"{source}: example_inputs[{position!r}] is a {type(value).__name__}, not a "
                "tensor; wrap the module so that its forward takes tensors only"
            )
        if 0 in value.shape:
            raise ModelImportError(
                f"{source}: example_inputs[{position!r}] of shape {tuple(value.shape)} is empty; "
                "give one of the size the compiled model is to take"
            )
    return args, kwargs


def _convert(program: Any, source: str) -> IRModule:
    # The decompositions are what unrolls LSTM and GRU of any depth and direction; without them
    # the frontend reads one layer only, and gives its final states wrong shapes.
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return from_exported_program(
                program,
                keep_params_as_input=False,
                unwrap_unit_return_tuple=True,
                run_ep_decomposition=True,
            )
    except Exception as error:  # the frontend raises AssertionError, KeyError, TVMError ...
        unknown = re.search(r"Unsupported function types? (\[.*\])", str(error))
        if unknown:
            nodes = _nodes_of(program, unknown[1])
            raise ModelImportError(
                f"{source}: operators {unknown[1]} are not supported{nodes}; replace them with "
                "other torch functions, or export the model to ONNX"
            ) from error
        raise ModelImportError(
            f"{source}: TVM cannot convert the exported program ({brief(error)}); simplify "
            "the module, or export it to ONNX"
        ) from error


def _nodes_of(program: Any, names: str) -> str:
    """Where the unsupported operators listed in `names` stand in the exported graph."""
    found = [
        node.name
        for node in program.graph.nodes
        if node.op == "call_function" and repr(getattr(node.target, "__name__", "")) in names
    ]
    return f" (node {', '.join(map(repr, found[:5]))})" if found else ""
