"""Log files of tuning records: appended to by several processes at once, read whatever happened.

A log is only ever appended to: one write of whole lines, under a lock, forced to disk. A process
that is killed loses at most the records it was writing. Reading never changes a log: damaged lines
are skipped and reported, and `quarantine` moves them out of the way for good.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from ..errors import TuningError
from .records import LINE_START, MAX_LINE, TuningRecord, decode_line, encode

MAX_BYTES = 1 << 28
_MAX_REPORTED = 1000
_FILLING = b" \t\r\n\0"  # what a file system that lost power leaves behind: zeros


@dataclass(frozen=True)
class BadLine:
    """A line that holds no record: its number, from 1, and why it was skipped."""

    number: int
    reason: str


@dataclass(frozen=True)
class TuningLog:
    """What a log holds.

    Attributes:
        path: the file.
        records: every good record, in the file's order, each once.
        bad: the lines that were skipped, the first thousand of them.
        bad_count: how many were skipped.
    """

    path: Path
    records: tuple[TuningRecord, ...]
    bad: tuple[BadLine, ...]
    bad_count: int

    @cached_property
    def fresh(self) -> tuple[TuningRecord, ...]:
        """The records that the installed TVM can be expected to reproduce."""
        return tuple(record for record in self.records if not record.is_stale)

    @cached_property
    def stale(self) -> tuple[TuningRecord, ...]:
        """The records of another release of TVM."""
        return tuple(record for record in self.records if record.is_stale)


def append(path: str | Path, records: Iterable[TuningRecord]) -> None:
    """Add records to a log, which is made if there is none. When it returns they are on disk.

    Raises:
        TuningError: the file cannot be written (it then ends as it did before), or a record cannot
            be written as JSON (then none is).
    """
    data = b"".join(map(encode, records))
    if not data:
        return
    try:
        with _locked(Path(path), os.O_CREAT) as fd:
            _add(fd, data)
    except OSError as e:
        raise TuningError(f"cannot write {path}: {e.strerror or e}") from e


def read(path: str | Path) -> TuningLog:
    """Every good record of a log. Lines that hold none cost one warning for all of them.

    Raises:
        TuningError: there is no such file, it cannot be read, or it is larger than `MAX_BYTES`.
    """
    log = _read(Path(path))
    if log.bad_count:
        first = log.bad[0]
        warnings.warn(
            f"{path}: skipped {log.bad_count} of its lines, the first is line {first.number} "
            f"({first.reason}); the other records are used",
            stacklevel=2,
        )
    return log


def quarantine(path: str | Path) -> TuningLog:
    """Move damaged lines to ``<log>.quarantine``, so that they are reported once and not for ever.

    The good lines stay as they are. Whatever moment it is killed at, the log is the old one or the
    new one, and no line is lost. A line longer than `MAX_LINE` is moved without its end.

    Returns:
        What the log held before.

    Raises:
        TuningError: the log cannot be read, or one of the files cannot be written.
    """
    path = Path(path)
    try:
        with _locked(path):  # there must be one
            log = _read(path)
            if log.bad_count:
                _split(path)
    except OSError as e:
        raise TuningError(f"cannot write {path}: {e.strerror or e}") from e
    return log


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[int]:
    """The log, open for appending, while no other process writes to it."""
    while True:
        new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            # `quarantine` may have put a new file in its place while we waited.
            if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
                if new:
                    _sync_folder(path)
                yield fd
                return
        finally:
            os.close(fd)  # unlocks it too


def _add(fd: int, data: bytes) -> None:
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":  # torn: start a line of our own
        data = b"\n" + data
    try:
        if os.write(fd, data) != len(data):
            raise OSError("the disk is full")
        os.fsync(fd)
    except OSError:
        os.ftruncate(fd, size)
        raise


def _sync_folder(path: Path) -> None:
    """Make a new file's name as lasting as its content."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> TuningLog:
    found: dict[str, TuningRecord] = {}
    bad: list[BadLine] = []
    count = 0
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise TuningError(f"{path} is larger than {MAX_BYTES >> 20} MB: split it")
            for number, line in enumerate(_lines(file), 1):
                records, reason = _decode(line)
                for checksum, record in records:
                    found.setdefault(checksum, record)
                if reason:
                    count += 1
                    if len(bad) < _MAX_REPORTED:
                        bad.append(BadLine(number, reason))
    except OSError as e:
        raise TuningError(f"cannot read {path}: {e.strerror or e}") from e
    return TuningLog(path, tuple(found.values()), tuple(bad), count)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines; of one that is too long, as much as shows that it is."""
    while line := file.readline(MAX_LINE + 1):
        yield line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE + 1)


def _decode(line: bytes) -> tuple[list[tuple[str, TuningRecord]], str]:
    """The records of one line, and why something of it was skipped, or ''."""
    text = line.strip(_FILLING)
    if not text:
        return [], "" if b"\0" not in line else "zeros: the machine lost power"
    if len(line) > MAX_LINE:
        return [], f"longer than {MAX_LINE} bytes"
    try:
        return [decode_line(text)], ""
    except ValueError as e:
        reason = str(e)
    # A foreign writer may have continued a torn line: what starts later in it may be whole.
    pieces = [LINE_START + piece for piece in text.split(LINE_START)[1:]]
    good = []
    for piece in pieces:
        try:
            good.append(decode_line(piece.strip(_FILLING)))
        except ValueError:
            continue
    whole = len(good) == len(pieces) and text.startswith(LINE_START) and bool(good)
    return good, "" if whole else reason


def _split(path: Path) -> None:
    """Write the bad lines to the quarantine first, then put a log without them in place."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with path.open("rb") as old, os.fdopen(fd, "wb") as new:
            bad = bytearray()
            for line in _lines(old):
                records, reason = _decode(line)
                if reason:
                    bad += line.rstrip(b"\n") + b"\n"
                    new.writelines(encode(record) for _, record in records)
                else:
                    new.write(line.rstrip(b"\n") + b"\n")
            with _locked(path.with_name(path.name + ".quarantine"), os.O_CREAT) as beside:
                _add(beside, bytes(bad))
            os.fchmod(new.fileno(), path.stat().st_mode & 0o777)
            new.flush()
            os.fsync(new.fileno())
        os.replace(name, path)
        _sync_folder(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
