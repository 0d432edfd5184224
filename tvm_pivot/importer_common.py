"""Shared by the importers: size limits, error text, and static shapes for model inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import ModelImportError

Shapes = Mapping[str, "int | Sequence[int]"]

# TVM's kernels index flat buffers with 32-bit integers, so a larger tensor cannot be compiled.
# The limit also keeps a damaged dimension (2**40) from ever reaching an allocation.
MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class DeclaredInput:
    """An input as the model declares it.

    Attributes:
        name: the user's name of the input.
        dims: one entry per axis: a size, the name of a symbolic size, or None for an open size
            without a name. None instead of a tuple where even the rank is open.
    """

    name: str
    dims: tuple[int | str | None, ...] | None


def brief(error: BaseException) -> str:
    """One line of an error: its type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def check_size(shape: Iterable[int], what: str, source: str) -> None:
    """Refuse negative and absurd tensor sizes before anything is allocated.

    Raises:
        ModelImportError: an extent is negative, or the tensor has more than `MAX_ELEMENTS`.
    """
    sizes = tuple(shape)
    if any(size < 0 for size in sizes):
        raise ModelImportError(
            f"{source}: {what} has the impossible shape {sizes}; the input shapes do not fit the "
            "model, or the file is damaged"
        )
    if math.prod(sizes) > MAX_ELEMENTS:
        raise ModelImportError(
            f"{source}: {what} has shape {sizes}, more than {MAX_ELEMENTS} elements; bind smaller "
            "input shapes, or get an undamaged copy of the model"
        )


def bind_shapes(
    declared: Sequence[DeclaredInput], shapes: Shapes | None, source: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Give every declared input a static shape.

    Args:
        declared: the run-time inputs, in order.
        shapes: the user's sizes: of a symbolic dimension (an int) or of a whole input (a sequence).
        source: how messages name the model.

    Returns:
        Shapes by input name, and sizes by symbol.

    Raises:
        ModelImportError: a dimension stays open, a name matches nothing, or sizes contradict.
    """
    by_symbol, by_input = _split(shapes or {}, declared, source)
    for item in declared:
        if item.name in by_input:
            _match(item, by_input[item.name], by_symbol, source)
    bound: dict[str, tuple[int, ...]] = {}
    for item in declared:
        shape = by_input.get(item.name)
        bound[item.name] = _resolve(item, by_symbol, source) if shape is None else shape
        check_size(bound[item.name], f"input {item.name!r}", source)
    return bound, by_symbol


def _split(
    shapes: Shapes, declared: Sequence[DeclaredInput], source: str
) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Sort the user's entries into sizes of symbols and shapes of inputs."""
    if not isinstance(shapes, Mapping):
        raise ModelImportError(
            f'{source}: shapes must be a mapping such as {{"batch": 1}}, not {shapes!r}'
        )
    inputs = {item.name: item for item in declared}
    symbols = {dim for item in declared for dim in item.dims or () if isinstance(dim, str)}
    by_symbol: dict[str, int] = {}
    by_input: dict[str, tuple[int, ...]] = {}
    for name, value in shapes.items():
        if isinstance(value, (str, bytes, Mapping)):
            raise ModelImportError(f"{source}: shapes[{name!r}] must hold integers, not {value!r}")
        if isinstance(value, Iterable):
            if name not in inputs:
                raise _unknown(name, "an input", sorted(inputs), source)
            by_input[name] = tuple(_size(size, name, source) for size in value)
        else:
            if name not in symbols:
                raise _unknown(name, "a symbolic dimension", sorted(symbols), source)
            by_symbol[name] = _size(value, name, source)
    return by_symbol, by_input


def _size(value: object, name: str, source: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        size = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ModelImportError(
            f"{source}: shapes[{name!r}] must hold integers, not {value!r}"
        ) from None
    if size < 1:
        raise ModelImportError(f"{source}: shapes[{name!r}] must be positive, not {size}")
    return size


def _unknown(name: str, kind: str, known: list[str], source: str) -> ModelImportError:
    listed = ", ".join(repr(item) for item in known[:20]) or "none"
    return ModelImportError(
        f"{source}: shapes names {name!r}, which is not {kind} of this model (it has: {listed})"
    )


def _match(
    item: DeclaredInput, shape: tuple[int, ...], by_symbol: dict[str, int], source: str
) -> None:
    """Check a user's shape against the declaration; note the symbols it settles."""
    if item.dims is None:
        return
    if len(shape) != len(item.dims):
        raise ModelImportError(
            f"{source}: shapes gives input {item.name!r} {len(shape)} axes {shape}, but the model "
            f"declares {len(item.dims)}: {_declared(item)}"
        )
    for axis, (size, dim) in enumerate(zip(shape, item.dims, strict=True)):
        want = by_symbol.setdefault(dim, size) if isinstance(dim, str) else dim
        if want is not None and want != size:
            symbol = f" ({dim!r})" if isinstance(dim, str) else ""
            raise ModelImportError(
                f"{source}: shapes gives axis {axis}{symbol} of input {item.name!r} size {size}, "
                f"which contradicts {want} (declared: {_declared(item)})"
            )


def _resolve(item: DeclaredInput, by_symbol: dict[str, int], source: str) -> tuple[int, ...]:
    if item.dims is None:
        raise ModelImportError(
            f"{source}: input {item.name!r} has no declared rank; give its shape, e.g. "
            f"{_whole_input_hint(item)}"
        )
    sizes = []
    for axis, dim in enumerate(item.dims):
        size = by_symbol.get(dim) if isinstance(dim, str) else dim
        if size is None:
            hint = f'shapes={{"{dim}": 1}}' if dim is not None else _whole_input_hint(item)
            name = f" {dim!r}" if dim is not None else ""
            raise ModelImportError(
                f"{source}: input {item.name!r} has an open dimension{name} (axis {axis}); give "
                f"its size, e.g. {hint}"
            )
        sizes.append(size)
    return tuple(sizes)


def _declared(item: DeclaredInput) -> str:
    return "(" + ", ".join("?" if dim is None else str(dim) for dim in item.dims or ()) + ")"


def _whole_input_hint(item: DeclaredInput) -> str:
    dims = (1, 3, 224, 224) if item.dims is None else item.dims
    sizes = tuple(dim if isinstance(dim, int) and dim > 0 else 1 for dim in dims)
    return f'shapes={{"{item.name}": {sizes}}}'
