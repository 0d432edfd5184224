"""Let functions write their output over an input of theirs, where nothing reads that again.

The output then takes no memory of its own, and its cache lines are at hand: the function has just
read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from tvm import relax, tirx
from tvm.ir import Call, Expr, GlobalVar, IRModule, Var

from ..schedules.store_once import STORES_ONCE, store_freely, store_over
from ..schedules.write_over import inputs_to_write_over, write_over
from .graph import (
    MAIN,
    Rewriter,
    array_of,
    dtype_of,
    is_straight_line,
    live_bindings,
    op_name,
    static_shape,
    variables,
)

Bindings = Sequence[tuple[Var, Expr]]


def write_in_place(mod: IRModule) -> IRModule:
    """The module with functions that write over an input; results are bit for bit the same.

    A planes kernel writes over its residual if it stores every element once (see `store_once`), an
    elementwise function over what `inputs_to_write_over` says. They do if in each of their calls
    another function of the module made that input, and neither the call's other inputs nor
    anything later can see it. They keep their names.

    Comes last: no pass behind it may move a reader of the input behind the function.
    """
    # Views are operators of their own then, and every other function writes memory of its own.
    mod = relax.transform.RewriteDataflowReshape()(mod)
    places = _places(mod)
    if not places:
        return mod
    over = _chosen(mod, places) if is_straight_line(mod[MAIN]) else {}
    builder = relax.BlockBuilder()
    renewed = {gv: builder.add_func(_over(mod[gv], at), gv.name_hint) for gv, at in over.items()}

    def visit(rewriter: Rewriter, var: Var, value: Expr) -> Expr:
        if op_name(value) != "call_tir" or value.args[0] not in renewed:
            return value
        args, at = list(value.args[1].fields), over[value.args[0]]
        args[at] = rewriter.reshape(args[at], static_shape(var) or ())
        return relax.op.call_tir_inplace(renewed[value.args[0]], args, at, var.ty)

    written = Rewriter(mod).run(visit) if renewed else mod
    functions = {gv: func for gv, func in written.functions_items() if gv not in over}
    functions |= {gv: store_freely(mod[gv]) for gv in places if gv not in over and _marked(mod[gv])}
    functions |= dict(builder.get().functions_items())
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _marked(func: tirx.PrimFunc) -> bool:
    return bool(func.attrs.get(STORES_ONCE))


def _over(func: tirx.PrimFunc, place: int) -> tirx.PrimFunc:
    return store_over(func) if _marked(func) else write_over(func, place)


def _places(mod: IRModule) -> dict[GlobalVar, list[int]]:
    """The places of the inputs that each function might write over, where there are any."""
    places = {
        gv: [_place(func, "residual")] if _marked(func) else inputs_to_write_over(func)
        for gv, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    return {gv: found for gv, found in places.items() if found}


def _chosen(mod: IRModule, places: dict[GlobalVar, list[int]]) -> dict[GlobalVar, int]:
    """The functions that may write over an input in every call, and its place."""
    bindings = live_bindings(mod[MAIN])
    memory = _memory(bindings)
    last: dict[Var, int] = {}
    for i, (_, value) in enumerate(bindings):
        last.update(dict.fromkeys(_seen(value, memory), i))
    last.update(dict.fromkeys(_seen(mod[MAIN].body.body, memory), len(bindings)))
    made = {var for var, value in bindings if op_name(value) == "call_tir"}
    left: dict[GlobalVar, list[int]] = {}
    for i, (var, value) in enumerate(bindings):
        if op_name(value) != "call_tir" or value.args[0] not in places:
            continue
        dead = {owner for owner in made if last.get(owner) == i}
        gv = value.args[0]
        rows_once = not _marked(mod[gv]) or _repeats_no_row(value, mod[gv])
        left[gv] = [
            at
            for at in left.get(gv, places[gv])
            if rows_once and _may_write_over(var, value, at, memory, dead)
        ]
    return {gv: found[0] for gv, found in left.items() if found}


def _repeats_no_row(call: Call, kernel: tirx.PrimFunc) -> bool:
    """Whether no row of a planes kernel is in two blocks: it would be added twice there."""
    rows = array_of(call.args[1].fields[_place(kernel, "rows")])
    return rows is not None and np.unique(rows).size == rows.size


def _may_write_over(
    var: Var, call: Call, place: int, memory: dict[Var, set[Var]], dead: set[Var]
) -> bool:
    """Whether an input of a call is memory that is `dead` behind the call and all its own."""
    args = list(call.args[1].fields)
    replaced, own, new = args[place], static_shape(args[place]), static_shape(var)
    if own is None or new is None or prod(own) != prod(new):
        return False
    if dtype_of(replaced) != dtype_of(var):
        return False
    owners = set(_seen(replaced, memory))
    others = {owner for arg in args if not arg.same_as(replaced) for owner in _seen(arg, memory)}
    once = sum(arg.same_as(replaced) for arg in args) == 1
    return once and len(owners) == 1 and owners <= dead and not owners & others


def _memory(bindings: Bindings) -> dict[Var, set[Var]]:
    """The variables in whose memory each one may lie: itself, or those it may be a view of."""
    memory: dict[Var, set[Var]] = {}
    for var, value in bindings:
        fresh = op_name(value) == "call_tir"
        memory[var] = {var} if fresh else set(_seen(value, memory))
    return memory


def _seen(value: Expr, memory: dict[Var, set[Var]]) -> Iterator[Var]:
    """Whose memory an expression mentions; inputs of the network own theirs."""
    for var in variables(value):
        yield from memory.get(var, {var})


def _place(func: tirx.PrimFunc, name: str) -> int:
    """The place of a parameter."""
    return [str(param.name) for param in func.params].index(name)
