"""Parquet part files as the engines read and write them: streamed, and the same bytes every time.

Axis letters: N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moviola.files import atomic
from moviola.types import MoviolaError, UsageError, printable

READ_ROWS = 1 << 16
"""Rows of one batch read from a part."""
GROUP_ROWS = 1 << 17
"""Rows of one row group written; fixed, so that a table's bytes do not depend on how it came."""


def open_part(path: Path) -> pq.ParquetFile:
    """A Parquet file read page by page, never a whole row group at once."""
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except FileNotFoundError:
        raise UsageError(f"There is no file {printable(path)}.") from None
    except pa.ArrowInvalid as error:
        raise MoviolaError(f"{printable(path)}: this is no readable Parquet file ({error}).") from error


def batches(
    path: Path, columns: Sequence[str] | None = None, *, group: int | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a part, or of one row group, in order, `READ_ROWS` at a time."""
    with open_part(path) as file:
        try:
            yield from file.iter_batches(
                batch_size=READ_ROWS,
                row_groups=None if group is None else [group],
                columns=None if columns is None else list(columns),
                use_threads=False,
            )
        except (pa.ArrowInvalid, OSError) as error:
            raise MoviolaError(
                f"{printable(path)}: the file is damaged ({error}).",
                hint="Remove it and run the step that made it again.",
            ) from error


def column_type(parts: Sequence[Path], column: str) -> pa.DataType:
    """The type of a column, the same in every part; `UsageError` where it is missing or differs."""
    found: tuple[Path, pa.DataType] | None = None
    for path in parts:
        with open_part(path) as file:
            schema = file.schema_arrow
        if column not in schema.names:
            raise UsageError(
                f"{printable(path)} has no column '{column}'.", hint=f"It has: {', '.join(schema.names)}."
            )
        kind = schema.field(column).type
        if found is None:
            found = (path, kind)
        elif kind != found[1]:
            raise UsageError(
                f"The column '{column}' is {found[1]} in {printable(found[0])} "
                f"but {kind} in {printable(path)}."
            )
    if found is None:
        raise UsageError("No part files were given.")
    return found[1]


def numpy_kind(kind: pa.DataType) -> np.dtype:
    """NumPy's type of a number type (pyarrow's own way to it needs pandas)."""
    return pa.array([], kind).to_numpy().dtype


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def value_type(kind: pa.DataType, column: str) -> pa.DataType:
    """The type in which a column's values are counted: an integer type or string."""
    if is_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.string()
    raise UsageError(f"The column '{column}' must hold integers or strings (or lists of them), it is {kind}.")


def values_in(path: Path, column: str) -> int:
    """How many values a part's column holds, list items counted one by one; from the footer alone."""
    with open_part(path) as file:
        groups = file.metadata
        total = 0
        for group in range(groups.num_row_groups):
            of_group = groups.row_group(group)
            for index in range(of_group.num_columns):
                chunk = of_group.column(index)
                if chunk.path_in_schema.split(".")[0] == column:
                    total += chunk.num_values
        return total


def write_table(
    to: Path, schema: pa.Schema, rows: Iterable[pa.RecordBatch], *, dictionary: bool = False
) -> int:
    """Write batches as one Parquet file, whole or not at all; returns the rows.

    The bytes depend only on the rows: they are gathered into row groups of one size, each one piece.
    """
    total = waiting = 0
    pending: list[pa.RecordBatch] = []
    with (
        atomic(to) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=dictionary) as writer,
    ):

        def write(batches: list[pa.RecordBatch]) -> None:
            # one contiguous piece: where pages end must not depend on the batches that came
            table = pa.Table.from_batches(batches, schema=schema).combine_chunks()
            writer.write_table(table, row_group_size=GROUP_ROWS)

        for batch in rows:
            total += batch.num_rows
            while batch.num_rows:
                part = batch.slice(0, GROUP_ROWS - waiting)
                pending.append(part)
                waiting += part.num_rows
                batch = batch.slice(part.num_rows)
                if waiting == GROUP_ROWS:
                    write(pending)
                    pending, waiting = [], 0
        if pending:
            write(pending)
    return total


def fingerprint(parts: Sequence[Path], *settings: Any) -> str:
    """A short hash of files (name, size, time of change) and settings, for receipts."""
    about: list[Any] = [list(map(repr, settings))]
    for path in parts:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise UsageError(f"There is no file {printable(path)}.") from None
        about.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    # surrogates in a file's name become escapes
    return hashlib.sha256(json.dumps(about).encode("ascii")).hexdigest()[:16]
