"""What every engine does around its own work: arguments looked at, work folders, receipts."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from moviola.engine import counting as c
from moviola.engine import joining as j
from moviola.engine.tables import fingerprint, write_table
from moviola.engine.tasks import OnDone, Progress, read_receipt, receipt, write_receipt
from moviola.types import UsageError


@dataclass(frozen=True, slots=True)
class Joined:
    """One output part of a join, the rows read and the rows written."""

    path: Path
    read: int
    rows: int


@dataclass(frozen=True)
class CountRequest:
    """A `group_count` with its arguments looked at; `done` is the rows where it was finished before."""

    parts: list[Path]
    to: Path
    what: c.Counting
    at_least: int
    size: int | None
    key: str
    done: int | None

    @classmethod
    def of(
        cls,
        parts: Sequence[Path],
        column: str,
        to: Path,
        at_least: int,
        size: int | None,
        first: Sequence[str],
        memory: int,
    ) -> CountRequest:
        parts = [Path(part) for part in parts]
        if at_least < (0 if size is not None else 1):
            raise UsageError(f"`at_least` must be 1 or more (0 with `size`), got {at_least}.")
        what = c.counting(parts, column, first)
        if size is not None:
            c.check_dense(what, size, memory)
        key = fingerprint(parts, "group_count", what, at_least, size)
        done, rows = read_receipt(Path(to), key)
        return cls(parts, Path(to), what, at_least, size, key, rows if done else None)

    def finish(self, rows: Iterable[pa.RecordBatch]) -> int:
        """Write the table from sorted rows, each value once."""
        receipt(self.to).unlink(missing_ok=True)
        total = write_table(self.to, self.what.schema, c.at_least(rows, self.at_least))
        write_receipt(self.to, total, self.key)
        return total

    def finish_dense(self, counts_S: np.ndarray) -> int:
        receipt(self.to).unlink(missing_ok=True)
        total = write_table(self.to, self.what.schema, c.dense_rows(counts_S, self.what, self.at_least))
        write_receipt(self.to, total, self.key)
        return total


@dataclass(frozen=True)
class JoinRequest:
    """A `join` with its arguments looked at; `done` is the result where it was finished before."""

    parts: list[Path]
    outputs: list[Path]
    table: Path
    to: Path
    what: j.Joining
    key: str
    done: list[Joined] | None

    @classmethod
    def of(cls, parts: Sequence[Path], table: Path, column: str, to: Path, how: j.How) -> JoinRequest:
        parts, table, to = [Path(part) for part in parts], Path(table), Path(to)
        what = j.joining(parts, table, column, how)
        outputs = [to / part.name for part in parts]
        if any(output.resolve() == part.resolve() for output, part in zip(outputs, parts, strict=True)):
            raise UsageError("A join must not write over its own parts.", hint="Give another folder.")
        key = fingerprint([*parts, table], "join", what)
        request = cls(parts, outputs, table, to, what, key, None)
        before = [read_receipt(output, key) for output in outputs]
        if all(done for done, _ in before):
            return cls(parts, outputs, table, to, what, key, request.results([rows for _, rows in before]))
        return request

    def results(self, found: Sequence[dict[str, int]]) -> list[Joined]:
        return [Joined(path, one["read"], one["rows"]) for path, one in zip(self.outputs, found, strict=True)]


@contextmanager
def work_folder(to: Path, key: str) -> Iterator[Path]:
    """A hidden folder beside `to` for one request; it stays after an error, for the next try."""
    folder = to.parent / f".{to.name}.{key}.work"
    to.parent.mkdir(parents=True, exist_ok=True)
    for old in to.parent.glob(f".{_literal(to.name)}.*.work"):
        if old != folder:
            shutil.rmtree(old)  # of a request with other parts or settings
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _literal(name: str) -> str:
    """A name for `glob`, its own wildcards taken as they are."""
    return "".join(f"[{letter}]" if letter in "[?*" else letter for letter in name)


def steps(progress: Progress | None, total: int) -> OnDone | None:
    """Progress as `map` tells it: one more step."""
    if progress is None:
        return None
    count = itertools.count(1)
    return lambda index, result: progress(next(count), total)
