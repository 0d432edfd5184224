"""What x86 cores differ in that `cost` has to know: cycles of single steps, fitted to measurements.

Each set was fitted to hundreds of candidates of layers of many shapes, measured on one machine with
AVX-512.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..targets import PivotTarget


@dataclass(frozen=True)
class Strips:
    """What a core gets from beyond level 2, in bytes per cycle.

    Caches fetch ahead where memory is walked in one direction for long enough. A group of pixels
    reads and writes a strip of each plane; between two strips lies the rest of the plane.

    Attributes:
        short, long, whole: of strips up to `begins` bytes, from `ends` bytes on, and of whole
            planes, one behind the other.
        begins, ends: strips that are fetched ahead in part lie between.
        read: with one row per block, of inputs as they lie in memory, in strips of any length.
        resident: how many level-2 caches a layer's inputs and outputs may fill and still be there.
        spread: with so much more they all come from beyond.
    """

    short: float
    long: float
    whole: float
    begins: float
    ends: float
    read: float
    resident: float
    spread: float


@dataclass(frozen=True)
class CoreCosts:
    """Cycles of one core. The defaults are a Zen 5's.

    Attributes:
        broadcast: a weight that is loaded and broadcast to a vector.
        near, far: a vector of the input from level 1, and from level 2.
        straddling_near, straddling_far: one that is not aligned from level 1, and as a factor from
            level 2.
        aligned_load, straddling_load, missing_load: the same with K tiles or a panel, and what
            level 1 does not serve there.
        store: a vector that is stored.
        squeeze: a vector picked from a strip, with its epilogue and a store that may be partial.
        rest, row_rest: an accumulator that rests between two K tiles, and with one row per block.
        visit: a row block's loop in one K tile.
        copy: a vector of a panel.
        pack: a vector of the padded planes that all but a depthwise plan have to be given first.
        inputs_ahead: how many entries ahead inputs that level 1 does not hold are fetched; 0: none
            are.
        far_weights: how many level-2 caches the weights of the rows form must fill for prefetches
            to pay.
        stream_ahead: bytes after which the rows form prefetches its weights.
        reread: an entry's weights for each group of register tiles but the first.
        strips: None where memory is fast enough that they do not matter.
        depthwise: what depthwise layers take, by what is predicted for them.
        far_lines: lines that another core has written last come so slowly that each core had better
            compute a stretch of every image (see `split_images`).
    """

    broadcast: float = 0.34
    near: float = 0.1
    far: float = 1.4
    straddling_near: float = 0.9
    straddling_far: float = 1.25
    aligned_load: float = 0.75
    straddling_load: float = 1.25
    missing_load: float = 1.6
    store: float = 1.1
    squeeze: float = 4.0
    rest: float = 1.27
    row_rest: float = 1.47
    visit: float = 4.8
    copy: float = 2.15
    pack: float = 4.5
    inputs_ahead: int = 0
    # A prefetch from level 3 costs a twelfth, one from memory saves a third.
    far_weights: float = 4.0
    stream_ahead: int = 8 << 10
    reread: float = 0.0
    strips: Strips | None = None
    depthwise: float = 1.0
    far_lines: bool = False


# Entries ahead that suffice for level 2.
INPUTS_AHEAD = 8

ZEN = CoreCosts()
# Of an Intel Xeon with 2 MB of level 2, whose level 3 is far away. The fit says 0.96 of a broadcast
# and 1.53 of a load that misses; with these, whole networks of dense layers are faster. Of `far` it
# says 0.5 where inputs are prefetched; then blocks of four rows are chosen, which take longer. With
# AVX2 the same set does as well there as two that were fitted to that.
XEON = CoreCosts(
    broadcast=0.6,
    near=0.1,
    far=1.0,
    straddling_near=1.18,
    straddling_far=1.32,
    aligned_load=0.91,
    straddling_load=1.58,
    missing_load=1.3,
    store=1.48,
    squeeze=2.2,
    rest=2.1,
    visit=6.2,
    copy=2.1,
    pack=3.4,
    inputs_ahead=INPUTS_AHEAD,
    far_weights=0.42,  # an LSTM of 512 units has less, which its steps find in level 2
    stream_ahead=3 << 10,  # with 8 KB a tenth slower: more are under way than it has room for
    reread=0.7,
    strips=Strips(4.7, 14.7, 20.0, 580.0, 910.0, 49.0, 0.89, 0.34),
    depthwise=1.5,
    far_lines=True,
)
# LLVM's names of AMD's cores begin so.
AMD = ("znver", "bdver", "btver", "amdfam")


def core_costs(target: PivotTarget) -> CoreCosts:
    """The set for a target, by the maker of its CPU."""
    intel = target.family == "x86" and not str(target.tvm.get("mcpu", "")).startswith(AMD)
    return XEON if intel else ZEN
