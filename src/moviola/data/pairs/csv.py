"""CSV and TSV files of pairs: Arrow's reader finds the cells, kept rows keep their own bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from moviola.data.pairs.batches import RawRows
from moviola.data.pairs.lines import Block, blocks, cells
from moviola.data.pairs.streams import Kept, check_extra, compressed, damaged, glued, json_texts, whole_output
from moviola.data.pairs.types import ROW_CELLS, KeptRows, PairColumns, PairError, PairFile, Piece


def csv_columns(file: PairFile) -> list[str]:
    """The names in the header. `PairError` for none, doubled or undecodable ones."""
    block = next(blocks(file, _delimiter(file), 1 << 16), None)
    return _header(file, block)


def read_csv(piece: Piece, columns: PairColumns) -> Iterator[RawRows]:
    file, delimiter = piece.file, _delimiter(piece.file)
    names: list[str] | None = None
    for block in blocks(file, delimiter):
        if names is None:
            names = _header(file, block)
            block = _without_header(block)
            if not len(block.start_R):
                continue
        table, bad = _parse(file, block, delimiter, names, columns.all)
        yield RawRows(
            block.first - 1,  # the header is record 0 of the file
            [table[name] for name in columns.texts],
            None if columns.id is None else table[columns.id],
            None if columns.language is None else table[columns.language],
            {ROW_CELLS: int(bad.sum())} if bad is not None else {},
            bad,
        )
    if names is None:
        _header(file, None)


def write_csv(piece: Piece, to: Path, kept: Iterable[KeptRows], extra: pa.Schema) -> int:
    file, delimiter = piece.file, _delimiter(piece.file)
    rows = Kept(piece, kept, extra)
    written = seen = 0
    line_end = b"\n"
    started = False
    with whole_output(to) as plain, compressed(plain, file.compression) as out:
        for block in blocks(file, delimiter):
            if not started:
                started = True
                check_extra(file, _header(file, block), extra)
                line_end = block.data[block.end_R[0] : block.next_R[0]] or b"\n"
                more = [delimiter + _quoted(name, delimiter).encode() for name in extra.names]
                out.write(block.data[block.start_R[0] : block.end_R[0]] + b"".join(more) + line_end)
                block = _without_header(block)
            first = block.first - 1
            seen = first + len(block.start_R)
            here = rows.before(seen)
            if len(here.rows):
                at = here.rows - first
                tails = _tails(here.extra, delimiter)
                out.write(_joined(block, at, tails, line_end))
                written += len(at)
        if not started:
            _header(file, None)
        rows.finish(seen)
    return written


def _delimiter(file: PairFile) -> bytes:
    return b"\t" if file.format == "tsv" else b","


def _header(file: PairFile, block: Block | None) -> list[str]:
    if block is None:
        raise PairError(file.path, "is empty, expected a header with the columns' names.")
    try:
        record = block.data[block.start_R[0] : block.end_R[0]]
        names = [name.decode() for name in cells(record, _delimiter(file))]
    except UnicodeDecodeError as error:
        raise PairError(
            file.path, f"its header is not UTF-8 ({error.reason}).", hint="Save the table as UTF-8 text."
        ) from None
    if any("\0" in name for name in names):
        raise PairError(file.path, "is no UTF-8 text (it holds zeros).", hint="Save the table as UTF-8 text.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PairError(
            file.path, f"its header names {', '.join(map(repr, twice))} twice.", hint="Rename one of them."
        )
    return names


def _without_header(block: Block) -> Block:
    return Block(block.first + 1, block.data, block.start_R[1:], block.end_R[1:], block.next_R[1:])


def _parse(
    file: PairFile, block: Block, delimiter: bytes, names: list[str], wanted: list[str]
) -> tuple[dict[str, pa.Array], np.ndarray | None]:
    """The wanted cells of each record as bytes, and which records have too many or too few cells."""
    start, stop = int(block.start_R[0]), int(block.next_R[-1])
    try:
        return _arrow(pa.py_buffer(block.data).slice(start, stop - start), delimiter, names, wanted), None
    except pa.ArrowInvalid:
        pass  # Arrow's own hook for such rows cannot take one that is not UTF-8
    bad = _cell_counts(block, delimiter) != len(names)
    places = zip(block.start_R[~bad].tolist(), block.next_R[~bad].tolist())
    good = b"".join(block.data[start:after] for start, after in places)
    try:
        found = _arrow(pa.py_buffer(good), delimiter, names, wanted)
    except pa.ArrowInvalid as error:
        raise damaged(file, error, "is no readable CSV") from error
    place = pa.array(np.where(bad, 0, np.cumsum(~bad) - 1), pa.int64(), mask=bad)
    return {name: values.take(place) for name, values in found.items()}, bad


def _arrow(data: pa.Buffer, delimiter: bytes, names: list[str], wanted: list[str]) -> dict[str, pa.Array]:
    if not data.size:
        return {name: pa.array([], pa.binary()) for name in wanted}
    # every cell as bytes: nothing is guessed, and a cell that is not UTF-8 spoils its own row only
    table = pa_csv.read_csv(
        pa.BufferReader(data),
        pa_csv.ReadOptions(use_threads=False, block_size=data.size + 1, column_names=names),
        pa_csv.ParseOptions(delimiter=delimiter.decode(), newlines_in_values=True),
        pa_csv.ConvertOptions(
            check_utf8=False,
            column_types={name: pa.binary() for name in names},
            include_columns=wanted,
            strings_can_be_null=False,
        ),
    )
    return {name: table[name].combine_chunks() for name in wanted}


def _cell_counts(block: Block, delimiter: bytes) -> np.ndarray:
    """How many cells each record has."""
    byte = np.frombuffer(block.data, np.uint8)

    def inside(code: int) -> np.ndarray:
        at = np.flatnonzero(byte == code)
        return np.searchsorted(at, block.end_R) - np.searchsorted(at, block.start_R)

    many = inside(delimiter[0]) + 1
    for record in np.flatnonzero(inside(ord('"'))).tolist():
        many[record] = len(cells(block.data[block.start_R[record] : block.end_R[record]], delimiter))
    return many


def _joined(block: Block, at: np.ndarray, tails: list[bytes], line_end: bytes) -> bytes:
    """The records at `at` with their tails, each with its own line end."""
    data = block.data
    parts: list[bytes] = []
    starts, ends, nexts = block.start_R[at].tolist(), block.end_R[at].tolist(), block.next_R[at].tolist()
    for start, end, after, tail in zip(starts, ends, nexts, tails):
        parts += (data[start:end], tail, data[end:after] or line_end)
    return b"".join(parts)


def _tails(extra: pa.RecordBatch, delimiter: bytes) -> list[bytes]:
    """The extra cells of each row, with the delimiters before them. Lists are JSON text."""
    columns: list[Any] = []
    for column in extra.columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            texts = column.cast(pa.large_string()).fill_null("")
        else:
            texts = pc.if_else(column.is_null(), "", json_texts(column)).cast(pa.large_string())
        special = pc.match_substring_regex(texts, f'[\\r\\n"{delimiter.decode()}]')
        if pc.any(special).as_py():
            doubled = pc.replace_substring(texts, '"', '""')
            texts = pc.if_else(special, glued('"', doubled, '"'), texts)
        columns += [delimiter.decode(), texts]
    return glued(*columns).cast(pa.large_binary()).to_pylist() if columns else []


def _quoted(text: str, delimiter: bytes) -> str:
    special = any(c in text for c in ("\r", "\n", '"', delimiter.decode()))
    return '"' + text.replace('"', '""') + '"' if special else text
