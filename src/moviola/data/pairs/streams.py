"""Streams of pair files: decompressed in, whole or not at all out, and the rows that stay between."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moviola.data.pairs.batches import is_list
from moviola.data.pairs.types import KeptRows, OutputError, PairError, PairFile, Piece
from moviola.files import atomic
from moviola.types import UsageError, printable

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""What reading a cut, garbled or vanished file raises. Never put around a block that writes."""


@contextmanager
def opened(file: PairFile) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed; plain files can seek."""
    path = file.path
    if file.compression == "zstd":
        with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
            yield stream
        return
    kinds: dict[str | None, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    with kinds.get(file.compression, open)(path, "rb") as stream:
        yield stream


def damaged(file: PairFile, error: BaseException, what: str = "is damaged") -> PairError:
    if isinstance(error, FileNotFoundError):
        return PairError(file.path, "does not exist.", hint="Check the path.")
    if isinstance(error, PermissionError):
        return PairError(file.path, "may not be read.", hint="Check its rights.")
    said = " ".join(str(error).split())
    return PairError(file.path, f"{what} ({said}).", hint="Copy it again, or leave it out.")


@contextmanager
def whole_output(to: Path) -> Iterator[IO[bytes]]:
    """A file beside `to` that is flushed to the disk and takes the name when the block ends well.

    `OutputError` when the disk is full or the folder may not be written.
    """
    try:
        with atomic(to) as file:
            yield file
    except OSError as error:
        raise _not_written(to, error) from error


def _not_written(to: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"The disk is full: {printable(to)} could not be written ({error.strerror}).",
            hint="Free some space and run the same command again: finished files are kept.",
        )
    return OutputError(
        f"{printable(to)} could not be written ({error.strerror or error}).",
        hint="Choose an output folder that you may write.",
    )


@contextmanager
def compressed(file: IO[bytes], compression: str | None) -> Iterator[IO[bytes]]:
    """A writer in the input's compression. The same bytes in give the same bytes out: no times, no names."""
    if compression is None:
        yield file
        return
    if compression == "zstd":
        with pa.CompressedOutputStream(pa.PythonFile(_KeptOpen(file), "w"), "zstd") as stream:
            yield stream
        return
    if compression == "gzip":
        with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif compression == "bz2":
        with bz2.BZ2File(file, "wb") as stream:
            yield stream
    else:
        with lzma.LZMAFile(file, "wb") as stream:
            yield stream


class _KeptOpen:
    """Arrow closes the file that it writes to; the output must stay open to be flushed to the disk."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.flush()


# --------------------------------------------------------------------------------------------------
# Rows that stay
# --------------------------------------------------------------------------------------------------


class Kept:
    """A reader of `KeptRows` that hands out those before a row, window after window."""

    def __init__(self, piece: Piece, kept: Iterable[KeptRows], schema: pa.Schema) -> None:
        self._piece, self._schema = piece, schema
        self._source = iter(kept)
        self._waiting: list[KeptRows] = []
        self._last = -1
        self._ended = False

    def before(self, stop: int) -> KeptRows:
        """All kept rows under `stop` that were not handed out yet."""
        while not self._ended and (not self._waiting or self._waiting[-1].rows[-1] < stop):
            self._pull()
        rows: list[np.ndarray] = []
        extra: list[pa.RecordBatch] = []
        while self._waiting:
            one = self._waiting[0]
            many = int(np.searchsorted(one.rows, stop))
            if many:
                rows.append(one.rows[:many])
                extra.append(one.extra.slice(0, many))
            if many < len(one.rows):
                self._waiting[0] = KeptRows(one.rows[many:], one.extra.slice(many))
                break
            self._waiting.pop(0)
        if not rows:
            return KeptRows(np.zeros(0, np.int64), pa.RecordBatch.from_pylist([], self._schema))
        return KeptRows(np.concatenate(rows), pa.concat_batches(extra) if len(extra) > 1 else extra[0])

    def finish(self, rows: int) -> None:
        """The input ended after `rows` rows: a kept row beyond it means another file."""
        if not self._waiting and not self._ended:
            self._pull()
        if self._waiting:
            raise self.changed(int(self._waiting[0].rows[0]), rows)

    def changed(self, row: int, rows: int) -> PairError:
        return PairError(
            self._piece.file.path,
            f"row {row} was matched, but the file now ends after {rows} rows: it changed since.",
            hint="Run again into a new output folder.",
        )

    def _pull(self) -> None:
        one = next(self._source, None)
        if one is None:
            self._ended = True
            return
        if not len(one.rows):
            return
        if one.extra.num_rows != len(one.rows) or one.extra.schema.names != self._schema.names:
            raise UsageError(
                f"Expected one row of {', '.join(self._schema.names)} for each of {len(one.rows)} kept rows, "
                f"got {one.extra.num_rows} rows of {', '.join(one.extra.schema.names)}."
            )
        if one.rows[0] <= self._last or (np.diff(one.rows) <= 0).any():
            raise UsageError("Kept rows must be ascending row numbers, each once.")
        self._last = int(one.rows[-1])
        self._waiting.append(one)


def check_extra(file: PairFile, there: Iterable[str], extra: pa.Schema) -> None:
    """No extra column may replace one of the input's."""
    both = [name for name in extra.names if name in set(there)]
    if both:
        raise PairError(
            file.path,
            f"already has the column {', '.join(map(repr, both))} that the output adds.",
            hint="Rename or drop that column, or curate the pairs as they were before.",
        )


def json_texts(values: pa.Array) -> pa.Array:
    """Each value as JSON text (large strings): strings, numbers, booleans, nulls and lists of these."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if is_list(kind):
        lists = values.cast(pa.large_list(kind.value_type))
        inside = json_texts(lists.flatten())
        size = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(size)])
        joined = pc.binary_join(
            pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), inside.cast(pa.large_string())),
            pa.scalar(", ", pa.large_string()),
        )
        texts = glued("[", joined, "]")
        return pc.if_else(values.is_null(), "null", texts)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _json_strings(values.cast(pa.large_string()))
    if pa.types.is_floating(kind):
        finite = pc.fill_null(pc.is_finite(values), False)
        return pc.if_else(finite, values.cast(pa.large_string()), "null")
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return values.cast(pa.large_string()).fill_null("null")
    raise UsageError(f"An extra column of type {kind} cannot be written as text.")


def _json_strings(values: pa.Array) -> pa.Array:
    """Quoted and escaped as JSON, other letters as they are."""
    values = pc.replace_substring(values, "\\", "\\\\")
    values = pc.replace_substring(values, '"', '\\"')
    if pc.any(pc.match_substring_regex(values, r"[\x00-\x1f]")).as_py():
        named = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
        for code in range(32):
            values = pc.replace_substring(values, chr(code), named.get(chr(code), f"\\u{code:04x}"))
    return glued('"', values, '"').fill_null("null")


def glued(*parts: Any) -> pa.Array:
    """Row by row one text after the other: large string columns, and strings that stand in every row."""
    kind = pa.large_string()
    return pc.binary_join_element_wise(
        *(pa.scalar(part, kind) if isinstance(part, str) else part.cast(kind) for part in parts),
        pa.scalar("", kind),
    )
