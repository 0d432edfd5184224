"""Let kernels write their output over the residual that they add, where nothing reads that again.

The output then takes no memory of its own, and its cache lines are at hand: the kernel has just
read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tvm import relax, tirx
from tvm.ir import Call, Expr, GlobalVar, IRModule, Var

from ..schedules.store_once import STORES_ONCE, store_freely, store_over
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
    """The module with kernels that write over their residual; results are bit for bit the same.

    A kernel does if it stores every element once (see `store_once`) and each of its calls adds
    a tensor that another function of the module made, and that neither the call's other inputs
    nor anything later can see. It keeps its name.

    Comes last: no pass behind it may move a reader of the residual behind the kernel.
    """
    marked = {
        gv: func
        for gv, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and func.attrs.get(STORES_ONCE)
    }
    if not marked:
        return mod
    # Views are operators of their own then, and every other function writes memory of its own.
    mod = relax.transform.RewriteDataflowReshape()(mod)
    over = _over_residuals(mod, marked) if is_straight_line(mod[MAIN]) else set()
    builder = relax.BlockBuilder()
    renewed = {
        gv: builder.add_func(store_over(func), gv.name_hint)
        for gv, func in marked.items()
        if gv in over
    }

    def visit(_: Rewriter, var: Var, value: Expr) -> Expr:
        if op_name(value) != "call_tir" or value.args[0] not in renewed:
            return value
        args = list(value.args[1].fields)
        at = _place(marked[value.args[0]], "residual")
        return relax.op.call_tir_inplace(renewed[value.args[0]], args, at, var.ty)

    written = Rewriter(mod).run(visit) if renewed else mod
    functions = {gv: func for gv, func in written.functions_items() if gv not in marked}
    functions |= {gv: store_freely(func) for gv, func in marked.items() if gv not in over}
    functions |= dict(builder.get().functions_items())
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _over_residuals(mod: IRModule, marked: dict[GlobalVar, tirx.PrimFunc]) -> set[GlobalVar]:
    """The kernels of which every call may write over its residual."""
    bindings = live_bindings(mod[MAIN])
    memory = _memory(bindings)
    last: dict[Var, int] = {}
    for i, (_, value) in enumerate(bindings):
        last.update(dict.fromkeys(_seen(value, memory), i))
    last.update(dict.fromkeys(_seen(mod[MAIN].body.body, memory), len(bindings)))
    made = {var for var, value in bindings if op_name(value) == "call_tir"}
    over: set[GlobalVar] = set()
    not_over: set[GlobalVar] = set()
    for i, (var, value) in enumerate(bindings):
        if op_name(value) != "call_tir" or value.args[0] not in marked:
            continue
        dead = {owner for owner in made if last.get(owner) == i}
        kernel = value.args[0]
        ours = _may_write_over(var, value, marked[kernel], memory, dead)
        (over if ours else not_over).add(kernel)
    return over - not_over


def _may_write_over(
    var: Var, call: Call, kernel: tirx.PrimFunc, memory: dict[Var, set[Var]], dead: set[Var]
) -> bool:
    """Whether a call's residual is memory that is `dead` behind the call and all its own."""
    args = list(call.args[1].fields)
    residual, rows = args[_place(kernel, "residual")], array_of(args[_place(kernel, "rows")])
    if rows is None or np.unique(rows).size < rows.size:
        return False  # a row in two blocks would be added twice
    if (static_shape(residual), dtype_of(residual)) != (static_shape(var), dtype_of(var)):
        return False
    owners = set(_seen(residual, memory))
    others = {owner for arg in args if not arg.same_as(residual) for owner in _seen(arg, memory)}
    once = sum(arg.same_as(residual) for arg in args) == 1
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
