"""Parquet files of pairs, read row group by row group and within them page by page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moviola.data.pairs.batches import RawRows, is_list
from moviola.data.pairs.streams import DAMAGE, Kept, check_extra, damaged, whole_output
from moviola.data.pairs.types import KeptRows, PairColumns, PairError, PairFile, Piece

_MOST_ROWS = 1 << 16  # rows of a batch
_GROUP_BYTES = 64 << 20  # memory of the kept rows that wait for their row group


def parquet_columns(file: PairFile) -> list[str]:
    with _opened(file) as parquet:
        return list(parquet.schema_arrow.names)


def row_groups(file: PairFile) -> list[int]:
    """The rows of each row group."""
    with _opened(file) as parquet:
        meta = parquet.metadata
        return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]


def check_text_column(file: PairFile, name: str) -> None:
    """`PairError` where a column of texts holds something else."""
    with _opened(file) as parquet:
        kind = parquet.schema_arrow.field(name).type
    _check_type(file, name, kind, "text or lists of texts", lists=True)


def check_label_column(file: PairFile, name: str) -> None:
    """`PairError` where a column of ids or languages holds neither text nor numbers."""
    with _opened(file) as parquet:
        kind = parquet.schema_arrow.field(name).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_fixed_size_binary(kind)):
        _check_type(file, name, kind, "text or numbers", lists=False)


def _check_type(file: PairFile, name: str, kind: pa.DataType, expected: str, *, lists: bool) -> None:
    inner = kind.value_type if (lists and is_list(kind)) or pa.types.is_dictionary(kind) else kind
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_null,
    )
    if not any(test(inner) for test in tests):
        raise PairError(
            file.path, f"its column {name!r} holds {kind}, expected {expected}.", hint="Name another column."
        )


def read_parquet(piece: Piece, columns: PairColumns, batch_bytes: int) -> Iterator[RawRows]:
    """Only the wanted columns are read from the disk."""
    first = 0
    for batch in _batches(piece, columns.all, batch_bytes):
        names = batch.schema.names

        def column(name: str, batch: pa.RecordBatch = batch, names: list[str] = names) -> pa.Array:
            return batch.column(names.index(name))

        yield RawRows(
            first,
            [column(name) for name in columns.texts],
            None if columns.id is None else column(columns.id),
            None if columns.language is None else column(columns.language),
        )
        first += batch.num_rows


def write_parquet(piece: Piece, to: Path, kept: Iterable[KeptRows], extra: pa.Schema) -> int:
    """Kept rows with all columns, the schema's metadata, the codec and about the row groups of the input."""
    with _opened(piece.file) as parquet:
        schema, meta = parquet.schema_arrow, parquet.metadata
        check_extra(piece.file, schema.names, extra)
        codecs, common = _codecs(meta)
        target = max((meta.row_group(i).num_rows for i in range(meta.num_row_groups)), default=1 << 20)
    whole = pa.schema([*schema, *extra], metadata=schema.metadata)
    rows = Kept(piece, kept, extra)
    seen = written = waiting_rows = waiting_bytes = 0
    waiting: list[pa.RecordBatch] = []
    with (
        whole_output(to) as out,
        pq.ParquetWriter(
            out, whole, version="2.6", compression={**_leaf_codecs(extra, common), **codecs} or common
        ) as writer,
    ):

        def flush() -> None:
            nonlocal waiting_rows, waiting_bytes
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting, whole), row_group_size=max(1, target))
            waiting.clear()
            waiting_rows = waiting_bytes = 0

        for batch in _batches(piece, None, 16 << 20):
            here = rows.before(seen + batch.num_rows)
            if len(here.rows):
                stay = _taken(batch, here.rows - seen)
                made = pa.RecordBatch.from_arrays([*stay.columns, *here.extra.columns], schema=whole)
                waiting.append(made)
                waiting_rows += made.num_rows
                waiting_bytes += made.nbytes
                written += made.num_rows
                if waiting_rows >= target or waiting_bytes >= _GROUP_BYTES:
                    flush()
            seen += batch.num_rows
        rows.finish(seen)
        flush()
    return written


def _taken(batch: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    """Some rows of a batch, whatever its types are."""
    try:
        return batch.take(pa.array(rows))
    except pa.ArrowNotImplementedError:  # some releases cannot take from string views: whole runs of rows can
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return pa.concat_batches([batch.slice(int(run[0]), len(run)) for run in runs])


@contextmanager
def _opened(file: PairFile) -> Iterator[pq.ParquetFile]:
    """A Parquet file read through small buffers: no column chunk is ever held whole."""
    try:
        parquet = pq.ParquetFile(
            str(file.path), pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except DAMAGE as error:
        raise damaged(file, error, "is no readable Parquet file") from error
    with parquet:
        yield parquet


def _batches(piece: Piece, columns: list[str] | None, batch_bytes: int) -> Iterator[pa.RecordBatch]:
    with _opened(piece.file) as parquet:
        meta = parquet.metadata
        groups = range(meta.num_row_groups) if piece.groups is None else range(*piece.groups)
        if len(groups) and groups[-1] >= meta.num_row_groups:
            raise PairError(
                piece.file.path,
                f"has {meta.num_row_groups} row groups, expected more than {groups[-1]}: it changed.",
                hint="Run again into a new output folder.",
            )
        leaves = _leaves(parquet, columns)
        schema = parquet.schema_arrow
        for group in groups:
            info = meta.row_group(group)
            if not info.num_rows:
                continue
            size = sum(info.column(i).total_uncompressed_size for i in leaves) / info.num_rows
            # dictionaries and packed numbers grow when they are decoded: a quarter leaves room
            many = int(min(_MOST_ROWS, max(1, batch_bytes / 4 / max(size, 1))))
            try:
                yield from (
                    _as_schema(batch, schema)
                    for batch in parquet.iter_batches(many, row_groups=[group], columns=columns)
                )
            except DAMAGE as error:
                raise damaged(piece.file, error) from error


def _as_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch's columns with the field types of the file's schema."""
    fields = [schema.field(name) for name in batch.schema.names]
    return batch.cast(pa.schema(fields)) if fields != list(batch.schema) else batch


def _leaves(parquet: pq.ParquetFile, columns: list[str] | None) -> list[int]:
    """The column chunks that belong to the named columns."""
    many = parquet.metadata.num_columns
    if columns is None:
        return list(range(many))
    paths = [parquet.schema.column(i).path for i in range(many)]
    return [i for i, path in enumerate(paths) if any(path == c or path.startswith(c + ".") for c in columns)]


def _codecs(meta: Any) -> tuple[dict[str, str], str]:
    """The codec of each column chunk of the first row group, and the one that most have."""
    if not meta.num_row_groups:
        return {}, "snappy"
    group = meta.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    found = {chunk.path_in_schema: _codec(chunk.compression) for chunk in chunks}
    used = list(found.values())
    return found, max(dict.fromkeys(used), key=used.count, default="snappy")


def _codec(name: str) -> str:
    return "none" if name == "UNCOMPRESSED" else name.lower()


def _leaf_codecs(extra: pa.Schema, codec: str) -> dict[str, str]:
    """The codec under the names that Parquet gives the extra columns' leaves."""
    found = {}
    for one in extra:
        found[f"{one.name}.list.element" if is_list(one.type) else one.name] = codec
    return found
