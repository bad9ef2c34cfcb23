"""Counting strings that are too many for memory: sorted runs on disk, merged as a stream.

Strings are counted in a dictionary until it holds as many as the given memory allows; then they are
written as a run, sorted by their UTF-8 bytes. Runs of one level are merged into one of the next when
there are `FAN_IN` of them, so that a merge never holds more than that many blocks. Tables have a column
`value` (string) and integer columns (int64) that are summed where a value comes more than once. The
result does not depend on the memory, nor on the order in which strings came.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moviola.files import atomic

FAN_IN = 16
BLOCK = 1 << 14
"""Rows read, merged and written at a time."""
_BYTES_PER_STRING = 320  # a counted string in a dictionary, with what sorting and writing it takes
_BYTES_PER_ROW = 160  # of a table, with what sorting takes


def write_tables(tables: Iterable[pa.Table], path: Path, columns: Sequence[str]) -> int:
    """Write a stream of tables as one Parquet file, whole or not at all. Returns the number of rows.

    Row groups are of `BLOCK` rows whatever the tables' sizes, so equal rows give equal bytes.
    """
    schema = pa.schema([("value", pa.string()), *((name, pa.int64()) for name in columns)])
    rows = 0
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        waiting = schema.empty_table()
        for table in tables:
            rows += table.num_rows
            waiting = pa.concat_tables([waiting, table])
            while waiting.num_rows >= BLOCK:
                writer.write_table(waiting.slice(0, BLOCK).combine_chunks())
                waiting = waiting.slice(BLOCK)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks())
    return rows


def read_tables(path: Path) -> Iterator[pa.Table]:
    """The tables of a file of `write_tables`, `BLOCK` rows at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BLOCK):
            if batch.num_rows:
                yield pa.Table.from_batches([batch])


def rows_of(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


def up_to(values: pa.Array | pa.ChunkedArray, last: str) -> int:
    """How many of the sorted values are at most `last`."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if values[middle].as_py() <= last:
            low = middle + 1
        else:
            high = middle
    return low


def merged(paths: Sequence[Path]) -> Iterator[pa.Table]:
    """Sorted files as one sorted stream, the numbers of equal values summed.

    Each round takes all rows up to the smallest of the blocks' last values: no later block holds a
    smaller one.
    """
    if len(paths) == 1:
        yield from read_tables(paths[0])
        return
    streams = [read_tables(path) for path in paths]
    blocks: list[pa.Table | None] = [None] * len(streams)
    while True:
        for i, stream in enumerate(streams):
            block = blocks[i]
            if block is None or not block.num_rows:
                blocks[i] = next(stream, None)
        here = [(i, block) for i, block in enumerate(blocks) if block is not None]
        if not here:
            return
        last = min(block["value"][-1].as_py() for _, block in here)
        parts = []
        for i, block in here:
            take = up_to(block["value"], last)
            parts.append(block.slice(0, take))
            blocks[i] = block.slice(take)
        yield _summed(pa.concat_tables(parts))


def _summed(table: pa.Table) -> pa.Table:
    names = table.column_names
    grouped = table.group_by("value", use_threads=False).aggregate([(name, "sum") for name in names[1:]])
    return (
        grouped.rename_columns({f"{name}_sum": name for name in names[1:]})
        .select(names)
        .sort_by("value")
        .combine_chunks()
    )


class Runs:
    """Tables of unsorted rows in, one sorted stream out, in bounded memory.

    `folder` is for this object alone: what lies in it is written over. `columns` are the integer
    columns' names, `memory` the bytes that rows may take before they are written.
    """

    def __init__(self, folder: Path, columns: Sequence[str] = ("count",), *, memory: int = 256 << 20) -> None:
        self.folder, self.columns = folder, tuple(columns)
        self._limit = max(1024, memory // _BYTES_PER_ROW)
        self._waiting: list[pa.Table] = []
        self._rows = 0
        self._levels: list[list[Path]] = []
        self._written = 0

    def add(self, table: pa.Table) -> None:
        """Rows in any order, values may come again."""
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows >= self._limit:
            self._spill()

    def _spill(self) -> None:
        if self._rows:
            table = _summed(pa.concat_tables(self._waiting))
            self._waiting, self._rows = [], 0
            self._put([table], 0)

    def _put(self, tables: Iterable[pa.Table], level: int) -> None:
        path = self.folder / f"{self._written:06d}.run"
        self._written += 1
        write_tables(tables, path, self.columns)
        while len(self._levels) <= level:
            self._levels.append([])
        self._levels[level].append(path)
        if len(self._levels[level]) >= FAN_IN:
            full, self._levels[level] = self._levels[level], []
            self._put(merged(full), level + 1)
            for old in full:
                old.unlink()

    def merged(self) -> Iterator[pa.Table]:
        """All rows, sorted by value. Nothing may be added afterwards."""
        self._spill()
        runs = [path for level in reversed(self._levels) for path in level]
        while len(runs) > FAN_IN:  # a few runs on each of many levels: the smallest go together
            small, runs = runs[-FAN_IN:], runs[:-FAN_IN]
            path = self.folder / f"{self._written:06d}.run"
            self._written += 1
            write_tables(merged(small), path, self.columns)
            for old in small:
                old.unlink()
            runs.append(path)
        self._levels = [runs]
        yield from merged(runs)

    def finish(self, to: Path) -> int:
        """Write all rows, sorted, as one file and delete the runs. Returns the number of rows."""
        rows = write_tables(self.merged(), to, self.columns)
        self.clear()
        return rows

    def clear(self) -> None:
        """Delete the runs and, where it is empty then, the folder."""
        for level in self._levels:
            for path in level:
                path.unlink(missing_ok=True)
        self._levels = []
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


class Tally:
    """A count of each string, for any number of distinct strings.

    `memory` is about how many bytes the strings in memory may take.
    """

    def __init__(self, folder: Path, *, memory: int = 256 << 20) -> None:
        self._runs = Runs(folder, memory=memory)
        self._limit = max(1024, memory // _BYTES_PER_STRING)
        self._counts: Counter[str] = Counter()

    def add(self, strings: Iterable[str]) -> None:
        """Count each string once."""
        self._counts.update(strings)
        self._check()

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Count each string as often as is said."""
        self._counts.update(counts)
        self._check()

    def _check(self) -> None:
        if len(self._counts) >= self._limit:
            self._spill()

    def _spill(self) -> None:
        if self._counts:
            table = pa.table(
                {
                    "value": pa.array(self._counts.keys(), pa.string()),
                    "count": pa.array(self._counts.values(), pa.int64()),
                }
            )
            self._counts = Counter()
            self._runs.add(table)
            self._runs._spill()

    def finish(self, to: Path) -> int:
        """Write `value` and `count`, sorted by value, as one Parquet file. Returns the number of values."""
        self._spill()
        return self._runs.finish(to)


def with_counts(
    tables: Iterable[pa.Table], words: Iterator[pa.Table], column: str, name: str
) -> Iterator[pa.Table]:
    """Merge join: add the count that `words` (sorted, each word once) gives to `column`, as `name`.

    The tables must come sorted by `column`. Rows whose word is not there are left out.
    """
    known = next(words, None)
    for rest in tables:
        table = rest
        while table.num_rows and known is not None:
            take = up_to(table[column], known["value"][-1].as_py())
            part = table.slice(0, take)
            if take:
                place = pc.index_in(part[column], value_set=known["value"])
                part = part.append_column(name, pc.take(known["count"], place))
                yield part.filter(pc.is_valid(part[name]))
            table = table.slice(take)
            if table.num_rows:
                known = next(words, None)


def best(tables: Iterable[pa.Table], column: str, *, least: float, most: int | None = None) -> pa.Table:
    """Rows whose `column` is at least `least`, the greatest first, equals by value; at most `most`."""
    kept: pa.Table | None = None
    order = [(column, "descending"), ("value", "ascending")]
    for table in tables:
        chosen = table.filter(pc.greater_equal(table[column], least))
        kept = chosen if kept is None else pa.concat_tables([kept, chosen])
        if most is not None and kept.num_rows > 2 * most + BLOCK:
            kept = kept.sort_by(order).slice(0, most).combine_chunks()
    if kept is None:
        return pa.table({"value": pa.array([], pa.string()), column: pa.array([], pa.int64())})
    return kept.sort_by(order).slice(0, most)
