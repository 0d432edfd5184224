"""ONNX's recurrent operators (LSTM, GRU, RNN), unrolled into operators that TVM's frontend reads.

The inputs of all steps are multiplied at once; each step then multiplies the state before it. All
steps of a direction share one constant per weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from .layer_names import layer_name

Array = npt.NDArray[Any]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DEFAULT_ACTIVATIONS = {
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
    "GRU": ("Sigmoid", "Tanh"),
    "RNN": ("Tanh",),
}
ACTIVATIONS = {name.lower(): name for name in ("Relu", "Sigmoid", "Tanh")}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
# Every step is code of its own: longer sequences would take many minutes to compile.
MAX_STEPS = 1024


@dataclass(frozen=True)
class Operand:
    """An input of the node: its name, static shape, NumPy dtype, and value if it is constant."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: Array | None = None


@dataclass
class Unrolled:
    """What stands for the node: constants by name, and nodes that compute its outputs."""

    constants: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)


def unroll(node: onnx.NodeProto, operands: Mapping[str, Operand]) -> Unrolled:
    """Basic operators for an LSTM, GRU or RNN node.

    Args:
        node: the node.
        operands: its inputs by ONNX's names (``"X"``, ``"initial_h"``, ...), absent ones left out.

    Raises:
        ValueError: the node uses something that is not supported; the message says what.
    """
    return _Unroller(node, operands).run()


def operand_names(node: onnx.NodeProto) -> dict[str, str]:
    """The names of the node's inputs by ONNX's names for them; absent ones are left out."""
    formal = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    return {key: name for key, name in zip(formal, node.input, strict=False) if name}


def named_weights(
    node: onnx.NodeProto, weights: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:
    """Layer names for the node's constant weights, with the matrices that `unroll` makes of them.

    Args:
        node: an LSTM, GRU or RNN node.
        weights: constants of the model by name.
    """
    names = operand_names(node)
    keys = [key for key in ("W", "R") if names.get(key) in weights]
    layers = {key: layer_name(names[key], node.name) for key in keys}
    for key in keys:
        value = weights[names[key]]
        if value.ndim != 3:
            continue
        # Where both weights got their name from the node, it does not tell them apart.
        layer = f"{layers[key]}.{key}" if len(set(layers.values())) < len(keys) else layers[key]
        for direction, matrix in enumerate(value):
            for part in _parts(node, key, matrix.shape[0] // GATES[node.op_type]):
                yield layer + ".reverse" * direction, np.ascontiguousarray(matrix[part].T)


def _parts(node: onnx.NodeProto, key: str, hidden: int) -> tuple[slice, ...]:
    """The rows of a weight that are multiplied with one operand each."""
    if key == "R" and node.op_type == "GRU" and not _attributes(node).get("linear_before_reset", 0):
        return slice(0, 2 * hidden), slice(2 * hidden, 3 * hidden)
    return (slice(0, GATES[node.op_type] * hidden),)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


class _Unroller:
    """Writes the nodes for one recurrent node.

    Attributes:
        steps, batch, width, hidden: sizes of X [steps, batch, width] and of the state.
        gates: activations per direction.
    """

    def __init__(self, node: onnx.NodeProto, operands: Mapping[str, Operand]) -> None:
        self.node, self.operands = node, operands
        self.attributes = _attributes(node)
        self.kind = node.op_type
        self.prefix = f"{node.name or self.kind}:{'|'.join(node.output)}/"
        self.batch_first = bool(self.attributes.get("layout", 0))
        self.reset_after = bool(self.attributes.get("linear_before_reset", 0))
        self.result = Unrolled()
        self.count = 0
        self.reverse = self._directions()
        self.gates = self._activations()
        self._check()

    # --- what the node asks for

    def _directions(self) -> tuple[bool, ...]:
        direction = self.attributes.get("direction", b"forward").decode()
        if direction not in DIRECTIONS:
            raise ValueError(f"the direction {direction!r} is unknown")
        return {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]

    def _activations(self) -> list[tuple[str, ...]]:
        default = DEFAULT_ACTIVATIONS[self.kind]
        names = [item.decode() for item in self.attributes.get("activations", [])]
        names = names or list(default * len(self.reverse))
        unknown = [name for name in names if name.lower() not in ACTIVATIONS]
        if unknown or len(names) != len(default) * len(self.reverse):
            raise ValueError(
                f"the activations {names} are not supported, only {', '.join(ACTIVATIONS.values())}"
            )
        found = [ACTIVATIONS[name.lower()] for name in names]
        return [tuple(found[i : i + len(default)]) for i in range(0, len(found), len(default))]

    def _check(self) -> None:
        if "P" in self.operands or self.attributes.get("input_forget", 0):
            raise ValueError("peepholes and coupled gates are not supported")
        if "clip" in self.attributes:
            raise ValueError("clip is not supported")
        missing = [key for key in "XWR" if key not in self.operands]
        if missing:
            raise ValueError(f"input {missing[0]} is missing")
        x, r = self.operands["X"], self.operands["R"]
        if len(x.shape) != 3 or len(r.shape) != 3:
            raise ValueError(f"X and R need three axes, not {x.shape} and {r.shape}")
        first, second, self.width = x.shape
        self.steps, self.batch = (second, first) if self.batch_first else (first, second)
        self.hidden = r.shape[2]
        directions, rows = len(self.reverse), GATES[self.kind] * self.hidden
        state = (directions, self.batch, self.hidden)
        if self.batch_first:
            state = (self.batch, directions, self.hidden)
        wanted = {
            "W": (directions, rows, self.width),
            "R": (directions, rows, self.hidden),
            "B": (directions, 2 * rows),
            "initial_h": state,
            "initial_c": state,
        }
        for key, shape in wanted.items():
            if key in self.operands and self.operands[key].shape != shape:
                raise ValueError(f"{key} has shape {self.operands[key].shape}, not {shape}")
        if self.attributes.get("hidden_size", self.hidden) != self.hidden:
            raise ValueError(f"hidden_size disagrees with R {r.shape}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"{self.steps} steps: 1 to {MAX_STEPS} are supported")
        lengths = self.operands.get("sequence_lens")
        if lengths and (lengths.value is None or (lengths.value != self.steps).any()):
            raise ValueError("sequences shorter than the input (sequence_lens) are not supported")

    # --- small steps of writing

    def emit(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        self.count += 1
        name = f"{self.prefix}{self.count}"
        self.result.nodes.append(
            helper.make_node(op_type, list(inputs), [name], name=name, **attributes)
        )
        return name

    def constant(self, value: Array) -> str:
        self.count += 1
        name = f"{self.prefix}{self.count}"
        self.result.constants[name] = value
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, "int64"))

    def part(self, x: str, start: int, stop: int, axis: int) -> str:
        return self.emit("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))

    def reshape(self, x: str, *shape: int) -> str:
        return self.emit("Reshape", x, self.ints(*shape))

    def columns(self, x: str, gate: int, count: int = 1) -> str:
        """Columns of `count` gates of a matrix [batch, gates * hidden]."""
        return self.part(x, gate * self.hidden, (gate + count) * self.hidden, 1)

    def matrix(self, key: str, direction: int, rows: slice) -> str:
        """A weight of one direction as it is multiplied: [inputs, rows]."""
        operand = self.operands[key]
        if operand.value is not None:
            return self.constant(operand.value[direction][rows].T)
        one = self.emit("Gather", operand.name, self.constant(np.array(direction)), axis=0)
        return self.emit("Transpose", self.part(one, rows.start, rows.stop, 0), perm=[1, 0])

    def bias(self, direction: int) -> tuple[str, str]:
        """The bias of the input's product and of the state's, as far as it cannot join it."""
        width = GATES[self.kind] * self.hidden
        if "B" not in self.operands:
            return "", ""
        b = self.operands["B"]
        late = 2 * self.hidden if self.reset_after and self.kind == "GRU" else width
        if b.value is not None:
            of_x, of_h = b.value[direction].reshape(2, width)
            joined = of_x + np.where(np.arange(width) < late, of_h, 0)
            rest = self.constant(of_h[late:]) if late < width else ""
            return self.constant(joined.astype(b.dtype)), rest
        one = self.emit("Gather", b.name, self.constant(np.array(direction)), axis=0)
        of_x, of_h = (self.part(one, a, a + width, 0) for a in (0, width))
        mask = self.constant((np.arange(width) < late).astype(b.dtype))
        rest = self.part(of_h, late, width, 0) if late < width else ""
        return self.emit("Add", of_x, self.emit("Mul", of_h, mask)), rest

    def initial(self, key: str, direction: int) -> str:
        """A state [batch, hidden] before the first step; "" where it is zero."""
        if key not in self.operands:
            return ""
        axis = 1 if self.batch_first else 0
        index = self.constant(np.array(direction))
        return self.emit("Gather", self.operands[key].name, index, axis=axis)

    # --- the whole

    def run(self) -> Unrolled:
        x = self.operands["X"].name
        if self.batch_first:
            x = self.emit("Transpose", x, perm=[1, 0, 2])
        x = self.reshape(x, self.steps * self.batch, self.width)
        every = [self._direction(x, direction) for direction in range(len(self.reverse))]
        outputs = dict(zip(("Y", "Y_h", "Y_c"), self.node.output, strict=False))
        if outputs.get("Y"):
            sequences = [self._sequence(states) for states, _, _ in every]
            self._finish(sequences, outputs["Y"], 1, [2, 0, 1, 3])
        for key, last in (("Y_h", [h for _, h, _ in every]), ("Y_c", [c for _, _, c in every])):
            if outputs.get(key):
                states = [self.reshape(state, 1, self.batch, self.hidden) for state in last]
                self._finish(states, outputs[key], 0, [1, 0, 2])
        return self.result

    def _sequence(self, states: list[str]) -> str:
        """States [batch, hidden] of all steps as [steps, 1, batch, hidden]."""
        rows = self.emit("Concat", *states, axis=0)
        return self.reshape(rows, self.steps, 1, self.batch, self.hidden)

    def _finish(self, parts: list[str], output: str, axis: int, batch_first: list[int]) -> None:
        """Join what the directions computed along `axis` as an output of the node."""
        if self.batch_first:
            parts = [
                self.emit("Transpose", self.emit("Concat", *parts, axis=axis), perm=batch_first)
            ]
        name = self.prefix + output
        self.result.nodes.append(helper.make_node("Concat", parts, [output], name, axis=axis))

    def _direction(self, x: str, direction: int) -> tuple[list[str], str, str]:
        """The states of all steps in the order of X, the last one, and the last cell."""
        width = GATES[self.kind] * self.hidden
        early, late = self.bias(direction)
        projected = self.emit("MatMul", x, self.matrix("W", direction, slice(0, width)))
        if early:
            projected = self.emit("Add", projected, early)
        parts = _parts(self.node, "R", self.hidden)
        weights = [self.matrix("R", direction, rows) for rows in parts]
        h, c = self.initial("initial_h", direction), self.initial("initial_c", direction)
        order = range(self.steps)
        states = [""] * self.steps
        for t in reversed(order) if self.reverse[direction] else order:
            now = self.part(projected, t * self.batch, (t + 1) * self.batch, 0)
            if self.kind == "LSTM":
                h, c = self._lstm(now, h, c, weights[0], self.gates[direction])
            elif self.kind == "GRU" and self.reset_after:
                h = self._gru_reset_after(now, h, weights[0], late, self.gates[direction])
            elif self.kind == "GRU":
                h = self._gru(now, h, weights, self.gates[direction])
            else:
                h = self.emit(self.gates[direction][0], self._plus(now, h, weights[0]))
            states[t] = h
        return states, h, c

    def _plus(self, x: str, h: str, weight: str) -> str:
        """x + h weight; a state of zero adds nothing."""
        return self.emit("Add", self.emit("MatMul", h, weight), x) if h else x

    def _lstm(self, x: str, h: str, c: str, weight: str, gates: tuple[str, ...]) -> tuple[str, str]:
        """One step; ONNX's order of gates is input, output, forget, cell."""
        total = self._plus(x, h, weight)
        take, show, keep = (self.emit(gates[0], self.columns(total, i)) for i in range(3))
        new = self.emit("Mul", take, self.emit(gates[1], self.columns(total, 3)))
        if c:
            new = self.emit("Add", self.emit("Mul", keep, c), new)
        return self.emit("Mul", show, self.emit(gates[2], new)), new

    def _gru(self, x: str, h: str, weights: list[str], gates: tuple[str, ...]) -> str:
        """One step; ONNX's order of gates is update, reset, hidden."""
        both = self.emit(gates[0], self._plus(self.columns(x, 0, 2), h, weights[0]))
        new = self.columns(x, 2)
        if h:
            new = self._plus(new, self.emit("Mul", self.columns(both, 1), h), weights[1])
        return self._mix(self.columns(both, 0), self.emit(gates[1], new), h)

    def _gru_reset_after(
        self, x: str, h: str, weight: str, late: str, gates: tuple[str, ...]
    ) -> str:
        """One step that resets what the state adds, not the state."""
        both, new, added = self.columns(x, 0, 2), self.columns(x, 2), ""
        if h:
            product = self.emit("MatMul", h, weight)
            both = self.emit("Add", both, self.columns(product, 0, 2))
            added = self.columns(product, 2)
        both = self.emit(gates[0], both)
        if late:
            added = self.emit("Add", added, late) if added else late
        if added:
            new = self.emit("Add", new, self.emit("Mul", self.columns(both, 1), added))
        return self._mix(self.columns(both, 0), self.emit(gates[1], new), h)

    def _mix(self, update: str, new: str, h: str) -> str:
        """(1 - update) new + update h."""
        if not h:
            return self.emit("Sub", new, self.emit("Mul", update, new))
        difference = self.emit("Sub", h, new)
        return self.emit("Add", new, self.emit("Mul", update, difference))
