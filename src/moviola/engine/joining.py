"""Joining parts with a sorted table in bounded memory, one output part per input part, rows in order.

Two steps per part. First the matches: (row of the part, columns of the table), from the part's key column
alone. Then the part is read once more beside its matches. Wide columns never leave their part.

Axis letters: N rows of a part, S rows of a slice of the table, M matches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from moviola.engine.counting import RunReader, join_batches, write_run
from moviola.engine.tables import batches, column_type, numpy_kind, open_part, write_table
from moviola.files import atomic
from moviola.types import UsageError, printable

How = Literal["inner", "left", "anti", "distinct"]
FIRST = "first_"


@dataclass(frozen=True, slots=True)
class Joining:
    """What is joined: the key, the kind of join and the table's columns that a match brings."""

    column: str
    how: How
    key_kind: pa.DataType
    names: tuple[str, ...]
    kinds: tuple[pa.DataType, ...]

    @property
    def match_schema(self) -> pa.Schema:
        """Of the file of matches: the row's number in its part, then the table's columns."""
        fields = [pa.field(name, kind) for name, kind in zip(self.names, self.kinds, strict=True)]
        return pa.schema([pa.field("row number", pa.int64()), *fields])

    @property
    def adds(self) -> bool:
        return self.how in ("inner", "left")


def joining(parts: Sequence[Path], table: Path, column: str, how: How) -> Joining:
    """Look at the schemas; `UsageError` for columns that are missing, differ or clash."""
    if how not in get_args(How):
        raise UsageError(f"`how` is one of {', '.join(get_args(How))}, got {how!r}.")
    kind = column_type([table], column)
    if not pa.types.is_integer(kind):
        raise UsageError(f"A join needs a column of integers, '{column}' is {kind} in {printable(table)}.")
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"Two parts have the name {printable(twice)}, and so would their outputs.")
    in_parts = column_type(parts, column)
    if in_parts != kind:
        raise UsageError(
            f"The column '{column}' is {in_parts} in the parts but {kind} in {printable(table)}."
        )
    with open_part(table) as file:
        schema = file.schema_arrow
    brought = [] if how == "anti" else [one for one in schema if one.name != column]
    if how == "distinct":
        brought = [one for one in brought if one.name.startswith(FIRST)]
        if not brought:
            raise UsageError(
                f"{printable(table)} has no column that starts with '{FIRST}'.",
                hint="Make it with group_count and `first`.",
            )
        for one in brought:
            mine = column_type(parts, one.name.removeprefix(FIRST))
            if mine != one.type:
                raise UsageError(f"'{one.name}' is {one.type}, but the parts' column is {mine}.")
    for one in brought:
        if not (pa.types.is_integer(one.type) or pa.types.is_floating(one.type)):
            raise UsageError(f"A table's columns must be numbers, '{one.name}' is {one.type}.")
    what = Joining(column, how, kind, tuple(f.name for f in brought), tuple(f.type for f in brought))
    for path in parts if what.adds else ():
        with open_part(path) as file:
            clash = set(what.names) & set(file.schema_arrow.names)
        if clash:
            raise UsageError(f"{printable(path)} has a column '{min(clash)}' already.")
    return what


# --------------------------------------------------------------------------------------------------
# The table, as plain columns on disk
# --------------------------------------------------------------------------------------------------


def check_rising(table: Path, column: str) -> Iterator[pa.RecordBatch]:
    """The table's rows in order; `UsageError` where keys do not rise or a value is null."""
    last: int | None = None
    for batch in batches(table):
        if any(one.null_count for one in batch.columns):
            raise UsageError(f"{printable(table)} has nulls; a table to join with must have none.")
        keys_N = batch.column(column).to_numpy()
        if len(keys_N):
            if (last is not None and int(keys_N[0]) <= last) or not (keys_N[1:] > keys_N[:-1]).all():
                raise UsageError(
                    f"{printable(table)} is not sorted by '{column}' with each value once.",
                    hint="Make it with group_count.",
                )
            last = int(keys_N[-1])
        yield batch


def write_columns(table: Path, what: Joining, folder: Path) -> int:
    """The table's columns as raw numbers in `folder`, from which any slice is read at once; its rows."""
    total = 0
    with ExitStack() as files:
        out = [files.enter_context(atomic(folder / f"column-{i}")) for i in range(1 + len(what.names))]
        for batch in check_rising(table, what.column):
            total += batch.num_rows
            for file, name in zip(out, (what.column, *what.names), strict=True):
                file.write(batch.column(name).to_numpy().tobytes())
    with atomic(folder / "rows.json") as file:
        file.write(json.dumps(total).encode())
    return total


@dataclass
class Probe:
    """Looks keys up in columns that `write_columns` wrote, in slices that fit `memory`."""

    folder: Path
    what: Joining
    rows: int
    memory: int
    _kept: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def _column(self, index: int, start: int, count: int) -> np.ndarray:
        if index in self._kept:
            return self._kept[index]
        kind = numpy_kind((self.what.key_kind, *self.what.kinds)[index])
        place = self.folder / f"column-{index}"
        column = np.fromfile(place, kind, count, offset=start * kind.itemsize)
        if count == self.rows:
            self._kept[index] = column  # a small table stays for the next parts
        return column

    def find(self, keys_N: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Positions of the keys that are in the table, rising, and the table's columns at these."""
        row_bytes = sum(kind.bit_width // 8 for kind in (self.what.key_kind, *self.what.kinds))
        size = max(1 << 12, self.memory // 8 // row_bytes)
        order_N = np.argsort(keys_N)
        sorted_N = keys_N[order_N]
        found: list[np.ndarray] = []
        brought: list[list[np.ndarray]] = []
        for start in range(0, self.rows, size):
            count = min(size, self.rows - start)
            key_S = self._column(0, start, count)
            low = int(np.searchsorted(sorted_N, key_S[0], "left"))
            high = int(np.searchsorted(sorted_N, key_S[-1], "right"))
            if low == high:
                continue
            wanted = sorted_N[low:high]
            at = np.searchsorted(key_S, wanted)  # within the slice: no key is above its last
            hit = key_S[at] == wanted
            if not hit.any():
                continue
            found.append(order_N[low:high][hit])
            at = at[hit]
            brought.append([self._column(1 + i, start, count)[at] for i in range(len(self.what.kinds))])
        if not found:
            return np.empty(0, np.int64), [np.empty(0, numpy_kind(k)) for k in self.what.kinds]
        rows_M = np.concatenate(found)
        back = np.argsort(rows_M)
        return rows_M[back], [np.concatenate(column)[back] for column in zip(*brought, strict=True)]

    def matches(self, part: Path) -> Iterator[pa.RecordBatch]:
        """Matches of a part, by rising row."""
        limit = max(1 << 16, self.memory // 256)  # keys, order, sorted keys, positions and hits at once
        pending: list[np.ndarray] = []
        held = first = 0
        nulls: list[np.ndarray] = []

        def look() -> pa.RecordBatch:
            rows_M, columns = self.find(np.concatenate(pending))
            if nulls:
                fine = ~np.concatenate(nulls)[rows_M]
                rows_M, columns = rows_M[fine], [column[fine] for column in columns]
            return pa.RecordBatch.from_arrays(
                [pa.array(rows_M + first), *(pa.array(column) for column in columns)],
                schema=self.what.match_schema,
            )

        for batch in batches(part, [self.what.column]):
            column = batch.column(0)
            if column.null_count or nulls:
                if not nulls:
                    nulls.append(np.zeros(held, bool))
                nulls.append(column.is_null().to_numpy(zero_copy_only=False))
                column = column.fill_null(0)
            pending.append(column.to_numpy())
            held += len(column)
            if held >= limit:
                yield look()
                first += held
                pending, nulls, held = [], [], 0
        if held:
            yield look()


# --------------------------------------------------------------------------------------------------
# A part and its matches side by side
# --------------------------------------------------------------------------------------------------


def write_joined(part: Path, matches: Path, what: Joining, output: Path) -> dict[str, int]:
    """Write the joined part; `{"read": rows, "rows": rows written}`."""
    with open_part(part) as file:
        schema = file.schema_arrow
    if what.adds:
        for one in list(what.match_schema)[1:]:
            schema = schema.append(one)
    read = 0

    def rows() -> Iterator[pa.RecordBatch]:
        nonlocal read
        with ExitStack() as files:
            reader = RunReader(matches, files)
            for batch in batches(part):
                end = read + batch.num_rows
                taken = []
                # matches of this batch, however few a block of the file holds
                while True:
                    reader.fill(1)
                    if reader.front is None or reader.front.column(0)[0].as_py() >= end:
                        break
                    taken.append(reader.take_up_to(end - 1))
                yield _join_batch(batch, join_batches(taken) if taken else None, read, what, schema)
                read = end

    # language and the like repeat: dictionaries pay here, unlike in tables of distinct values
    written = write_table(output, schema, rows(), dictionary=True)
    return {"read": read, "rows": written}


def _join_batch(
    batch: pa.RecordBatch, matches: pa.RecordBatch | None, first: int, what: Joining, schema: pa.Schema
) -> pa.RecordBatch:
    at_N = np.full(batch.num_rows, -1, np.int64)  # each row's match
    if matches is not None:
        at_N[matches.column(0).to_numpy() - first] = np.arange(matches.num_rows)
    else:
        matches = pa.RecordBatch.from_pylist([], schema=what.match_schema)
    hit_N = at_N >= 0
    if what.how == "anti":
        return batch.filter(pa.array(~hit_N))
    if what.how == "distinct":
        keep_N = ~hit_N
        same_M = np.ones(int(hit_N.sum()), bool)
        for index, name in enumerate(what.names):
            mine = (
                batch.column(name.removeprefix(FIRST)).filter(pa.array(hit_N)).to_numpy(zero_copy_only=False)
            )
            same_M &= mine == matches.column(1 + index).to_numpy()[at_N[hit_N]]
        keep_N[hit_N] = same_M
        return batch.filter(pa.array(keep_N))
    if what.how == "inner":
        batch, at_N = batch.filter(pa.array(hit_N)), at_N[hit_N]
    place = pa.array(at_N, mask=at_N < 0)
    return pa.RecordBatch.from_arrays(
        [*batch.columns, *(column.take(place) for column in matches.columns[1:])], schema=schema
    )


@dataclass
class ProbeTask:
    """Module-level, so that it can travel to a worker: joins one part by looking into the table."""

    probe: Probe

    def __call__(self, part: Path, output: Path) -> dict[str, int]:
        place = output.with_name(f".{output.name}.matches")
        try:
            write_run(place, self.probe.what.match_schema, self.probe.matches(part))
            return write_joined(part, place, self.probe.what, output)
        finally:
            place.unlink(missing_ok=True)


@dataclass
class ZipTask:
    """The same where the matches are there already: a task is (part, its matches)."""

    what: Joining

    def __call__(self, task: tuple[Path, Path], output: Path) -> dict[str, Any]:
        return dict(write_joined(task[0], task[1], self.what, output))
