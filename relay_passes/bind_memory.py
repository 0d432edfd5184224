"""Take all memory out of `main`: weights and intermediate tensors become arguments, bound once.

A second function, `bind`, takes weights and plain memory, makes of them the tensors that kernels
read and write, and returns `main` with these as its last arguments. So whoever runs the network
says where its memory lies, a run allocates nothing but its outputs, and the library has no
weights in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence

from tvm import relax, tirx
from tvm.ir import Call, Expr, GenericConst, GlobalVar, IRModule, Tuple, Var

from ..memory import BIND
from .graph import MAIN, Array, array_of, op_name, variables

Bindings = Sequence[tuple[Var, Expr]]

_STORAGE, _TENSOR, _VIEW = "memory.alloc_storage", "memory.alloc_tensor", "reshape"
_KILLS = ("memory.kill_tensor", "memory.kill_storage")
_CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")
_TENSOR_IN = relax.ExternFunc("runtime.TVMTensorCreateView")


def bind_memory(mod: IRModule) -> tuple[IRModule, list[Array], list[int]] | None:
    """The module with `bind`, and a `main` that takes what `bind` makes after its inputs.

    Comes between TVM's passes: memory is planned and what is done with is killed, but none of it
    is in terms of the virtual machine yet.

    Returns:
        The module, the weights that `bind` takes first, and the sizes in bytes of the buffers
        that it takes then; None for a network that branches, which stays as it is.
    """
    main = mod[MAIN]
    bindings = _bindings(main)
    if bindings is None:
        return None
    ahead = _made_ahead(mod, bindings, main.body.body)
    taken = _Taken(ahead)
    rest = [
        relax.VarBinding(var, taken.swap(value))
        for var, value in bindings
        if var not in ahead and not (op_name(value) in _KILLS and value.args[0] in ahead)
    ]
    body = relax.SeqExpr([relax.BindingBlock(rest)], taken.swap(main.body.body))
    params = [*main.params, *taken.tensors.values(), *taken.constants.values()]
    renewed = relax.Function(params, body, main.ret_ty, main.is_pure, main.attrs)
    made = [(var, value) for var, value in bindings if var in ahead]
    name = next(gv for gv in mod.get_global_vars() if gv.name_hint == MAIN)
    binder, buffers = _binder(name, made, taken)
    return _with_main(mod, renewed, **{BIND: binder}), taken.arrays, buffers


def trust_bound(mod: IRModule, inputs: int) -> IRModule:
    """The module with a `main` that checks its `inputs` inputs only, once checks are calls.

    TVM has every run check all arguments. What `bind` binds has been checked by `bind`.
    """
    main = mod[MAIN]
    trusted = set(main.params[inputs:])
    bindings = [
        b
        for block in main.body.blocks
        for b in block.bindings
        if not (_called(b.value) in _CHECKS and b.value.args[0] in trusted)
    ]
    body = relax.SeqExpr([relax.BindingBlock(bindings)], main.body.body)
    renewed = relax.Function(main.params, body, main.ret_ty, main.is_pure, main.attrs)
    return _with_main(mod, renewed)


def _bindings(main: relax.Function) -> Bindings | None:
    every = [b for block in main.body.blocks for b in block.bindings]
    plain = [(b.var, b.value) for b in every if isinstance(b, relax.VarBinding)]
    branches = any(isinstance(value, relax.If) for _, value in plain)
    return None if branches or len(plain) < len(every) else plain


def _with_main(mod: IRModule, main: relax.Function, **more: relax.Function) -> IRModule:
    functions = {gv: main if gv.name_hint == MAIN else f for gv, f in mod.functions_items()}
    functions |= {GlobalVar(name): function for name, function in more.items()}
    return IRModule(functions, attrs=mod.attrs, global_infos=mod.global_infos)


def _called(value: Expr) -> str:
    external = isinstance(value, Call) and isinstance(value.op, relax.ExternFunc)
    return str(value.op.global_symbol) if external else ""


def _made_ahead(mod: IRModule, bindings: Bindings, result: Expr) -> set[Var]:
    """The storage, tensors and views that only kernels see.

    A run makes anew what is returned, and what something else might keep.
    """
    seen = set(variables(result))
    for var, value in reversed(bindings):
        kernel = isinstance(value, Call) and isinstance(value.op, GlobalVar)
        kernel = kernel and isinstance(mod[value.op], tirx.PrimFunc)
        if var in seen or not (kernel or op_name(value) in (_STORAGE, _TENSOR, _VIEW, *_KILLS)):
            seen.update(variables(value))
    ahead: set[Var] = set()
    for var, value in bindings:
        if var not in seen and _can_be_ahead(value, ahead):
            ahead.add(var)
    return ahead


def _can_be_ahead(value: Expr, ahead: Container[Var]) -> bool:
    match op_name(value):
        case "memory.alloc_storage":
            return isinstance(value.args[0].values[0], tirx.IntImm)
        case "memory.alloc_tensor":  # kernels take no tensor that begins within its memory
            return value.args[0] in ahead and int(value.args[1]) == 0
        case "reshape":
            return value.args[0] in ahead
    return False


class _Taken:
    """What `main` takes besides its inputs.

    Attributes:
        tensors: its parameters for what is made ahead, by their variables in `bind`.
        constants: its parameters for weights, by a digest of their value.
        arrays: these values.
    """

    def __init__(self, ahead: Container[Var]) -> None:
        self._ahead = ahead
        self.tensors: dict[Var, Var] = {}
        self.constants: dict[object, Var] = {}
        self.arrays: list[Array] = []

    def swap(self, expr: Expr) -> Expr:
        """An A-normal expression with parameters in place of what they stand for."""
        if isinstance(expr, Var) and expr in self._ahead:
            return self.tensors.setdefault(expr, relax.Var(str(expr.name), expr.ty))
        if isinstance(expr, GenericConst):
            value = array_of(expr)
            return expr if value is None else self._weight(value)
        if isinstance(expr, Tuple):
            return Tuple([self.swap(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.swap(expr.tuple_value), expr.index)
        if isinstance(expr, Call):
            args = [self.swap(arg) for arg in expr.args]
            return Call(expr.op, args, expr.attrs, expr.ty_args)
        return expr

    def _weight(self, value: Array) -> Var:
        digest = hashlib.sha256(value.data if value.size else b"").digest()
        key = (value.shape, value.dtype, digest)
        if key not in self.constants:
            form = relax.TensorType(value.shape, str(value.dtype))
            self.constants[key] = relax.Var(f"w{len(self.arrays)}", form)
            self.arrays.append(value)
        return self.constants[key]


def _binder(main: GlobalVar, made: Bindings, taken: _Taken) -> tuple[relax.Function, list[int]]:
    """The function `bind`, and the sizes of the buffers it takes after the weights."""
    weights = [
        relax.Var(f"w{i}", relax.TensorType(array.shape, str(array.dtype)))
        for i, array in enumerate(taken.arrays)
    ]
    buffers: dict[Var, Var] = {}
    bindings = []
    for var, value in made:
        if op_name(value) == _STORAGE:
            size = int(value.args[0].values[0])
            buffers[var] = relax.Var(f"b{len(buffers)}", relax.TensorType((size,), "uint8"))
        elif op_name(value) == _TENSOR:
            storage, offset, shape, dtype, *_ = value.args
            view = Call(_TENSOR_IN, [buffers[storage], shape, dtype, offset], ty_args=[var.ty])
            bindings.append(relax.VarBinding(var, view))
        else:
            bindings.append(relax.VarBinding(var, value))
    closure = relax.op.make_closure(main, Tuple([*taken.tensors, *weights]))
    bound = relax.Var("bound", relax.AnyType())
    bindings.append(relax.VarBinding(bound, closure))
    body = relax.SeqExpr([relax.BindingBlock(bindings)], bound)
    params = [*weights, *buffers.values()]
    function = relax.Function(params, body, relax.AnyType(), is_pure=False)
    sizes = [int(var.ty.shape.values[0]) for var in buffers.values()]
    return function.with_attr("relax.force_pure", True), sizes
