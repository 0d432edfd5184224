"""The compiled form of a torch model, and which of its layers are which weights of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import IRModule

from ..errors import PruneError
from ..importer import import_model
from ..relay_passes.canonicalize import canonicalize
from ..relay_passes.layers import Layer, find_layers


@dataclass(frozen=True, eq=False)
class Network:
    """A model as the compiler sees it.

    Attributes:
        mod: the canonical module.
        layers: its dense and convolution layers.
        named: for the weights of the model, the layers that use them: several for the steps of a
            recurrence, none where the compiler found no such layer.
    """

    mod: IRModule
    layers: tuple[Layer, ...]
    named: Mapping[str, tuple[Layer, ...]]


def trace(model: Any, example_inputs: Any, names: Sequence[str]) -> Network:
    """Trace a torch module, and find its weights `names` (without ``.weight``) again.

    Raises:
        ModelImportError: the model cannot be traced with these inputs, or there are none.
        PruneError: it has no layer.
    """
    mod = canonicalize(import_model(model, example_inputs=example_inputs).mod)
    found = tuple(find_layers(mod))
    if not found:
        raise PruneError(f"{type(model).__name__} has no layer that the compiler knows")
    return Network(mod, found, _matched(found, names))


def _matched(found: Sequence[Layer], names: Sequence[str]) -> dict[str, tuple[Layer, ...]]:
    """The layers by the names that the model has for them.

    The compiler writes ``_`` for what is no letter or digit, and numbers what has one name.
    """
    plain = {re.sub(r"\W", "_", name): name for name in names}
    layers: dict[str, list[Layer]] = {name: [] for name in names}
    for layer in found:
        longest = max(
            (p for p in plain if re.fullmatch(rf"{re.escape(p)}\d*", layer.name)),
            key=len,
            default=None,
        )
        if longest is not None:
            layers[plain[longest]].append(layer)
    return {name: tuple(own) for name, own in layers.items()}
