"""CSV, TSV and JSON Lines as shards: the places of the records are found once, then any row is read alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moviola.data.pairs.csv import csv_columns
from moviola.data.pairs.jsonl import jsonl_columns, parsed
from moviola.data.pairs.lines import BLOCK_BYTES, _chunks, _ends, _filled, _record, cells
from moviola.data.pairs.types import MOST_RECORD_BYTES, PairError, PairFile
from moviola.data.rows.shards import CheapShard, column_of, media_columns

_BOM = b"\xef\xbb\xbf"


class LineShard(CheapShard):
    """A plain text table. Rows that are no records of the table (cells missing, no JSON) give nulls."""

    absolute = True

    def __init__(self, file: PairFile, *, root: Path | None, renames: Mapping[str, str]) -> None:
        self.path = file.path.absolute()
        self.name = file.name
        self.root = file.path.parent if root is None else root
        self.files = [(file.name, self.path)]
        self._delimiter = {"csv": b",", "tsv": b"\t"}.get(file.format)
        self.columns = tuple(jsonl_columns(file) if self._delimiter is None else csv_columns(file))
        self.media = media_columns(self.columns, renames)
        self._start_N, self._end_N = _places(file, self._delimiter)
        self.count = len(self._start_N)
        self.blocks()

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        records = self._records(rows)
        if self._delimiter is None:
            objects = [value if isinstance(value := parsed(r), dict) else {} for r in records]
            return pa.table({name: column_of([o.get(name) for o in objects]) for name in columns})
        place = {name: index for index, name in enumerate(self.columns)}
        lines = [self._cells(record) for record in records]
        made = {}
        for name in columns:
            at = place[name]
            made[name] = pa.array([line[at] if line else None for line in lines], pa.large_string())
        return pa.table(made)

    def _cells(self, record: bytes) -> list[str | None] | None:
        """The cells of a record as text, empty ones as null; None where there are too many or too few."""
        assert self._delimiter is not None
        try:
            found = cells(record, self._delimiter)
        except ValueError:
            return None
        if len(found) != len(self.columns):
            return None
        return [cell.decode("utf-8", "replace") or None for cell in found]

    def _records(self, rows: np.ndarray) -> list[bytes]:
        records = [b""] * len(rows)
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise PairError(
                self.path, f"cannot be read ({error.strerror}).", hint="Check the path."
            ) from error
        try:
            for place in np.argsort(rows, kind="stable").tolist():
                start, end = int(self._start_N[rows[place]]), int(self._end_N[rows[place]])
                records[place] = os.pread(descriptor, end - start, start)
                if len(records[place]) < end - start:
                    raise PairError(self.path, "has become shorter since it was opened.", hint="Start again.")
        finally:
            os.close(descriptor)
        return records


def _places(file: PairFile, delimiter: bytes | None) -> tuple[np.ndarray, np.ndarray]:
    """First byte and end of each record in the file, without the header."""
    with file.path.open("rb") as stream:
        base = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
    record = None if delimiter is None else _record(delimiter)
    starts, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    carry = b""
    for data, ended in _chunks(file, BLOCK_BYTES):
        data = carry + data
        end_R, next_R, open_at = _ends(data, record, ended)
        if open_at is not None and (ended or len(data) > MOST_RECORD_BYTES):
            raise PairError(
                file.path,
                f"a quote opens at byte {base + open_at} and is never closed.",
                hint="Mend the quote, or save the table as JSON Lines or Parquet.",
            )
        start_R, end_R, _ = _filled(data, end_R, next_R)
        starts.append(start_R + base)
        ends.append(end_R + base)
        whole = int(next_R[-1]) if len(next_R) else 0
        carry = data[whole:]
        base += whole
    start_N, end_N = np.concatenate(starts), np.concatenate(ends)
    return (start_N, end_N) if delimiter is None else (start_N[1:], end_N[1:])
