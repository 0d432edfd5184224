"""Tuning logs that several processes write at once, or that are killed while they write."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings
from pathlib import Path

from tuning_records import numbers, record

from tvm_pivot.tuning.log_files import append, read

WRITER = """
import sys
sys.path[:0] = {path!r}
from tuning_records import record
from tvm_pivot.tuning.log_files import append
for i in range(int(sys.argv[2]), int(sys.argv[3])):
    append(sys.argv[1], [record(i)])
"""


def writer(log: Path, first: int, last: int) -> subprocess.Popen[bytes]:
    """A process that appends records."""
    code = WRITER.format(path=[str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, str(log), str(first), str(last)]
    return subprocess.Popen(command)


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    writers = [writer(log, start, start + 150) for start in (0, 1000, 2000)]
    for process in writers:
        assert process.wait(timeout=120) == 0
    whole = read(log)
    assert not whole.bad
    found = numbers(whole.records)
    for start in (0, 1000, 2000):  # each in its own order
        assert [n for n in found if start <= n < start + 1000] == list(range(start, start + 150))


FORKS = """
import os, random, signal, sys, time
sys.path[:0] = {path!r}
from tuning_records import record
from tvm_pivot.tuning.log_files import append
rng = random.Random(0)
for turn in range(200):
    reader, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        for i in range(1000):
            append(sys.argv[1], [record(turn * 1000 + i)])
            os.write(sink, b".")
    os.close(sink)
    os.read(reader, 1)  # it is at work
    time.sleep(rng.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done = 1
    while got := os.read(reader, 4096):
        done += len(got)
    os.close(reader)
    print(done, flush=True)
"""


def test_200_kills_lose_at_most_the_record_in_flight(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    code = FORKS.format(path=[str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(log)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    counts = [int(word) for word in done.stdout.split()]
    assert len(counts) == 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torn lines are allowed here
        found = numbers(read(log).records)
    for turn, count in enumerate(counts):
        mine = [n % 1000 for n in found if n // 1000 == turn]
        assert mine == list(range(len(mine)))
        assert count <= len(mine) <= count + 1  # one may be written and not yet counted


def test_an_append_that_waited_for_a_quarantine_is_not_lost(tmp_path: Path) -> None:
    """It holds a lock on the old file then, which nobody reads any more."""
    log = tmp_path / "log.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", _TAKES_TURNS.format(path=sys.path), str(log)],
        stdout=subprocess.PIPE,
    ) as damager:
        assert damager.stdout is not None and damager.stdout.readline()
        for i in range(60):
            append(log, [record(i)])
            append(log, [record(1000 + i)])
        damager.send_signal(signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = set(numbers(read(log).records))
    assert found == {*range(60), *range(1000, 1060)}


_TAKES_TURNS = """
import os, sys
sys.path[:0] = {path!r}
from tvm_pivot.errors import TuningError
from tvm_pivot.tuning.log_files import quarantine
print("ready", flush=True)
while True:
    try:
        with open(sys.argv[1], "ab") as file:
            file.write(b"torn\\n")
        quarantine(sys.argv[1])
    except TuningError:
        pass
"""
