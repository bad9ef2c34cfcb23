"""Parquet files as shards. A block is a row group, or a stretch of one that is too large to hold.

Reading a row means decoding its pages, so the shuffle is made of blocks (`RowSource.order`). Stretches of
one row group are read one after the other from an open reader: only a jump back starts it anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moviola.data.pairs.types import PairError
from moviola.data.rows.shards import media_columns
from moviola.types import UsageError, printable

_DAMAGE = (OSError, pa.ArrowException)


class ParquetShard:
    """One Parquet file; `most_bytes` is the largest block, in bytes of decoded pages."""

    absolute = False

    def __init__(
        self, path: Path, name: str, *, root: Path | None, renames: Mapping[str, str], most_bytes: int
    ) -> None:
        self.path = path.absolute()
        self.name = name
        self.root = path.parent if root is None else root
        self.files = [(name, self.path)]
        self._file: pq.ParquetFile | None = None
        self._stretch: _Stretch | None = None
        with self._opened() as file:
            meta = file.metadata
            self.columns = tuple(file.schema_arrow.names)
            twice = sorted({c for c in self.columns if self.columns.count(c) > 1})
            if twice:
                raise UsageError(f"{printable(path)} has two columns {', '.join(map(repr, twice))}.")
            self.count = meta.num_rows
            self.metadata = dict(file.schema_arrow.metadata or {})
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        self.media = media_columns(self.columns, renames)
        self._cut(groups, most_bytes)

    def _cut(self, groups: Sequence[Any], most_bytes: int) -> None:
        starts, sizes, group_K, offset_K = [], [], [], []
        first = 0
        for number, group in enumerate(groups):
            many, weight = group.num_rows, group.total_byte_size
            if not many:
                continue
            pieces = min(many, -(-weight // most_bytes)) if weight > most_bytes else 1
            step = -(-many // pieces)
            for offset in range(0, many, step):
                starts.append(first + offset)
                sizes.append(weight * min(step, many - offset) // many)
                group_K.append(number)
                offset_K.append(offset)
            first += many
        self.start_K = np.array(starts or [0], np.int64)
        self.bytes_K = np.maximum(np.array(sizes or [0], np.int64), 1)
        self.group_K, self._offset_K = np.array(group_K, np.int64), np.array(offset_K, np.int64)
        self._whole_K = np.bincount(self.group_K, minlength=len(groups))[self.group_K] == 1

    def __getstate__(self) -> dict[str, Any]:
        """No open files cross processes."""
        return {**self.__dict__, "_file": None, "_stretch": None}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._stretch = None

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        raise AssertionError("Parquet is read by blocks")

    def block(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Decoded columns of one block. `PairError` where the file is damaged or has changed.

        Each column is one chunk: taking rows from several chunks would copy them all every time.
        """
        if self._file is None:
            self._file = self._opened()
        group, names = int(self.group_K[number]), list(columns)
        ends = np.append(self.start_K[1:], self.count)
        many = int(ends[number] - self.start_K[number])
        try:
            if self._whole_K[number]:
                # page by page into small buffers: reading ahead would hold the compressed pages as well
                batches = list(self._file.iter_batches(many, row_groups=[group], columns=names))
                return pa.Table.from_batches(batches).combine_chunks()
            offset = int(self._offset_K[number])
            if self._stretch is None or not self._stretch.leads_to(group, offset, names):
                self._stretch = _Stretch(self._file, group, names, many)
            return self._stretch.read(offset, many).combine_chunks()
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _opened(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(
                str(self.path), pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
            )
        except FileNotFoundError:
            raise PairError(self.path, "does not exist.", hint="Check the path.") from None
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> PairError:
        said = " ".join(str(error).split())
        return PairError(self.path, f"is damaged ({said}).", hint="Copy it again, or leave it out.")


class _Stretch:
    """A reader that goes through one row group from its beginning."""

    def __init__(self, file: pq.ParquetFile, group: int, columns: list[str], step: int) -> None:
        self._group, self._columns = group, columns
        self._batches: Iterator[pa.RecordBatch] = file.iter_batches(
            min(step, 1024), row_groups=[group], columns=columns
        )
        self._at = 0
        self._left: pa.RecordBatch | None = None

    def leads_to(self, group: int, offset: int, columns: list[str]) -> bool:
        return group == self._group and columns == self._columns and offset >= self._at

    def read(self, offset: int, many: int) -> pa.Table:
        """Rows [offset, offset + many) of the row group; those before are passed over."""
        self._skip(offset - self._at)
        parts: list[pa.RecordBatch] = []
        while many:
            batch = self._next()
            part, self._left = batch.slice(0, many), batch.slice(many) if batch.num_rows > many else None
            parts.append(part)
            many -= part.num_rows
            self._at += part.num_rows
        return pa.Table.from_batches(parts)

    def _skip(self, many: int) -> None:
        while many:
            batch = self._next()
            passed = min(many, batch.num_rows)
            self._left = batch.slice(passed) if batch.num_rows > passed else None
            many -= passed
            self._at += passed

    def _next(self) -> pa.RecordBatch:
        if self._left is not None:
            return self._left
        batch = next(self._batches, None)
        if batch is None:
            raise pa.ArrowInvalid("the row group ends before its last row")
        return batch
