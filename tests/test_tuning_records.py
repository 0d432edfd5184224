"""Tuning records: what a line holds, and that a log survives whatever happens to it."""

from __future__ import annotations

import json
import math
import os
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning_records import TARGET, numbers, record, task

from tvm_pivot.errors import TuningError
from tvm_pivot.targets import PRESETS
from tvm_pivot.tuning import log_files
from tvm_pivot.tuning.log_files import append, quarantine, read
from tvm_pivot.tuning.records import (
    LINE_START,
    MAX_LINE,
    TargetKey,
    TaskKey,
    TuningRecord,
    decode_line,
    encode,
)

LINES = [encode(record(i)) for i in range(6)]


def quiet(path: Path) -> log_files.TuningLog:
    """What `read` returns, and that it does not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(path)


def noisy(path: Path) -> log_files.TuningLog:
    """What `read` returns, and that it warns once, naming the file."""
    with pytest.warns() as caught:
        log = read(path)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    return log


finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | finite,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(
    st.dictionaries(st.text(), json_values, max_size=4),
    st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=5),
    st.integers(0, 1 << 50),
)
def test_a_record_survives_its_line(decisions: Any, seconds: list[float], entries: int) -> None:
    made = record(decisions=decisions, seconds=tuple(seconds), key=task(entries))
    line = encode(made)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert line.startswith(LINE_START)
    assert decode_line(line)[1] == made


def test_a_line_says_everything() -> None:
    content = json.loads(LINES[0])
    assert content["format"] == 1
    assert content["task"]["problem"]["columns"] == 576
    assert content["task"]["entries"] == 460
    assert content["task"]["target"]["mcpu"] == "skylake-avx512"
    assert content["task"]["target"]["lanes"] == 16
    assert set(content) >= {"decisions", "seconds", "tvm", "package", "date", "checksum"}


def test_a_line_may_be_formatted_anew() -> None:
    spaced = json.dumps(dict(reversed(json.loads(LINES[0]).items())), indent=1).replace("\n", " ")
    assert decode_line(spaced.encode())[1] == record(0)


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_goes_unnoticed(bit: int) -> None:
    for position in range(len(LINES[0]) - 1):
        damaged = bytearray(LINES[0])
        damaged[position] ^= 1 << bit
        if damaged[position] == ord("\n"):
            continue
        try:
            found = decode_line(bytes(damaged))[1]
        except ValueError:
            continue
        assert found == record(0), position  # as 1e-3 and 1E-3


def test_what_a_record_cannot_hold() -> None:
    for bad in ((), (0.0,), (-1.0,), (math.nan,), (math.inf,)):
        with pytest.raises(ValueError, match="seconds"):
            record(seconds=bad)
    with pytest.raises(TuningError, match="JSON"):
        encode(record(decisions={"x": math.nan}))
    with pytest.raises(TuningError, match="JSON"):
        encode(record(decisions={"x": object()}))
    with pytest.raises(TuningError, match="limit"):
        encode(record(decisions={"x": "y" * MAX_LINE}))
    with pytest.raises(ValueError, match="entries"):
        task(-1)
    with pytest.raises(ValueError, match=r"problem\.rows"):
        task(rows=[1])
    with pytest.raises(ValueError, match="lanes"):
        replace(TARGET, lanes=0)


def test_keys_of_problems_and_targets() -> None:
    from tvm_pivot.schedules.problems import Epilogue, RowsProblem

    problem = RowsProblem(1, 512, 1000, 125, 8, False, Epilogue(low=0.0))
    target = replace(PRESETS["zen4"], tvm={**PRESETS["zen4"].tvm, "mattr": ["-avx512f"]}, cores=2)
    key = TaskKey.of("rows", problem, 6400, target)
    assert key.density == pytest.approx(6400 / (125 * 512))
    assert key.problem["epilogue"] == {"residual": False, "low": 0.0, "high": None}
    assert key.target == TargetKey("my computer", "x86", "znver4", ("-avx512f",), 16, 2)
    assert key == decode_line(encode(record(key=key)))[1].task
    assert len({key, TaskKey.of("rows", problem, 6400, target)}) == 1
    assert replace(key, problem={}).density is None


def test_append_and_read(tmp_path: Path) -> None:
    log = tmp_path / "mine.jsonl"
    append(log, [record(0), record(1)])
    append(log, [])
    append(log, [record(2)])
    assert log.read_bytes() == b"".join(LINES[:3])
    assert quiet(log).records == (record(0), record(1), record(2))
    assert quiet(log).fresh == quiet(log).records
    bad = record(3, decisions={"x": object()})
    with pytest.raises(TuningError):
        append(log, [record(4), bad])
    assert log.read_bytes() == b"".join(LINES[:3])


def test_errors_name_the_file(tmp_path: Path) -> None:
    for action in (read, quarantine):
        with pytest.raises(TuningError, match=r"none\.jsonl.*No such file"):
            action(tmp_path / "none.jsonl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TuningError, match="directory"):
        read(tmp_path)
    with pytest.raises(TuningError, match="cannot write"):
        append(tmp_path / "no" / "where.jsonl", [record()])


def test_a_full_disk_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    append(log, [record(0)])
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(TuningError, match="full"):
        append(log, [record(1)])
    monkeypatch.undo()
    append(log, [record(2)])
    assert numbers(quiet(log).records) == [0, 2]


FOREIGN = {
    "blank": (b"\n", None),
    "blanks": (b"  \t \r\n\n\n", None),
    "null": (b"null\n", "not a tuning record"),
    "empty object": (b"{}\n", "not a tuning record"),
    "list": (b"[]\n", "not a tuning record"),
    "number": (b"1e999\n", "not a tuning record"),
    "deep": (b"[" * 100_000 + b"\n", "not valid JSON"),
    "long number": (b'{"format": ' + b"9" * 10_000 + b"}\n", "not valid JSON"),
    "TVM's own record": (b'[0, [[[], []], [0.1], {"kind": "llvm"}, []]]\n', "not a tuning record"),
    "text": (b"Killed\n", "not valid JSON"),
    "bytes": (bytes(range(128, 256)) + b"\n", "not valid JSON"),
    "zeros": (b"\0" * 4096 + b"\n", "zeros"),
    "huge": (b"x" * (3 * MAX_LINE + 7) + b"\n", "longer than"),
    "huge object": (b'{"format": 1, "x": "' + b"x" * MAX_LINE + b'"}\n', "longer than"),
    "torn": (LINES[3][:100] + b"\n", "not valid JSON"),
    "changed": (LINES[3].replace(b"0.001", b"0.002", 1), "checksum"),
    "NaN": (LINES[3].replace(b"0.001", b"NaN", 1), "not valid JSON"),
    "infinite": (LINES[3].replace(b"0.001", b"1e999", 1), "not a tuning record"),
    "key twice": (LINES[3].replace(b"{", b'{"format":1,', 1), "twice"),
    "later format": (LINES[3].replace(b'"format":1', b'"format":2'), "format 2; this version"),
    "odd format": (LINES[3].replace(b'"format":1', b'"format":true'), "format True"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("place", ["first", "middle", "last", "last, no line end"])
def test_a_foreign_line_costs_nothing_else(name: str, place: str, tmp_path: Path) -> None:
    foreign, reason = FOREIGN[name]
    lines = LINES[:2]
    at = {"first": 0, "middle": 1}.get(place, 2)
    lines.insert(at, foreign.rstrip(b"\n") if "no line end" in place else foreign)
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(lines))
    found = noisy(log) if reason else quiet(log)
    assert numbers(found.records) == [0, 1]
    assert [(line.number, reason in line.reason) for line in found.bad] == (
        [(at + 1, True)] if reason else []
    )
    append(log, [record(5)])  # must not continue the foreign line
    again = noisy(log) if reason else quiet(log)
    assert numbers(again.records) == [0, 1, 5]


def test_valid_checksums_do_not_make_a_record(tmp_path: Path) -> None:
    """Fields of the wrong type in a line somebody made on purpose."""
    from tvm_pivot.tuning import records

    log = tmp_path / "log.jsonl"
    for path, value in (
        (("seconds",), []),
        (("seconds",), ["fast"]),
        (("decisions",), None),
        (("task", "entries"), 1 << 60),
        (("task", "target", "lanes"), True),
        (("task", "problem"), {"rows": [[]]}),
        (("extra",), 1),
    ):
        content = json.loads(LINES[0])
        content.pop("checksum")
        inner = content
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        content["checksum"] = records._checksum(content)
        log.write_text(json.dumps(content) + "\n")
        found = noisy(log)
        assert not found.records
        assert path[-1] in found.bad[0].reason or "unknown" in found.bad[0].reason


def test_glued_lines_are_taken_apart(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(LINES[0][:-1] + LINES[1] + LINES[2][:77] + LINES[3] + b"\0\0\0" + LINES[4])
    found = noisy(log)
    assert numbers(found.records) == [0, 1, 3, 4]
    assert [line.number for line in found.bad] == [2]


def test_order_and_copies_do_not_matter(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(LINES[2] + LINES[0] + LINES[2] + LINES[1] + LINES[0][:-1])
    assert numbers(quiet(log).records) == [2, 0, 1]


def test_records_of_another_tvm_are_kept_apart(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    current = record(0).tvm.split(".")
    patch = ".".join([*current[:2], "99"])
    append(log, [record(0), record(1, tvm="0.26.0"), record(2, tvm=patch), record(3, tvm="")])
    found = quiet(log)
    assert numbers(found.records) == [0, 1, 2, 3]
    assert numbers(found.fresh) == [0, 2]
    assert numbers(found.stale) == [1, 3]


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"x\n" * 3000 + LINES[0])
    found = noisy(log)
    assert (len(found.bad), found.bad_count, len(found.records)) == (1000, 3000, 1)
    monkeypatch.setattr(log_files, "MAX_BYTES", 5000)
    with pytest.raises(TuningError, match="split it"):
        read(log)


def test_quarantine_moves_what_is_damaged(tmp_path: Path) -> None:
    log, beside = tmp_path / "log.jsonl", tmp_path / "log.jsonl.quarantine"
    log.write_bytes(LINES[0] + b"{}\n" + LINES[1] + LINES[2][:50] + LINES[3] + b"\0\0")
    log.chmod(0o640)
    before = quarantine(log)
    assert numbers(before.records) == [0, 1, 3]
    assert log.read_bytes() == LINES[0] + LINES[1] + LINES[3]
    assert log.stat().st_mode & 0o777 == 0o640
    assert beside.read_bytes() == b"{}\n" + LINES[2][:50] + LINES[3] + b"\0\0\n"
    assert quiet(log).records == before.records
    inode = log.stat().st_ino
    assert not quarantine(log).bad
    assert log.stat().st_ino == inode
    with log.open("ab") as file:
        file.write(b"again")
    quarantine(log)
    assert beside.read_bytes().endswith(b"\0\0\nagain\n")
    assert {p.name for p in tmp_path.iterdir()} == {log.name, beside.name}


def test_a_cut_anywhere_loses_one_record(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    whole = b"".join(LINES[:3])
    for length in range(len(LINES[0]) + len(LINES[1]), len(whole) - 1, 7):
        for tail in (b"", b"\0" * 512):
            log.write_bytes(whole[:length] + tail)
            append(log, [record(4)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert numbers(read(log).records) == [0, 1, 4]


def test_random_damage_never_raises(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rng = random.Random(0)
    whole = b"".join(LINES)
    known: set[TuningRecord] = {record(i) for i in range(6)}
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        log.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(log)
        assert set(found.records) <= known
        assert len(found.records) >= 1
