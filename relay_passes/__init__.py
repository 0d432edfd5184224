"""The passes of the compiler, in the order they run: `PHASES` is the table of contents.

Each pass is a pure function of an IRModule in a file of its own, named after what it does. One is
not in the list: `bind_memory` comes among TVM's passes, which lower what these leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tvm import relax, tirx
from tvm.ir import IRModule

from ..report import LayerReport, Moves
from ..targets import PivotTarget
from .canonicalize import canonicalize
from .choose_kernels import Tuned, choose_kernels
from .count_moves import count_moves
from .detect import PIVOT_SECONDS, detect
from .drop_dead import DropReport, drop_dead
from .fuse_permutations import fuse_permutations
from .graph import MAIN, is_straight_line
from .layers import Layer, PlannedLayer, find_layers
from .legalize_pooling import legalize_max_pool2d
from .legalize_softmax import legalize_softmax
from .lower_cuda import lower_cuda
from .lower_layers import lower_layers
from .report_layers import report_layers
from .schedule_functions import BY_RECORD, RULE, schedule_functions
from .store_half import store_half
from .true_extremes import true_extremes
from .write_in_place import write_in_place

__all__ = ["PHASES", "PIVOT_SECONDS", "Compilation", "Phase"]

BRANCHES = (
    "the network branches, or sizes in it depend on its inputs: its layers are not looked at, and "
    "TVM compiles it as it is"
)


@dataclass(frozen=True)
class Compilation:
    """A module on its way through the phases, and what is known about it.

    Attributes:
        mod: the module.
        target: what it is compiled for.
        sparse: whether zeros are skipped.
        pivot_seconds: for the general search for orders of rows.
        originals: the dense and conv2d layers as the user gave them, by name.
        planned: each of them that is left, with its plan, once detected.
        reports: what the user is told about each of them.
        notes: what the user is told about the network.
        model_moves, compiled_moves: operators that only move elements, before and after.
        tuned: what is known from tuning.
    """

    mod: IRModule
    target: PivotTarget
    sparse: bool = True
    pivot_seconds: float = PIVOT_SECONDS
    originals: Mapping[str, Layer] = field(default_factory=dict)
    planned: Sequence[PlannedLayer] = ()
    reports: Sequence[LayerReport] = ()
    notes: tuple[str, ...] = ()
    model_moves: Moves | None = None
    compiled_moves: Moves | None = None
    tuned: Tuned | None = None


@dataclass(frozen=True)
class Phase:
    """One phase: its name, what it does, and whether `inspect` needs it too."""

    name: str
    run: Callable[[Compilation], Compilation]
    analysis: bool = False


def _canonicalize(state: Compilation) -> Compilation:
    mod = canonicalize(state.mod)
    originals = {layer.name: layer for layer in find_layers(mod)}
    notes = state.notes if is_straight_line(mod[MAIN]) else (*state.notes, BRANCHES)
    moves = count_moves(state.mod)
    return replace(state, mod=mod, originals=originals, model_moves=moves, notes=notes)


def _drop_dead(state: Compilation) -> Compilation:
    if not state.sparse:
        return state
    mod, dropped = drop_dead(state.mod)
    return replace(state, mod=mod, notes=(*state.notes, *_dropped_notes(dropped)))


def _dropped_notes(dropped: DropReport) -> list[str]:
    if not dropped.changed:
        return []
    before, after = dropped.weights
    most = sorted(dropped.changed, key=lambda d: d.weights[1] - d.weights[0])[:4]
    shown = ", ".join(
        f"{d.name} {d.rows[0]}x{d.columns[0]} -> {d.rows[1]}x{d.columns[1]}" for d in most
    )
    return [
        f"dead rows and columns dropped in {len(dropped.changed)} layers: {before:,} -> {after:,} "
        f"weights (output x input channels, the most: {shown})"
    ]


def _detect(state: Compilation) -> Compilation:
    planned = detect(
        state.mod, state.target, sparse=state.sparse, pivot_seconds=state.pivot_seconds
    )
    return replace(state, planned=planned)


def _fuse_permutations(state: Compilation) -> Compilation:
    mod, planned = fuse_permutations(state.mod, state.planned, state.target)
    return replace(state, mod=mod, planned=planned)


def _choose_kernels(state: Compilation) -> Compilation:
    planned = state.planned
    if planned:
        planned = choose_kernels(state.mod, planned, state.target, state.tuned)
    return replace(state, planned=planned, reports=report_layers(state.originals, planned))


def _lower(state: Compilation) -> Compilation:
    if not is_straight_line(state.mod[MAIN]):
        return state
    lower = lower_cuda if state.target.family == "cuda" else lower_layers
    mod, kernels = lower(state.mod, state.planned, state.target)
    if state.target.storage != "float32":
        mod = store_half(mod, state.target.storage)
    reports = [replace(r, kernel=kernels.get(r.name, "")) for r in state.reports]
    order = {name: i for i, name in enumerate(kernels)}  # the one in which they run
    reports.sort(key=lambda r: order.get(r.name, len(order)))
    return replace(state, mod=mod, reports=reports, compiled_moves=count_moves(mod))


def _fuse(state: Compilation) -> Compilation:
    own = {
        "relax.nn.max_pool2d": legalize_max_pool2d(state.target),
        "relax.nn.softmax": legalize_softmax,
    }
    passes = [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps({} if state.target.family == "cuda" else own),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    mod = state.mod
    with state.target.to_tvm():  # sorts and scans are lowered for the target at hand
        for step in passes:
            mod = step(mod)
    return replace(state, mod=mod)


def _schedule(state: Compilation) -> Compilation:
    # The GPU rules know reductions across threads by TVM's own identities.
    mod = state.mod if state.target.family == "cuda" else true_extremes(state.mod)
    mod = schedule_functions(mod, state.target, tuned=state.tuned)
    names = sorted(
        name.name_hint
        for name, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc) and func.attrs.get(RULE) == BY_RECORD
    )
    notes = [f"operators scheduled by tuning records: {', '.join(names)}"] if names else []
    return replace(state, mod=mod, notes=(*state.notes, *notes))


def _write_in_place(state: Compilation) -> Compilation:
    return replace(state, mod=write_in_place(state.mod))


PHASES: tuple[Phase, ...] = (
    Phase("canonicalize", _canonicalize, analysis=True),
    Phase("drop_dead", _drop_dead, analysis=True),
    Phase("detect", _detect, analysis=True),
    Phase("fuse_permutations", _fuse_permutations, analysis=True),
    Phase("choose_kernels", _choose_kernels, analysis=True),
    Phase("lower_layers", _lower),
    Phase("fuse", _fuse),
    Phase("schedule_functions", _schedule),
    Phase("write_in_place", _write_in_place),
)
