"""Counts per value in bounded memory: sorted runs on disk, then one merge of all of them.

A run is an Arrow file of (value, count, first_...) with values rising and each there once. Values in a
known small range are counted in one array instead.

Axis letters: N rows, G groups (distinct values), S size of the dense range.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moviola.engine.tables import batches, column_type, is_list, value_type, values_in
from moviola.files import atomic
from moviola.types import UsageError, printable

BLOCK_ROWS = 1 << 13  # rows of one Arrow batch in a run: the least that a merge holds of each run
_SHARE = 12  # of the memory for one buffer: a merge holds fronts, what it takes, their order and the result
_LEAST_MEMORY = 16 << 20


@dataclass(frozen=True, slots=True)
class Counting:
    """What is counted: a column, and columns whose least tuple is kept for each value."""

    column: str
    kind: pa.DataType  # of a value
    listed: bool
    first: tuple[str, ...]
    first_kinds: tuple[pa.DataType, ...]

    @property
    def schema(self) -> pa.Schema:
        firsts = [
            pa.field(f"first_{name}", kind) for name, kind in zip(self.first, self.first_kinds, strict=True)
        ]
        return pa.schema([pa.field(self.column, self.kind), pa.field("count", pa.int64()), *firsts])

    @property
    def row_bytes(self) -> int:
        """Memory of one row of a run; a string is taken as 64 bytes, and cut by what it really has."""
        value = self.kind.bit_width // 8 if pa.types.is_integer(self.kind) else 64
        return value + 8 + sum(kind.bit_width // 8 for kind in self.first_kinds)


def counting(parts: Sequence[Path], column: str, first: Sequence[str]) -> Counting:
    """Look at the parts' schemas; `UsageError` for a column that is missing, differs or cannot be counted."""
    kind = column_type(parts, column)
    kinds = [column_type(parts, name) for name in first]
    for name, one in zip(first, kinds, strict=True):
        if not pa.types.is_integer(one):
            raise UsageError(f"The first values must be integers, the column '{name}' is {one}.")
    names = [column, "count", *(f"first_{name}" for name in first)]
    if len(set(names)) != len(names):
        raise UsageError(f"The table would have one name twice: {', '.join(names)}.")
    return Counting(column, value_type(kind, column), is_list(kind), tuple(first), tuple(kinds))


# --------------------------------------------------------------------------------------------------
# From parts to runs
# --------------------------------------------------------------------------------------------------


def values_of(path: Path, what: Counting) -> Iterator[pa.RecordBatch]:
    """(value, count of 1, first...) of every value in a part; nulls are left out."""
    for batch in batches(path, [what.column, *what.first]):
        values = batch.column(what.column)
        firsts = [batch.column(name) for name in what.first]
        for name, column in zip(what.first, firsts, strict=True):
            if column.null_count:
                raise UsageError(f"The column '{name}' of {printable(path)} has nulls.")
        if what.listed:
            if firsts:
                owners = pc.list_parent_indices(values)
                firsts = [column.take(owners) for column in firsts]
            values = pc.list_flatten(values)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.null_count:
            there = values.is_valid()
            values = values.filter(there)
            firsts = [column.filter(there) for column in firsts]
        ones = pa.array(np.ones(len(values), np.int64))
        whole = pa.RecordBatch.from_arrays([values.cast(what.kind), ones, *firsts], schema=what.schema)
        # the items of many long lists come as one batch: hand them on in pieces
        for start in range(0, whole.num_rows, 8 * BLOCK_ROWS):
            yield whole.slice(start, 8 * BLOCK_ROWS)


def aggregate(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows in any order -> one row per value in rising order: counts added, the least tuple kept."""
    if not rows.num_rows:
        return rows
    keys = rows.column(0)
    keys_N = keys.to_numpy() if pa.types.is_integer(keys.type) else _ranks(keys)
    counts_N = rows.column(1).to_numpy()
    firsts = [column.to_numpy() for column in rows.columns[2:]]
    order_N = np.argsort(keys_N)
    sorted_N = keys_N[order_N]
    new_N = np.empty(len(sorted_N), bool)
    new_N[0] = True
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=new_N[1:])
    starts_G = np.flatnonzero(new_N)
    chosen_G = order_N[starts_G]
    if firsts and len(starts_G) < len(order_N):
        sizes_G = np.diff(starts_G, append=len(order_N))
        several_N = np.repeat(sizes_G > 1, sizes_G)
        # only values met more than once need their tuples compared
        rows_M = order_N[several_N]
        group_M = np.cumsum(new_N)[several_N]
        by = np.lexsort((*(column[rows_M] for column in reversed(firsts)), group_M))
        group_M = group_M[by]
        head_M = np.append(True, group_M[1:] != group_M[:-1])
        chosen_G[sizes_G > 1] = rows_M[by][head_M]
    return pa.RecordBatch.from_arrays(
        [
            keys.take(pa.array(chosen_G)),
            pa.array(np.add.reduceat(counts_N[order_N], starts_G)),
            *(pa.array(column[chosen_G]) for column in firsts),
        ],
        schema=rows.schema,
    )


def _ranks(keys: pa.Array) -> np.ndarray:
    """Numbers that order strings as their UTF-8 bytes do."""
    encoded = keys.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()]


def join_batches(pieces: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return pieces[0] if len(pieces) == 1 else pa.concat_batches(pieces)


def buffer_bytes(memory: int) -> int:
    return max(memory, _LEAST_MEMORY) // _SHARE


def write_run(path: Path, schema: pa.Schema, rows: Iterable[pa.RecordBatch], *, keep: bool = False) -> int:
    """Write one run; returns its rows. `keep` is for one that outlives its task: whole or not at all."""
    total = 0
    with atomic(path) if keep else path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in rows:
            total += batch.num_rows
            for start in range(0, batch.num_rows, BLOCK_ROWS):
                writer.write_batch(batch.slice(start, BLOCK_ROWS))
    return total


def sort_parts(parts: Sequence[Path], what: Counting, output: Path, memory: int) -> int:
    """Several parts -> one run at `output`; what does not fit in memory is spilled beside it."""
    limit = buffer_bytes(memory)
    spilled: list[Path] = []
    pending: list[pa.RecordBatch] = []
    held = 0

    def spill(rows: pa.RecordBatch) -> None:
        nonlocal spilled
        place = output.with_name(f"{output.name}.spill-{len(spilled)}-{serial()}")
        write_run(place, what.schema, [rows])
        spilled.append(place)
        if len(spilled) >= fan_in(memory, what):
            merged = output.with_name(f"{output.name}.merged-{serial()}")
            write_run(merged, what.schema, merge(spilled, memory, what))
            for old in spilled:
                old.unlink()
            spilled = [merged]

    count = iter(range(1 << 62))

    def serial() -> int:
        return next(count)

    try:
        for path in parts:
            for batch in values_of(path, what):
                pending.append(batch)
                held += batch.nbytes
                if held >= limit:
                    # counts of few values shrink to little: only what stays large is spilled
                    rows = aggregate(join_batches(pending))
                    pending, held = [rows], rows.nbytes
                    if held >= limit // 2:
                        spill(rows)
                        pending, held = [], 0
        rest = aggregate(join_batches(pending)) if pending else None
        if not spilled:
            return write_run(output, what.schema, [] if rest is None else [rest], keep=True)
        if rest is not None:
            spill(rest)
            del rest
            pending = []
        return write_run(output, what.schema, merge(spilled, memory, what), keep=True)
    finally:
        for place in spilled:
            place.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# From runs to the table
# --------------------------------------------------------------------------------------------------


def fan_in(memory: int, what: Counting) -> int:
    """Runs that one merge can hold a block of."""
    return max(2, min(512, buffer_bytes(memory) // (BLOCK_ROWS * what.row_bytes)))


class RunReader:
    """The front of one run, block by block."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        # read, not mapped: a map's pages would count as this process's memory
        self._file = pa.ipc.open_file(files.enter_context(pa.OSFile(str(path))))
        self._next = 0
        self.front: pa.RecordBatch | None = None

    def fill(self, limit: int) -> None:
        """Hold at least `limit` bytes, or all that is left."""
        blocks = [] if self.front is None else [self.front]
        held = sum(block.nbytes for block in blocks)
        while self._next < self._file.num_record_batches and (held < limit or not blocks):
            block = self._file.get_batch(self._next)
            self._next += 1
            if block.num_rows:
                blocks.append(block)
                held += block.nbytes
        self.front = join_batches(blocks) if blocks else None

    @property
    def last(self) -> int | str:
        assert self.front is not None
        return self.front.column(0)[-1].as_py()

    @property
    def ended(self) -> bool:
        return self._next >= self._file.num_record_batches

    def take_up_to(self, value: int | str | None) -> pa.RecordBatch:
        """The front's rows with values up to this one (all where None), which leave the front."""
        assert self.front is not None
        keys = self.front.column(0)
        end = len(keys) if value is None else bisect_right(_Values(keys), value)
        taken, rest = self.front.slice(0, end), self.front.slice(end)
        self.front = rest if rest.num_rows else None
        return taken


class _Values:
    """A column that `bisect` can look into."""

    def __init__(self, column: pa.Array) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> int | str:
        return self._column[index].as_py()


def merge(runs: Sequence[Path], memory: int, what: Counting) -> Iterator[pa.RecordBatch]:
    """Merge runs into batches of one row per value, rising. At most `fan_in` runs at once."""
    limit = max(1, buffer_bytes(memory) // max(1, len(runs)))
    with contextlib.ExitStack() as files:
        readers = [RunReader(path, files) for path in runs]
        while True:
            for reader in readers:
                reader.fill(limit)
            readers = [reader for reader in readers if reader.front is not None]
            if not readers:
                return
            # Up to the least last value of the fronts every row is in sight: each run has a value once.
            open_ends = [reader.last for reader in readers if not reader.ended]
            cut = min(open_ends) if open_ends else None
            taken = [reader.take_up_to(cut) for reader in readers]
            yield aggregate(join_batches([rows for rows in taken if rows.num_rows]))
            readers = [reader for reader in readers if reader.front is not None or not reader.ended]


def merge_all(runs: Sequence[Path], memory: int, what: Counting, work: Path) -> Iterator[pa.RecordBatch]:
    """Merge any number of runs, in several rounds where they are too many for one."""
    runs = list(runs)
    most = fan_in(memory, what)
    round_ = 0
    while len(runs) > most:
        # the smallest are merged first, no more of them than needed
        runs.sort(key=lambda path: path.stat().st_size)
        count = min(most, len(runs) - most + 1)
        place = work / f"merged-{round_}"
        write_run(place, what.schema, merge(runs[: max(2, count)], memory, what))
        runs = [*runs[max(2, count) :], place]
        round_ += 1
    yield from merge(runs, memory, what)


def at_least(rows: Iterable[pa.RecordBatch], least: int) -> Iterator[pa.RecordBatch]:
    for batch in rows:
        yield batch if least <= 1 else batch.filter(pc.greater_equal(batch.column(1), least))


def groups_of_parts(parts: Sequence[Path], what: Counting, memory: int, workers: int) -> list[list[Path]]:
    """Neighbouring parts sorted together: about one buffer of values, and work for every worker."""
    sizes = [values_in(path, what.column) * what.row_bytes for path in parts]
    target = max(1, min(buffer_bytes(memory), sum(sizes) // max(1, workers) + 1))
    groups: list[list[Path]] = []
    held = 0
    for path, size in zip(parts, sizes, strict=True):
        if not groups or held + size > target:
            groups.append([])
            held = 0
        groups[-1].append(path)
        held += size
    return groups


@dataclass(frozen=True, slots=True)
class SortTask:
    """Module-level and small, so that it can travel to a worker: `(parts, run)` -> its rows."""

    what: Counting
    memory: int

    def __call__(self, parts: Sequence[Path], output: Path) -> int:
        return sort_parts(parts, self.what, output, self.memory)


# --------------------------------------------------------------------------------------------------
# Values in a known range
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DenseTask:
    """Counts of the values 0 .. size-1 in several parts, as one NumPy array in a file."""

    what: Counting
    size: int
    memory: int

    def __call__(self, parts: Sequence[Path], output: Path) -> int:
        counts_S = np.zeros(self.size, np.int64)
        flush = min(max(self.size, 1 << 20), max(1 << 16, self.memory // 32))
        pending: list[np.ndarray] = []
        held = 0
        for path in parts:
            for batch in values_of(path, self.what):
                values_N = batch.column(0).to_numpy()
                check_range(values_N, self.size, path, self.what.column)
                pending.append(values_N)
                held += len(values_N)
                if held >= flush:
                    counts_S += np.bincount(np.concatenate(pending), minlength=self.size)
                    pending, held = [], 0
        if pending:
            counts_S += np.bincount(np.concatenate(pending), minlength=self.size)
        with atomic(output) as file:
            np.save(file, counts_S)
        return int(counts_S.sum())


def check_range(values_N: np.ndarray, size: int, path: Path | str, column: str) -> None:
    if len(values_N) and (int(values_N.min()) < 0 or int(values_N.max()) >= size):
        wrong = int(values_N.min()) if int(values_N.min()) < 0 else int(values_N.max())
        raise UsageError(
            f"The column '{column}' of {printable(path)} holds {wrong}, outside 0 to {size - 1}."
        )


def dense_rows(counts_S: np.ndarray, what: Counting, least: int) -> Iterator[pa.RecordBatch]:
    """The counts of a dense range as batches of the table; zeros too where `least` is 0."""
    for start in range(0, len(counts_S), 1 << 16):
        counts = counts_S[start : start + (1 << 16)]
        keep = np.flatnonzero(counts >= least)
        values = pa.array(keep + start, pa.int64()).cast(what.kind)
        yield pa.RecordBatch.from_arrays([values, pa.array(counts[keep])], schema=what.schema)


def check_dense(what: Counting, size: int, memory: int) -> None:
    if what.first:
        raise UsageError("`first` cannot be had together with `size`.", hint="Leave `size` out.")
    if not pa.types.is_integer(what.kind):
        raise UsageError(f"`size` needs a column of integers, '{what.column}' is {what.kind}.")
    if size < 1 or size * 24 > memory:
        raise UsageError(
            f"A range of {size} values needs {size * 24 >> 20} MB, allowed are {memory >> 20} MB.",
            hint="Give more memory, or leave `size` out: the values are then sorted on disk.",
        )
