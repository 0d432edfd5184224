"""What a schedule rule asks about a TIR function: its blocks, how they walk memory, their cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tvm_ffi
from tvm import DataType, ir, s_tir, sym, tirx

TensorLoad = ir.TensorLoad

_normalize = tvm_ffi.get_global_func("s_tir.schedule.NormalizePrimFunc")

# Calls that cost about as much as this many additions, once they are vectorised.
_CALL_COST = {"tirx.exp": 10, "tirx.tanh": 10, "tirx.erf": 12, "tirx.sigmoid": 12, "tirx.log": 12}
_OTHER_CALL_COST = 8
_FREE_CALLS = {"prim.if_then_else", "tirx.likely", "prim.likely", "tirx.reinterpret"}

_IF_THEN_ELSE = ir.Op.get("prim.if_then_else")

# Marks a plain innermost loop over strided data, which LLVM vectorises better than TVM.
LEFT_TO_LLVM = "pivot.left_to_llvm"
NAIVE_ITERATIONS = 64


class CannotSchedule(Exception):
    """A rule found out half-way that it cannot schedule the function; the next rule is tried."""


def walk(node: Any, kind: Any) -> list[Any]:
    """Every `kind` object below `node`, in post-order."""
    found: list[Any] = []
    tvm_ffi.structural_walk(node, (kind, found.append), order="post")
    return found


def variables(node: Any) -> set[Any]:
    """The variables that occur in an expression, buffers included."""
    return set(walk(node, tirx.Var))


def substitute(node: Any, values: dict[Any, Any]) -> Any:
    """`node` with variables replaced."""
    return tvm_ffi.structural_map(node, (tirx.Var, lambda var: values.get(var, var)))


def offset(buffer: Any, indices: Iterable[Any]) -> Any:
    """The element that row-major `indices` address."""
    address: Any = tirx.const(0, "int64")
    for index, extent in zip(indices, buffer.ty.shape, strict=True):
        address = address * extent + index
    return address


@dataclass(frozen=True)
class Access:
    """One load or store of a block.

    Attributes:
        buffer: the buffer's variable.
        strides: elements between neighbours along each axis of the block (0 where the access
            does not move), or None where the offset is not linear in that axis.
        is_store: True for a store.
        indices: the buffer indices, in the block's axes.
    """

    buffer: Any
    strides: tuple[int | None, ...]
    is_store: bool
    indices: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(extent) for extent in self.buffer.ty.shape)

    @property
    def bits(self) -> int:
        return int(DataType(str(self.buffer.ty.dtype)).bits)


class Block:
    """A leaf block in normal form: one loop for each axis, in the axes' order."""

    def __init__(self, sch: s_tir.Schedule, rv: Any) -> None:
        self.sch, self.rv = sch, rv
        self.stmt = sch.get(rv)
        self.vars = [axis.var for axis in self.stmt.iter_vars]
        kinds = {tirx.IterVar.DataPar: "S", tirx.IterVar.CommReduce: "R"}
        self.kinds = "".join(kinds.get(axis.iter_type, "O") for axis in self.stmt.iter_vars)
        if not all(isinstance(axis.dom.extent, tirx.IntImm) for axis in self.stmt.iter_vars):
            raise CannotSchedule(f"block {self.name}: an axis has no constant extent")
        self.extents = [int(axis.dom.extent) for axis in self.stmt.iter_vars]

    @property
    def name(self) -> str:
        return str(self.stmt.name_hint)

    @property
    def spatial(self) -> bool:
        return set(self.kinds) <= {"S"}

    @property
    def size(self) -> int:
        """How often the block runs."""
        total = 1
        for extent in self.extents:
            total *= extent
        return total

    @property
    def loops(self) -> list[Any]:
        return list(self.sch.get_loops(self.rv))

    @cached_property
    def analyzer(self) -> Any:
        """An analyzer that knows the range of every axis."""
        analyzer = sym.Analyzer()
        for axis in self.stmt.iter_vars:
            analyzer.bind(axis.var, axis.dom)
        return analyzer

    @cached_property
    def accesses(self) -> list[Access]:
        """Loads and stores of the body, without the initial value of a reduction."""
        loads = [self._access(x.source, x.indices, False) for x in walk(self.stmt.body, TensorLoad)]
        stores = [
            self._access(x.buffer, x.indices, True) for x in walk(self.stmt.body, tirx.BufferStore)
        ]
        return stores + loads

    @property
    def loads(self) -> list[Access]:
        """What is read, without the result that a reduction updates."""
        written = [access.buffer for access in self.accesses if access.is_store]
        return [a for a in self.accesses if not any(a.buffer.same_as(b) for b in written)]

    @property
    def stores(self) -> list[Access]:
        return [access for access in self.accesses if access.is_store]

    def _access(self, buffer: Any, indices: Iterable[Any], is_store: bool) -> Access:
        indices = tuple(indices)
        address = self.analyzer.simplify(offset(buffer, indices))
        strides = tuple(_stride(address, var) for var in self.vars)
        return Access(buffer, strides, is_store, indices)

    def collapses(self, left: int, right: int) -> bool:
        """Whether every access walks two neighbouring axes like one, and TVM will see that."""
        pair = {self.vars[left], self.vars[right]}
        if pair & self.free_vars or self.kinds[left] != self.kinds[right]:
            return False
        extent = self.extents[right]
        for access in self.accesses:
            inner, outer = access.strides[right], access.strides[left]
            if inner is None or outer is None or outer != inner * extent:
                return False
        merged = tirx.Var("merged", self.vars[right].ty)
        analyzer = sym.Analyzer()
        analyzer.bind(merged, ir.Range(0, self.extents[left] * extent))
        values = {self.vars[left]: merged // extent, self.vars[right]: merged % extent}
        for access in self.accesses:
            indices = [substitute(index, values) for index in access.indices]
            if _stride(analyzer.simplify(offset(access.buffer, indices)), merged) is None:
                return False
        return True

    @cached_property
    def free_vars(self) -> set[Any]:
        """Axes that matter beyond linear addressing: in conditions, casts, table look-ups."""

        def hide_load(load: Any) -> Any:
            return tirx.const(0, str(load.ty))

        def hide_store(store: Any) -> Any:
            return tirx.Evaluate(store.value)

        visible = tvm_ffi.structural_map(self.stmt.body, (TensorLoad, hide_load))
        visible = tvm_ffi.structural_map(visible, (tirx.BufferStore, hide_store))
        free = variables(visible) & set(self.vars)
        for access in self.accesses:
            free |= {v for v, s in zip(self.vars, access.strides, strict=True) if s is None}
        return free

    @cached_property
    def branch_vars(self) -> set[Any]:
        """Axes that decide which side of an if_then_else is evaluated."""
        calls = [c for c in walk(self.stmt.body, ir.Call) if c.op.same_as(_IF_THEN_ELSE)]
        return {var for call in calls for var in variables(call.args[0])} & set(self.vars)

    def branch_points(self, axis: int) -> list[int]:
        """Where the if_then_else conditions on an axis may change, inside its range.

        Conditions that are no bounds, or depend on other axes too, are left out.
        """
        var = self.vars[axis]
        calls = [c for c in walk(self.stmt.body, ir.Call) if c.op.same_as(_IF_THEN_ELSE)]
        terms = [term for call in calls for term in conjuncts(call.args[0])]
        points = {_bound(term, var) for term in terms if var in variables(term)}
        return sorted(p for p in points if p is not None and 0 < p < self.extents[axis])

    @property
    def may_run_in_place(self) -> bool:
        """Whether TVM may let the result share memory with an operand: both are temporary."""
        arguments = set(self.sch.mod["main"].params)
        return any(store.buffer not in arguments for store in self.stores) and any(
            load.buffer not in arguments for load in self.loads
        )

    @cached_property
    def cost(self) -> int:
        """Additions that one run of the body is worth (at least 1)."""
        last = set(self.vars[-1:])
        calls = sum(
            _CALL_COST.get(call.op.name, _OTHER_CALL_COST)
            for call in walk(self.stmt.body, ir.Call)
            # Where the last axis does not matter, the call is made once for all of it.
            if getattr(call.op, "name", "") not in _FREE_CALLS and variables(call) & last
        )
        return max(1, calls)

    def lanes(self, lanes: int) -> int:
        """Elements in a vector register that holds `lanes` fp32, for this block's widest type."""
        bits = max((access.bits for access in self.accesses), default=32)
        return max(2, lanes * 32 // max(bits, 8))


def _stride(address: Any, var: Any) -> int | None:
    """d address / d var where it is a constant, else None."""
    if var not in variables(address):
        return 0
    linear = sym.detect_linear_equation(address, [var])
    if not linear or not isinstance(linear[0], tirx.IntImm):
        return None
    return int(linear[0])


def conjuncts(condition: Any) -> list[Any]:
    """The terms of a conjunction or disjunction."""
    if isinstance(condition, (tirx.And, tirx.Or)):
        return conjuncts(condition.a) + conjuncts(condition.b)
    return [condition]


def _bound(term: Any, var: Any) -> int | None:
    """The smallest value of `var` on the far side of a comparison with a constant, else None."""
    if not isinstance(term, (tirx.LT, tirx.LE, tirx.GT, tirx.GE)):
        return None
    linear = sym.detect_linear_equation(sym.Analyzer().simplify(term.a - term.b), [var])
    if not linear or not all(isinstance(x, tirx.IntImm) for x in linear):
        return None
    factor, base = int(linear[0]), int(linear[1])
    if factor < 0:
        factor, base, strict = -factor, -base, isinstance(term, (tirx.LE, tirx.GT))
    else:
        strict = isinstance(term, (tirx.LT, tirx.GE))
    # factor v + base crosses zero: at zero itself for < and >=, just after it for <= and >.
    return -(base // factor) if strict else -base // factor + 1


def leaf_blocks(sch: s_tir.Schedule) -> list[Block] | None:
    """The function's blocks in order, normalised in place; None for a form that is not ours.

    Not ours are opaque blocks, nested blocks, axes that are not affine in the loops and
    axes of unknown extent.
    """
    try:
        normalised = _normalize(sch)
        return None if normalised is None else [Block(sch, rv) for rv in normalised[0]]
    except (CannotSchedule, RuntimeError, ValueError):
        return None


def is_naive(func: tirx.PrimFunc) -> bool:
    """Whether a loop nest of more than 64 iterations runs one by one: no loop around or in it is
    parallel, vectorised (by us, or marked `LEFT_TO_LLVM`) or unrolled. Calls of library functions
    and stores of whole vectors do not count as loops."""
    return _has_naive_nest(func.body, 1)


def _has_naive_nest(node: Any, iterations: int) -> bool:
    loops: list[Any] = []

    def stop_at(loop: Any) -> Any:
        loops.append(loop)
        return tvm_ffi.WalkResult.SKIP

    tvm_ffi.structural_walk(node, (tirx.For, stop_at), order="pre")
    if not loops:
        scalar = not _is_library_call(node) and not _stores_vectors(node)
        return iterations > NAIVE_ITERATIONS and scalar
    return any(_loop_is_naive(loop, iterations) for loop in loops)


def _loop_is_naive(loop: Any, iterations: int) -> bool:
    if loop.kind != tirx.ForKind.SERIAL or LEFT_TO_LLVM in loop.annotations:
        return False
    known = isinstance(loop.extent, tirx.IntImm)
    extent = int(loop.extent) if known else NAIVE_ITERATIONS
    return _has_naive_nest(loop.body, iterations * extent)


def _stores_vectors(node: Any) -> bool:
    stores = walk(node, tirx.BufferStore)
    return bool(stores) and all(isinstance(s.indices[-1], tirx.Ramp) for s in stores)


def _is_library_call(node: Any) -> bool:
    """Whether `node` computes nothing itself: no store, only calls."""
    return not walk(node, tirx.BufferStore)
