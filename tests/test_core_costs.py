"""Which costs a target has, and what strips from beyond level 2 do to the choice of tiles."""

from dataclasses import replace

import pytest

from tvm_pivot.schedules.core_costs import XEON, ZEN, core_costs
from tvm_pivot.schedules.cost import planes_cycles
from tvm_pivot.schedules.problems import Epilogue, PlanesProblem, PlanesTile
from tvm_pivot.schedules.x86 import choose_planes
from tvm_pivot.targets import PRESETS

INTEL, AMD = PRESETS["sapphire-rapids"], PRESETS["zen4"]


def pointwise(rows: int, channels: int, pixels: int, residual: bool = False) -> PlanesProblem:
    """A 1x1 convolution with blocks of eight rows."""
    return PlanesProblem(
        batch=1,
        rows=rows,
        columns=channels,
        height=1,
        width=pixels,
        pitch=pixels,
        image_floats=channels * pixels,
        row_blocks=rows // 8,
        block_rows=8,
        epilogue=Epilogue(residual=residual),
    )


def strip_bytes(tile: PlanesTile) -> int:
    return 4 * tile.tiles * tile.width


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sapphire-rapids", XEON),
        ("skylake-avx512", XEON),
        ("zen4", ZEN),
        ("zen2", ZEN),
        ("haswell", ZEN),  # fitted to vectors of 16 only
        ("cortex-a76", ZEN),
    ],
)
def test_the_maker_and_the_vectors_decide(name: str, expected: object) -> None:
    assert core_costs(PRESETS[name]) is expected


@pytest.mark.parametrize("residual", [False, True])
def test_outputs_that_leave_level_2_are_written_in_long_strips(residual: bool) -> None:
    problem = pointwise(256, 64, 56 * 56, residual)
    tile, _ = choose_planes(problem, 205, INTEL)
    assert XEON.strips is not None and strip_bytes(tile) > XEON.strips.ends
    small = pointwise(64, 64, 28 * 28, residual)
    tile, _ = choose_planes(small, 51, INTEL)
    assert strip_bytes(tile) < XEON.strips.ends


def test_strips_cost_what_they_move() -> None:
    problem = pointwise(256, 64, 56 * 56)
    short, long = PlanesTile(16, 3, 1, 1, False), PlanesTile(16, 3, 8, 1, False)
    more = planes_cycles(problem, short, 205, INTEL) - planes_cycles(problem, long, 205, INTEL)
    assert XEON.strips is not None
    moved = 4 * problem.pixels * (2 * 256 + 64)  # read, and written back
    assert more > 0.5 * moved * (1 / XEON.strips.short - 1 / XEON.strips.long)
    # A band of it is as far from level 2 as the whole.
    one = replace(problem, width=56, pitch=56, image_floats=64 * 56)
    near, far = (planes_cycles(one, short, 205, INTEL, bands) for bands in (1, 56))
    assert far > near
    assert planes_cycles(one, short, 205, AMD) == planes_cycles(one, short, 205, AMD, 56)


def test_weights_are_not_read_again_for_each_group_where_that_costs() -> None:
    problem = pointwise(256, 1024, 14 * 14)
    groups = {m: choose_planes(problem, 3277, m)[0].groups(problem) for m in (INTEL, AMD)}
    assert groups[INTEL] == 1 < groups[AMD]
