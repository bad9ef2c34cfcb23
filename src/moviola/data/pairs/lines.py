"""Text files of pairs -> blocks of whole records, with the records' places in each block.

A record of JSON Lines is a line. A record of CSV may hold line ends inside quotes; a quote counts only
where a cell begins, as Python's and Arrow's CSV readers have it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from moviola.data.pairs.streams import DAMAGE, damaged, opened
from moviola.data.pairs.types import MOST_RECORD_BYTES, PairError, PairFile

BLOCK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Block:
    """Records [start, end) of `data`, without their line ends; blank lines are no records.

    `next_R` is where each record's line end stops. `first` is the number of the first record.
    """

    first: int
    data: bytes
    start_R: np.ndarray
    end_R: np.ndarray
    next_R: np.ndarray


def blocks(file: PairFile, delimiter: bytes | None, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The records of a file; `delimiter` is CSV's (`None`: JSON Lines). A byte order mark is left out."""
    record = None if delimiter is None else _record(delimiter)
    carry = b""
    first = 0
    for data, ended in _chunks(file, block_bytes):
        data = carry + data
        ends, nexts, open_at = _ends(data, record, ended)
        whole = int(nexts[-1]) if len(nexts) else 0
        carry = data[whole:]
        starts, ends, nexts = _filled(data, ends, nexts)
        if len(starts):
            yield Block(first, data, starts, ends, nexts)
            first += len(starts)
        if len(carry) > MOST_RECORD_BYTES:
            raise PairError(
                file.path,
                f"record {first + 1} is longer than {MOST_RECORD_BYTES >> 20} MB.",
                hint="Look for a quote that is never closed, or save the table as Parquet.",
            )
        if open_at is not None and ended:
            raise PairError(
                file.path,
                f"a quote opens in record {first + 1} and is never closed.",
                hint="Mend the quote, or save the table as JSON Lines or Parquet.",
            )


def _chunks(file: PairFile, block_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Chunks of the decompressed file and whether each is the last. `PairError` where it is damaged."""
    try:
        with opened(file) as stream:
            data = _read(stream, block_bytes)
            if data.startswith(_BOM):
                data = data[len(_BOM) :]
            while True:
                after = _read(stream, block_bytes)
                yield data, not after
                if not after:
                    return
                data = after
    except DAMAGE as error:
        raise damaged(file, error) from error


def _read(stream: IO[bytes], many: int) -> bytes:
    """`many` bytes, fewer only at the end (a decompressor may give less than asked at any time)."""
    got = stream.read(many)
    while len(got) < many and (more := stream.read(many - len(got))):
        got += more
    return got


def _filled(data: bytes, ends: np.ndarray, nexts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends and next starts of the records that are not blank."""
    starts = np.concatenate([np.zeros(min(1, len(nexts)), np.int64), nexts[:-1]])
    filled = ends > starts
    return starts[filled], ends[filled], nexts[filled]


def _ends(
    data: bytes, record: re.Pattern[bytes] | None, ended: bool
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Where each whole record ends, where the next begins, and where a quote stays open (`None`: nowhere)."""
    byte = np.frombuffer(data, np.uint8)
    nexts = np.flatnonzero(byte == 10) + 1
    ends = nexts - 1
    if b"\r" in data:
        ends = ends - ((ends > 0) & (byte[ends - 1] == 13))
        if record is not None:  # a lone carriage return ends a record of CSV, as in Python and Arrow
            returns = np.flatnonzero(byte == 13)
            if not ended and len(returns) and returns[-1] == len(data) - 1:
                returns = returns[:-1]  # its line feed may come with the next chunk
            lone = returns[byte[np.minimum(returns + 1, len(data) - 1)] != 10]
            if len(lone):
                nexts = np.sort(np.concatenate([nexts, lone + 1]))
                ends = np.sort(np.concatenate([ends, lone]))
    if ended and len(data) and (not len(nexts) or nexts[-1] < len(data)):
        ends, nexts = np.append(ends, len(data)), np.append(nexts, len(data))
    if record is None or b'"' not in data:
        return ends, nexts, None
    return _quoted(data, byte, record, ends, nexts)


def _quoted(
    data: bytes, byte: np.ndarray, record: re.Pattern[bytes], ends: np.ndarray, nexts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Take out the line ends that lie inside quotes. Only lines with a quote are looked at."""
    starts = np.concatenate([np.zeros(1, np.int64), nexts])
    lines = np.unique(np.searchsorted(nexts, np.flatnonzero(byte == 34), side="right"))
    at, end_list = starts[lines].tolist(), ends.tolist()
    is_end = np.ones(len(ends), bool)
    done = 0
    for line, start in zip(lines.tolist(), at):
        if start < done:
            continue
        match = record.match(data, start)
        if match is None:
            is_end[line:] = False
            return ends[is_end], nexts[is_end], start
        done = match.end()
        if line < len(end_list) and end_list[line] == done:
            continue
        last = bisect_left(end_list, done, line)
        is_end[line:last] = False
    return ends[is_end], nexts[is_end], None


def _plain(delimiter: bytes) -> bytes:
    return rb"[^" + delimiter + rb"\r\n]*+"


def _record(delimiter: bytes) -> re.Pattern[bytes]:
    """One record up to its line end. It does not match where a quote stays open."""
    plain = _plain(delimiter)
    cell = rb'(?:"(?:[^"]++|"")*+"' + plain + rb'|(?!")' + plain + rb")"
    return re.compile(cell + rb"(?:" + delimiter + cell + rb")*+(?=[\r\n]|\Z)")


def cells(record: bytes, delimiter: bytes) -> list[bytes]:
    """The cells of one whole CSV record, unquoted."""
    plain = _plain(delimiter)
    cell = re.compile(rb'"((?:[^"]++|"")*+)"(' + plain + rb")|(" + plain + rb")")
    found = []
    at = -1
    while at < len(record):
        match = cell.match(record, at + 1)
        if match is None:
            raise ValueError("not one whole record")
        inside, after, bare = match.groups()
        found.append(bare if inside is None else inside.replace(b'""', b'"') + after)
        at = match.end()
    return found
