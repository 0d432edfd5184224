"""Which layers could store images in another way with nothing moved for that.

What reads windows of an image lays out padded planes anyhow, however the image is stored. Layers
that read images as they lie in memory, and those that add them, have them the way they write their
own. So all of these that are tied to each other store images in one way.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr, IRModule, Var

from .epilogues import FusedLayer
from .graph import MAIN, live_bindings, variables
from .layers import PlannedLayer

Uses = dict[Var, list[tuple[Var | None, bool]]]


def together(
    mod: IRModule, planned: Sequence[PlannedLayer], fused: Sequence[FusedLayer], found: set[Var]
) -> set[Var]:
    """Those of the layers `found`, by the variables of their sums, that nobody moves elements for
    if just they store their images in another way.
    """
    chains = {one.layer.var: one for one in fused}
    ends = {one.end: one.layer.var for one in fused}
    given, uses = _given(mod, planned, fused), uses_of(mod, fused)
    direct = {p.layer.var for p in planned if p.layer.geometry.direct}
    windows = {p.layer.var for p in planned if lays_out_planes(p)}

    def stays(var: Var) -> bool:
        if any(ends.get(x) not in found for x in given[var]):
            return False
        return all(
            user in found if added or user in direct else user in windows
            for user, added in uses[chains[var].end]
        )

    while dropped := {var for var in found if not stays(var)}:
        found = found - dropped
    return found


def groups(
    mod: IRModule, planned: Sequence[PlannedLayer], fused: Sequence[FusedLayer], found: set[Var]
) -> list[set[Var]]:
    """The layers `found` by `together`, in groups that must store their images in one way."""
    ends, given = {one.end: one.layer.var for one in fused}, _given(mod, planned, fused)
    made: list[set[Var]] = []
    for var in found:
        tied = {var, *(ends[x] for x in given[var])}
        joined = tied.union(*(group for group in made if group & tied))
        made = [group for group in made if not group & tied] + [joined]
    return made


def _given(
    mod: IRModule, planned: Sequence[PlannedLayer], fused: Sequence[FusedLayer]
) -> dict[Var, list[Expr]]:
    """What each layer has the way it writes its own images: what it adds, or reads as it lies."""
    values, chains = dict(live_bindings(mod[MAIN])), {one.layer.var: one for one in fused}
    found: dict[Var, list[Expr]] = {}
    for layer in (one.layer for one in planned):
        residual = chains[layer.var].residual
        read = [values[layer.var].args[0]] if layer.geometry.direct else []
        found[layer.var] = read if residual is None else [*read, residual]
    return found


def has_own_kernel(one: PlannedLayer) -> bool:
    """Whether a layer is a convolution with a kernel by itself that knows parts."""
    own = one.alone and one.layer.op == "conv2d"
    return own and one.choice is not None and one.choice.form == "planes"


def lays_out_planes(one: PlannedLayer) -> bool:
    """Whether a layer copies what it reads to padded planes."""
    return has_own_kernel(one) and not one.layer.geometry.direct


def uses_of(mod: IRModule, fused: Sequence[FusedLayer]) -> Uses:
    """For each layer's result, who reads it: a layer, and whether it adds it; None: another."""
    inside = {var: one.layer.var for one in fused for var in (*one.inner, one.end)}
    users: Uses = {one.end: [] for one in fused}
    result = [(None, value) for value in variables(mod[MAIN].body.body)]
    for var, value in [*live_bindings(mod[MAIN]), *result]:
        for read in variables(value):
            if read in users:
                user = inside.get(var)
                users[read].append((user, user != var))
    return users
