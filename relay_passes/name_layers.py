"""Name each layer after its weight in the user's model, so that reports and dumps can."""

from __future__ import annotations

from tvm.ir import Call, Expr, IRModule, Var

from ..layer_names import Fingerprint, NamedWeights, fingerprint
from .graph import MAIN, Rewriter, array_of, is_straight_line, op_name

LAYERS = ("nn.conv1d", "nn.conv2d", "nn.conv3d", "matmul")
VIEWS = ("permute_dims", "reshape", "broadcast_to")


def name_layers(mod: IRModule, weights: NamedWeights) -> IRModule:
    """The imported module with the result of each dense or convolution layer named.

    Args:
        mod: an imported module, weights bound as constants.
        weights: layer names and fingerprints of their weights, in the order of the model. A
            layer whose weight is not among them keeps the name that the importer made up.
    """
    if not weights or not is_straight_line(mod[MAIN]):
        return mod
    names: dict[Fingerprint, list[str]] = {}
    for name, mark in weights:
        names.setdefault(mark, []).append(name)

    def visit(rw: Rewriter, _: Var, value: Expr) -> Expr:
        if op_name(value) not in LAYERS:
            return value
        known = names.get(_weight(rw, value), [])  # type: ignore[arg-type]
        if not known:
            return value
        # Layers with equal weights come in the model's order; unrolled cells repeat the last.
        return rw.emit(value, known[0] if len(known) == 1 else known.pop(0))

    return Rewriter(mod).run(visit)


def _weight(rw: Rewriter, call: Call) -> Fingerprint | None:
    """The fingerprint of the constant behind a layer's weight operand."""
    weight = rw.definition(call.args[1])
    while isinstance(weight, Call) and op_name(weight) in VIEWS:
        weight = rw.definition(weight.args[0])
    value = array_of(weight)
    return None if value is None else fingerprint(value)
