"""Names of functions by their place in an ELF file."""

from __future__ import annotations

import struct
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path

_LOAD, _SYMTAB, _DYNSYM, _FUNC, _GNU_UNIQUE_OR_INDIRECT = 1, 2, 11, 2, 10


class Symbols:
    """The functions of a 64-bit little-endian ELF file; none where it is no such file."""

    def __init__(self, path: Path) -> None:
        """Read them; what the file does not hold is left out."""
        data = path.read_bytes()
        self._found: list[tuple[int, int, str]] = []
        if data[:6] != b"\x7fELF\x02\x01":
            return
        segments = _segments(data)
        for address, size, name in _functions(data):
            for start, end, offset in segments:
                if start <= address < end:
                    self._found.append((address - start + offset, size, name))
        self._found.sort()

    def name(self, offset: int) -> str | None:
        """The function that the instruction at `offset` in the file belongs to, if one is named."""
        index = bisect_right(self._found, offset, key=lambda found: found[0]) - 1
        if index < 0:
            return None
        start, size, name = self._found[index]
        # Functions written in assembly often have no size: they reach to the next one.
        return name if not size or offset < start + size else None


@lru_cache(maxsize=64)
def symbols_of(path: str) -> Symbols:
    """The symbols of a file, read once."""
    return Symbols(Path(path))


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """Address, end and offset in the file of what is loaded."""
    (at,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    found = []
    for i in range(count):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, at + i * size)
        if kind == _LOAD:
            found.append((address, address + length, offset))
    return found


def _functions(data: bytes) -> list[tuple[int, int, str]]:
    """Address, size and name of each function, by the full table where it was not stripped."""
    (at,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + i * size) for i in range(count)]
    tables = [s for s in sections if s[1] == _SYMTAB] or [s for s in sections if s[1] == _DYNSYM]
    found = []
    for _, _, _, _, offset, length, link, _, _, entry in tables:
        names = sections[link][4]
        for place in range(offset, offset + length, entry):
            name, info, _, section, value, extent = struct.unpack_from("<IBBHQQ", data, place)
            if info & 15 in (_FUNC, _GNU_UNIQUE_OR_INDIRECT) and section:
                end = data.index(b"\0", names + name)
                found.append((value, extent, data[names + name : end].decode(errors="replace")))
    return found
