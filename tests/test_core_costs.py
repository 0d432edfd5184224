"""Which costs a target has, and what strips from beyond level 2 do to the choice of tiles."""

from dataclasses import replace

import pytest

from tvm_pivot.schedules.core_costs import XEON, ZEN, core_costs
from tvm_pivot.schedules.cost import planes_cycles
from tvm_pivot.schedules.problems import Epilogue, PlanesProblem, PlanesTile, RowsProblem
from tvm_pivot.schedules.x86 import choose_planes, choose_rows
from tvm_pivot.targets import PRESETS, PivotTarget

INTEL, CLIENT, AMD = (PRESETS[name] for name in ("sapphire-rapids", "alder-lake", "zen4"))


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
        ("haswell", XEON),
        ("alder-lake", XEON),
        ("cortex-a76", ZEN),
    ],
)
def test_the_maker_decides(name: str, expected: object) -> None:
    assert core_costs(PRESETS[name]) is expected


@pytest.mark.parametrize("target", [INTEL, CLIENT], ids=lambda target: target.name)
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_that_leave_level_2_are_written_in_long_strips(
    target: PivotTarget, residual: bool
) -> None:
    problem = pointwise(256, 64, 56 * 56, residual)
    tile, _ = choose_planes(problem, 205, target)
    assert XEON.strips is not None and strip_bytes(tile) > XEON.strips.ends


@pytest.mark.parametrize("residual", [False, True])
def test_outputs_that_stay_in_level_2_need_no_long_strips(residual: bool) -> None:
    tile, _ = choose_planes(pointwise(64, 64, 28 * 28, residual), 51, INTEL)
    assert XEON.strips is not None and strip_bytes(tile) < XEON.strips.ends


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


def test_whole_planes_stream_faster_than_strips_of_them() -> None:
    problem = pointwise(256, 64, 56 * 56)
    whole, halves = PlanesTile(16, 2, 98, 1, False), PlanesTile(16, 2, 49, 1, False)
    more = planes_cycles(problem, halves, 205, INTEL) - planes_cycles(problem, whole, 205, INTEL)
    assert XEON.strips is not None
    moved = 4 * problem.pixels * (2 * 256 + 64)
    assert more > 0.5 * moved * (1 / XEON.strips.long - 1 / XEON.strips.whole)
    # Each band is a strip of every plane.
    band = replace(problem, width=28 * 56, pitch=28 * 56, image_floats=64 * 28 * 56)
    one = planes_cycles(band, halves, 205, INTEL, 2)
    assert 2 * one > planes_cycles(problem, whole, 205, INTEL)


@pytest.mark.parametrize("panel", [0, 32])
def test_groups_with_and_without_a_panel_read_the_weights_again(
    panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, tile = pointwise(256, 1024, 14 * 14), PlanesTile(16, 2, 1, 1, False)
    tile = replace(tile, panel_pitch=panel)
    with_it = planes_cycles(problem, tile, 1000, INTEL)
    monkeypatch.setattr("tvm_pivot.schedules.core_costs.XEON", replace(XEON, reread=0.0))
    without = planes_cycles(problem, tile, 1000, INTEL)
    assert with_it - without == pytest.approx(XEON.reread * 1000 * (tile.groups(problem) - 1))


@pytest.mark.parametrize(("columns", "intel", "amd"), [(512, 0, 0), (3072, 1, 0), (25088, 1, 1)])
def test_weights_from_level_3_are_fetched_ahead_where_that_is_far(
    columns: int, intel: int, amd: int
) -> None:
    problem = RowsProblem(1, columns, 1024, 64, 16, False, Epilogue())
    ahead = [
        choose_rows(problem, 64 * columns // 10, replace(target, l2_bytes=1 << 20))[0].ahead
        for target in (INTEL, AMD)
    ]
    assert [distance > 0 for distance in ahead] == [bool(intel), bool(amd)]


def test_weights_are_not_read_again_for_each_group_where_that_costs() -> None:
    problem = pointwise(256, 1024, 14 * 14)
    groups = {m: choose_planes(problem, 3277, m)[0].groups(problem) for m in (INTEL, AMD)}
    assert groups[INTEL] == 1 < groups[AMD]
