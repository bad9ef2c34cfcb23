"""A reader of tar archives as a stream: headers are kept as bytes, bodies are skipped or copied.

Python's `tarfile` takes a garbled header in the middle for the archive's end, and keeps every member in
memory; here the first is an error and the second does not happen.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
END = bytes(2 * BLOCK)
_ZERO = bytes(BLOCK)
_COPY = 1 << 20
_MOST_HEADER = 1 << 20
_FILES = (b"0", b"\0", b"7")


class TarError(Exception):
    """The archive is cut or garbled."""


@dataclass(slots=True)
class Member:
    """One regular file of the archive. `header` is every header block that names it."""

    name: str
    size: int
    header: bytes
    mode: int
    mtime: int


class TarReader:
    """Members in order; read each body (or not) before going on to the next.

    `length` is the archive's size where it is known, so that a body that is cut off is noticed even
    when it is skipped by seeking.
    """

    def __init__(self, stream: IO[bytes], length: int | None = None) -> None:
        self._stream = stream
        self._length = length
        self._at = 0  # where the next byte is read
        self._next = 0  # where the next header begins
        self._body = 0  # where the present member's body ends

    def __iter__(self) -> Iterator[Member]:
        header = b""
        long_name: str | None = None
        long_size: int | None = None
        while True:
            block = self._header()
            if block is None:
                if header:
                    raise TarError("it ends inside a header")
                return
            header += block
            kind = block[156:157]
            size = _number(block[124:136]) if long_size is None or kind in b"xgLK" else long_size
            self._next = self._at + -(-size // BLOCK) * BLOCK
            self._body = self._at + size
            if kind in (b"x", b"g", b"L", b"K"):
                if size > _MOST_HEADER:
                    raise TarError("a header is longer than a megabyte")
                body = self.read(size)
                padding = self._take(self._next - self._at)
                if kind == b"g":  # remarks about the whole archive
                    header = header[: -len(block)]
                    continue
                header += body + padding
                if kind == b"L":
                    long_name = _text(body.rstrip(b"\0"))
                elif kind == b"x":
                    records = _pax(body)
                    if any(key.startswith(b"GNU.sparse") for key in records):
                        raise TarError("it holds a sparse file, which no data loader reads")
                    if b"path" in records:
                        long_name = _text(records[b"path"])
                    if b"size" in records:
                        long_size = _decimal(records[b"size"])
                continue
            name = _name(block) if long_name is None else long_name
            if kind == b"S":
                raise TarError("it holds a sparse file, which no data loader reads")
            if kind in _FILES and not name.endswith("/"):
                yield Member(name, size, header, _number(block[100:108]) & 0o7777, _number(block[136:148]))
            elif kind in b"123456":  # links, devices and folders have no body, whatever their size says
                self._next = self._body = self._at
            header, long_name, long_size = b"", None, None

    def read(self, size: int | None = None) -> bytes:
        """The rest of the present body, or its next `size` bytes."""
        left = self._body - self._at
        return self._take(left if size is None else min(size, left))

    def chunks(self) -> Iterator[bytes]:
        """The rest of the present body in pieces of at most a megabyte."""
        while self._at < self._body:
            yield self.read(_COPY)

    def _header(self) -> bytes | None:
        """The next header block, or None at the archive's end."""
        self._skip()
        if self._length is not None and self._at == self._length:
            return None
        block = self._stream.read(BLOCK)
        while block and len(block) < BLOCK and (more := self._stream.read(BLOCK - len(block))):
            block += more
        self._at += len(block)
        self._next = self._body = self._at
        if not block or block == _ZERO:
            return None
        if len(block) < BLOCK:
            raise TarError("it ends inside a header")
        field = block[148:156]
        try:
            told = int(field.replace(b"\0", b" ").strip() or b"0", 8)
        except ValueError:
            raise TarError(f"there is no header at byte {self._at - BLOCK}") from None
        if told != sum(block) - sum(field) + 8 * 32:
            raise TarError(f"the header at byte {self._at - BLOCK} is garbled")
        return block

    def _skip(self) -> None:
        """Go to the next header."""
        if self._length is not None:
            if self._next > self._length and self._body > self._length:
                raise TarError("it ends inside a file")
            if self._next != self._at:
                self._stream.seek(min(self._next, self._length))
                self._at = min(self._next, self._length)
            return
        while self._at < self._body:
            self._take(min(_COPY, self._body - self._at))
        while self._at < self._next:  # a last block may lack its padding
            got = self._stream.read(self._next - self._at)
            if not got:
                self._next = self._at
            self._at += len(got)

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        while len(data) < size:
            more = self._stream.read(size - len(data))
            if not more:
                raise TarError("it ends inside a file")
            data += more
        self._at += size
        return data


def new_header(name: str, size: int, like: Member) -> bytes:
    """Header blocks for a file beside `like`, with its times and rights: the same for the same input."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, like.mode or 0o644, like.mtime
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") if field[0] == 0o200 else 0
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        raise TarError("a header holds no number where it must") from None


def _decimal(value: bytes) -> int:
    if not value.isdigit():
        raise TarError("a header holds no size where it must")
    return int(value)


def _pax(body: bytes) -> dict[bytes, bytes]:
    """The records `length key=value` of an extended header."""
    found: dict[bytes, bytes] = {}
    while body:
        length, blank, _ = body.partition(b" ")
        many = int(length) if length.isdigit() else 0
        record = body[len(length) + 1 : many]
        key, equals, value = record.partition(b"=")
        if not blank or not equals or not value.endswith(b"\n"):
            raise TarError("an extended header is garbled")
        found[key] = value[:-1]
        body = body[many:]
    return found
