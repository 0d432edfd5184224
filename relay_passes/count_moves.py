"""Count the operators that only move elements about when a network runs."""

from __future__ import annotations

from tvm.ir import Expr, GlobalVar, IRModule, Var

from ..report import Moves
from .fold_constants import slices
from .graph import MAIN, ints, is_straight_line, live_bindings, op_name, static_shape, variables

GATHERS = frozenset(
    {
        "dynamic_strided_slice",
        "flip",
        "gather_elements",
        "gather_nd",
        "index_put",
        "index_tensor",
        "scatter_elements",
        "scatter_nd",
        "strided_slice",
        "take",
    }
)
TRANSPOSES = frozenset(["permute_dims", "transpose"])


def count_moves(mod: IRModule) -> Moves | None:
    """The gathers and transposes of `main` that depend on its inputs; None if it has branches.

    Those of constants are done once, at compile time. Slices count if they have a stride.
    """
    func = mod[MAIN]
    if not is_straight_line(func):
        return None
    varying: set[Var] = set(func.params)
    gathers = transposes = 0
    for var, value in live_bindings(func):
        if not any(v in varying for v in variables(value)):
            continue
        varying.add(var)
        name = _name(value)
        gathers += name in GATHERS and not _is_contiguous(value)
        transposes += name in TRANSPOSES and not _is_view(value)
    return Moves(gathers, transposes)


def _name(value: Expr) -> str:
    """The operator, also where a frontend has compiled it to a function of that name already."""
    if op_name(value) == "call_tir" and isinstance(value.args[0], GlobalVar):
        return str(value.args[0].name_hint).rstrip("0123456789_")
    return op_name(value)


def _is_contiguous(value: Expr) -> bool:
    """Whether a slice takes neighbours along every axis."""
    shape = static_shape(value.args[0]) if op_name(value) == "strided_slice" else None
    picked = None if shape is None else slices(value, len(shape))
    return picked is not None and all(s.step in (None, 1) for s in picked)


def _is_view(value: Expr) -> bool:
    """Whether a permutation of axes moves only axes of extent 1, and so no element."""
    shape = static_shape(value.args[0]) if op_name(value) == "permute_dims" else None
    if shape is None:
        return False
    given = value.attrs.axes
    axes = range(len(shape))[::-1] if given is None else [a % len(shape) for a in ints(given)]
    moved = [a for a in axes if shape[a] > 1]
    return moved == sorted(moved)
