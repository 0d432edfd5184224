"""Bring an imported Relax module into the form that all later passes rely on.

The canonical forms are listed in `canonicalize`.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir import Call, Expr, IRModule, Tuple, Var

from . import canonical_layers, clamps, compiled_functions, simplify
from .fold_channels import fold_channels
from .fold_constants import constants, evaluate
from .graph import (
    MAIN,
    Array,
    Rewriter,
    Rule,
    constant,
    is_straight_line,
    op_name,
    telling,
)


def canonicalize(mod: IRModule) -> IRModule:
    """The same function in canonical form.

    `main` becomes one dataflow block in A-normal form, without dead code or compiled functions
    that nothing calls, in inference mode. Its parameters, results and their names stay.

    - No operator has only constants as inputs, unless its value would be large.
    - Dense: ``matmul(x, const[K, N])``, bias ``add(_, const[N])``. A matrix repeated over a
      batch is the matrix; ``const @ x`` is ``permute(permute(x) @ const)``.
    - Convolution: ``nn.conv2d`` in NCHW / OIHW, bias ``add(_, const[1, O, 1, 1])``; conv1d is
      conv2d of planes with height 1, between two reshapes; zero padding is the conv's own.
    - batch_norm and constants per channel are folded into the layer before them; a batch_norm
      after anything else is ``add(multiply(x, scale), shift)``. A zero weight stays zero.
    - Clamps: ``nn.relu``, ``clip(x, low, high)``, ``maximum(x, scalar)``, ``minimum(x, scalar)``.
    - Flatten, squeeze and expand_dims are ``reshape``; no two reshapes or permutations in a row.
    - A constant operand of add, multiply, maximum, minimum is the second one; ``x - c`` is
      ``x + (-c)`` and ``x / c`` is ``x * (1/c)``.
    - Global average pooling is ``mean`` over axes [2, 3]; axes ascend from 0.

    A function with branches, impure calls or nested functions comes back unchanged.
    """
    mod = relax.transform.Normalize()(mod)
    if not is_straight_line(mod[MAIN]):
        return mod
    if not canonical_layers.layouts_are_canonical(mod):
        mod = relax.transform.ConvertLayout({"relax.nn.conv2d": ["NCHW", "OIHW"]})(mod)
        mod = relax.transform.Normalize()(mod)
    mod = Rewriter(mod).run(_Simplifier(mod).visit)
    mod = fold_channels(mod)
    mod = Rewriter(mod).run(_Simplifier(mod).visit)  # views around a conv1d meet others
    mod = relax.transform.CanonicalizeBindings()(mod)
    mod = relax.transform.DeadCodeElimination([MAIN])(mod)
    return Rewriter(mod).run(_name_layer)


def _name_layer(rw: Rewriter, var: Var, value: Expr) -> Expr:
    """Layers get back the names they have in the model; those without one get a number."""
    if op_name(value) not in ("nn.conv2d", "matmul") or telling(var.name):
        return value
    return rw.emit(value, f"{op_name(value).removeprefix('nn.')}_1")


class _Simplifier:
    """Applies the local rules to each binding until none has anything to say."""

    def __init__(self, mod: IRModule) -> None:
        self.rules: dict[str, tuple[Rule, ...]] = {}
        for table in (simplify.RULES, clamps.RULES, canonical_layers.RULES):
            for name, rules in table.items():
                self.rules[name] = self.rules.get(name, ()) + rules
        self.rules["call_tir"] = (compiled_functions.raise_call_tir(mod),)
        # one folded constant for each distinct computation: unrolled cells share weights
        self.folded: dict[object, Expr] = {}

    def visit(self, rw: Rewriter, _: Var, value: Expr) -> Expr:
        """The simplest known form of a binding's value."""
        while True:
            if isinstance(value, relax.TupleGetItem):
                return _field(rw, value)
            if not isinstance(value, Call):
                return value
            value = rw.builder.normalize(value)
            simpler = self._fold(value)
            for rule in self.rules.get(op_name(value), ()):
                simpler = simpler if simpler is not None else rule(rw, value)
            if simpler is None:
                return value
            value = simpler

    def _fold(self, call: Call) -> Expr | None:
        """The constant that a call of constants makes."""
        known = constants(call)
        # a repeated constant is worth more as such: its user can do without the repetition
        if known is None or not op_name(call) or op_name(call) == "broadcast_to":
            return None
        key = (op_name(call), *call.args, str(call.attrs))
        if key not in self.folded:
            result = evaluate(call, known)
            if result is None:
                return None
            self.folded[key] = _constants(result)
        return self.folded[key]


def _constants(result: Array | list[Array]) -> Expr:
    """A constant, or a tuple of them."""
    if isinstance(result, list):
        return Tuple([constant(r) for r in result])
    return constant(result)


def _field(rw: Rewriter, item: relax.TupleGetItem) -> Expr:
    """An element of a known tuple; of a dropout, its input."""
    source = rw.definition(item.tuple_value)
    if isinstance(source, Tuple):
        return source.fields[item.index]
    if op_name(source) == "nn.dropout" and item.index == 0:
        return source.args[0]
    return item
