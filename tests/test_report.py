"""Reports: the table people read, and the JSON artifacts carry."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_pivot.errors import ArtifactError
from tvm_pivot.report import LayerReport, Report, _human, _percent, _shorten

CONV = LayerReport(
    name="layer1.conv",
    op="conv2d",
    shape=(64, 32, 3, 3),
    pattern="8x1 blocks",
    density=0.1,
    block="8x1",
    fill=0.978,
    mode="sparse",
    reason="skips 90.0 % of the operations",
    flops_dense=590_000_000,
    flops_kept=59_000_000,
    kernel="block_sparse_0",
)
STEM = replace(
    CONV,
    name="/stem/a/rather/long/name/of/a/node/Conv_output_0",
    shape=(32, 3, 3, 3),
    pattern="dense",
    density=1.0,
    block="",
    mode="dense",
    reason="no zeros to skip",
    flops_dense=10_000_000,
    flops_kept=10_000_000,
)
REPORT = Report((STEM, CONV), "x86", ("12 dead rows dropped",), 3.21)


TABLE = """\
layer                         op          shape  pattern     density  block  fill  runs          FLOPs kept
-----------------------------------------------------------------------------------------------------------
/stem/a/r..ode/Conv_output_0  conv2d   32x3x3x3  dense       100.0 %      -     -  dense   10.0 M of 10.0 M
layer1.conv                   conv2d  64x32x3x3  8x1 blocks   10.0 %    8x1  98 %  sparse   59.0 M of 590 M

total: 1 of 2 layers sparse, density 14.0 %, FLOPs kept 69.0 M of 600 M (11.5 %)
target: x86, compiled in 3.2 s
dense: no zeros to skip [/stem/a/rather/long/name/of/a/node/Conv_output_0]
note: 12 dead rows dropped"""  # noqa: E501 (as it is printed)


def test_table() -> None:
    assert str(REPORT) == TABLE


def test_table_of_extreme_layers_fits_the_page_and_stays_aligned() -> None:
    wide = replace(
        CONV,
        name="n" * 200,
        op="conv2d_transpose",
        shape=(2048, 2048, 11, 11),
        pattern="unstructured, odd",
        flops_dense=999_949_999_999,
        flops_kept=999_949_999_999,
    )
    lines = str(Report((wide, CONV), "x86")).splitlines()
    table = lines[: lines.index("")]
    assert max(map(len, table)) <= 120
    assert {line.index("  sparse  ") for line in table[2:]} == {table[0].index("  runs")}


def test_long_remarks_are_wrapped_and_indented() -> None:
    note = " ".join(["word"] * 60)
    reasons = [replace(STEM, name=f"layer{i}", reason="too small") for i in range(9)]
    lines = str(Report(tuple(reasons), "x86", (note,))).splitlines()
    assert max(map(len, lines)) <= 120
    assert "dense: too small [layer0, layer1, layer2, layer3 and 5 more]" in lines
    first = next(i for i, line in enumerate(lines) if line.startswith("note: "))
    assert all(line.startswith("      word") for line in lines[first + 1 :])
    assert " ".join(lines[first:]).split() == ["note:", *note.split()]


def test_a_network_without_layers() -> None:
    empty = Report((), "x86")
    assert str(empty) == (
        "no dense or convolution layers\n\n"
        "total: 0 of 0 layers sparse, density 100.0 %, FLOPs kept 0 of 0\n"
        "target: x86, not compiled"
    )
    assert empty.density == 1.0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (9_994, "9.99 K"),
        (9_996, "10.0 K"),
        (99_960, "100 K"),
        (999_499, "999 K"),
        (999_500, "1.00 M"),
        (59_012_345, "59.0 M"),
        (590_000_000, "590 M"),
        (4_090_000_000, "4.09 G"),
        (12_345_678_901_234_567, "12346 T"),
    ],
)
def test_numbers_have_three_digits(count: int, text: str) -> None:
    assert _human(count) == text


def test_percentages_never_round_something_to_nothing() -> None:
    assert [_percent(x) for x in (0, 0.0001, 0.0005, 0.1, 1)] == [
        "0.0 %",
        "<0.1 %",
        "0.1 %",
        "10.0 %",
        "100.0 %",
    ]


@given(st.text(max_size=80), st.integers(5, 40))
def test_shortened_names_keep_both_ends(name: str, width: int) -> None:
    short = _shorten(name, width)
    assert len(short) == min(len(name), width)
    assert name.startswith(short.split("..")[0]) or ".." in name
    assert name[-1:] == short[-1:]


shares = st.floats(0, 1)
layers = st.builds(
    LayerReport,
    name=st.text(),
    op=st.sampled_from(["dense", "conv2d"]),
    shape=st.lists(st.integers(0, 4096), max_size=4).map(tuple),
    pattern=st.text(),
    density=shares,
    block=st.text(),
    fill=shares,
    mode=st.sampled_from(["sparse", "dense"]),
    reason=st.text(),
    flops_dense=st.integers(10**6, 10**15),
    flops_kept=st.integers(0, 10**6),
    kernel=st.text(),
)
reports = st.builds(
    Report,
    st.lists(layers, max_size=4).map(tuple),
    st.text(),
    st.lists(st.text(), max_size=3).map(tuple),
    st.none() | st.floats(0, 1e9),
)


@given(reports)
def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report
    assert Report.from_json(report.to_json(indent=2)) == report
    assert str(report)


def changed(*path: Any, value: Any) -> str:
    """REPORT as JSON with one place replaced, or removed where `value` is `...`."""
    data = json.loads(REPORT.to_json())
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[1, 2", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('"\\ud800"', "expected an object"),
        (b"\xff\xfe{}", "not valid JSON"),
        ("null", "expected an object, got None"),
        ('{"layers": [], "layers": []}', "not valid JSON: an object has the same key twice"),
        (changed("target", value=...), "Report: missing target"),
        (changed("extra", value=1), "Report: unknown extra"),
        (changed("layers", value={}), "layers: expected a list"),
        (changed("layers", 1, value=None), r"layers\[1\]: expected an object, got None"),
        (changed("layers", 0, "op", value=...), r"layers\[0\]: missing op"),
        (changed("layers", 0, "name", value=3), r"layers\[0\].name: expected a string, got 3"),
        (
            changed("layers", 0, "density", value=True),
            "density: expected a finite number, got True",
        ),
        (changed("layers", 0, "density", value="0.1"), "density: expected"),
        (changed("layers", 0, "density", value=1.5), "density must lie between 0 and 1"),
        (changed("layers", 0, "fill", value=-0.1), "fill must lie between 0 and 1"),
        (changed("layers", 0, "fill", value=float("nan")), "NaN is not a number"),
        (changed("layers", 0, "fill", value=10**400), "fill: expected a finite number"),
        (changed("layers", 0, "mode", value="fast"), "mode: expected one of 'sparse', 'dense'"),
        (changed("layers", 0, "mode", value=["sparse"]), "mode: expected one of"),
        (changed("layers", 0, "shape", value=[1, 2.0]), r"shape\[1\]: expected an integer"),
        (changed("layers", 0, "shape", value=[-1]), "shape must not be negative"),
        (changed("layers", 0, "flops_kept", value=10**12), "flops_kept must lie between"),
        (changed("layers", 0, "flops_kept", value=False), "flops_kept: expected an integer"),
        (changed("notes", value="note"), "notes: expected a list"),
        (changed("compile_seconds", value="1 s"), "compile_seconds: expected"),
    ],
)
def test_anything_else_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Report.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.sampled_from(sorted(asdict(CONV))), json_values)
def test_any_value_in_any_field_is_read_exactly_or_refused(field: str, value: Any) -> None:
    text = changed("layers", 0, field, value=value)
    try:
        report = Report.from_json(text)
    except ArtifactError:
        return
    assert json.loads(report.to_json())["layers"][0][field] == value


def test_values_that_make_no_sense_are_refused_when_a_layer_is_made() -> None:
    for wrong in ({"density": 1.01}, {"fill": -0.01}, {"mode": "other"}, {"flops_kept": 10**12}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(CONV, **wrong)
