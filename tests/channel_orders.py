"""Networks whose channels get another order, and the checks common to the tests of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from relax_nets import assert_same_function, inputs_for, make, ops, run
from tvm.ir import Expr, IRModule

from tvm_pivot.layout import Permutation
from tvm_pivot.relay_passes.apply_permutations import apply_permutations
from tvm_pivot.relay_passes.canonicalize import canonicalize
from tvm_pivot.relay_passes.channel_groups import ChannelGroup, ChannelGroups, find_channel_groups


def shuffles(groups: ChannelGroups, seed: int = 0) -> dict[str, Permutation]:
    """A random permutation for every free group."""
    rng = np.random.default_rng(seed)
    return {g.name: Permutation(rng.permutation(g.size)) for g in groups.free}


def shuffled(groups: ChannelGroups, *, exact: bool = False) -> IRModule:
    """The module with every free group shuffled, after a check that it computes the same.

    With `exact`, bit for bit; then there must be something to shuffle.
    """
    out = apply_permutations(groups, shuffles(groups))
    assert ops(out) == ops(groups.mod)
    if exact:
        assert groups.free
        inputs = inputs_for(out)
        for a, b in zip(run(groups.mod, *inputs), run(out, *inputs), strict=True):
            np.testing.assert_array_equal(a, b)
    else:
        assert_same_function(groups.mod, out)
    return out


def groups_of(
    body: Callable[..., Expr | Sequence[Expr]], *shapes: Sequence[int], exact: bool = False
) -> ChannelGroups:
    """The channel groups of a small net, after a check that free ones may be shuffled."""
    groups = find_channel_groups(canonicalize(make(body, *shapes)))
    shuffled(groups, exact=exact)
    return groups


def sides(group: ChannelGroup) -> list[str]:
    """The layers that a group covers, as ``"conv2d_1 rows"``."""
    return [f"{s.layer} {s.side}" for s in group.sides]


def free(groups: ChannelGroups) -> dict[str, int]:
    """The sizes of the free groups."""
    return {g.name: g.size for g in groups.free}


def frozen(groups: ChannelGroups) -> dict[str, str]:
    """The reasons of the frozen groups."""
    return {g.name: g.frozen for g in groups.groups if g.frozen}
