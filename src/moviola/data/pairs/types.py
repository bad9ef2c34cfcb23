"""Files of pairs: the words that reading, matching and writing share, and their errors.

Axis letters: U texts of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from moviola.types import MoviolaError, printable

PairFormat = Literal["parquet", "csv", "tsv", "jsonl", "webdataset"]
PairCompression = Literal["gzip", "bz2", "xz", "zstd"]

MOST_RECORD_BYTES = 256 << 20
"""The longest row of a text format, or text member of a tar, that is held: longer ones are damage."""

# Why a text or a row was left out; `PairBatch.problems` counts them under these names.
TEXT_NULL = "text is null"
TEXT_EMPTY = "text is empty"
TEXT_NOT_STRING = "text is not a string"
TEXT_NOT_UTF8 = "text is not valid UTF-8"
TEXT_TWICE = "text comes twice in its sample"
ROW_WITHOUT_TEXT = "row has an empty list of texts"
ROW_CELLS = "row has the wrong number of cells"
ROW_NOT_JSON = "row is not JSON"
ROW_NOT_OBJECT = "row is not a JSON object"
ROW_NOT_UTF8 = "row is not valid UTF-8"
PROBLEMS = (
    TEXT_NULL,
    TEXT_EMPTY,
    TEXT_NOT_STRING,
    TEXT_NOT_UTF8,
    TEXT_TWICE,
    ROW_WITHOUT_TEXT,
    ROW_CELLS,
    ROW_NOT_JSON,
    ROW_NOT_OBJECT,
    ROW_NOT_UTF8,
)


class PairError(MoviolaError):
    """A file of pairs that is damaged or lacks a column. Other files of the run can go on without it."""

    def __init__(self, path: str | Path, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{printable(path)}: {problem}", hint=hint)
        self.path = str(path)
        self.reason = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return _pair_error, (self.path, self.reason, self.hint)  # it crosses processes


def _pair_error(path: str, problem: str, hint: str | None) -> PairError:
    return PairError(path, problem, hint=hint)


class OutputError(MoviolaError):
    """An output that cannot be written (a full disk, a folder without rights): the run must stop."""


@dataclass(frozen=True, slots=True)
class PairFile:
    """One file of pairs. `name`, a posix path, is unique in its run and names the output."""

    path: Path
    name: str
    format: PairFormat
    compression: PairCompression | None = None


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Which columns hold the texts, the id and the language of a file."""

    texts: tuple[str, ...]
    id: str | None = None
    language: str | None = None

    @property
    def all(self) -> list[str]:
        """Every column once."""
        return list(dict.fromkeys([*self.texts, *(c for c in (self.id, self.language) if c is not None)]))


@dataclass(frozen=True, slots=True)
class Piece:
    """A unit of work: a file, or the row groups [first, last) of a Parquet file.

    Rows are numbered from 0 within the piece, bad rows too, so both passes count alike; the piece's
    first row is row `first_row` of its file.
    """

    file: PairFile
    number: int = 0
    of: int = 1
    groups: tuple[int, int] | None = None
    first_row: int = 0

    @property
    def output(self) -> str:
        """The name of its output: the file's own, or `stem-00002-of-00007.parquet`."""
        if self.of == 1:
            return self.file.name
        name = Path(self.file.name)
        return name.with_name(f"{name.stem}-{self.number:05d}-of-{self.of:05d}{name.suffix}").as_posix()


@dataclass(frozen=True, slots=True)
class PairBatch:
    """The texts of some rows, ready to match. Rows without a usable text are counted, not shown.

    first      row number within the piece of the batch's first row
    rows       rows of the batch, with or without a text
    texts      U strings, none null or blank, as they stand in the file
    row_U      int64, ascending: the text's row, counted from `first`
    text_U     int32: which of its row's candidates the text is
    ids        one string a row, None without an id column; a missing id is ""
    languages  one string a row, None without a language column; a missing one is ""
    problems   why texts and rows were left out (one of `PROBLEMS`) -> how many
    """

    first: int
    rows: int
    texts: pa.StringArray
    row_U: np.ndarray
    text_U: np.ndarray
    ids: pa.StringArray | None
    languages: pa.StringArray | None
    problems: dict[str, int]


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows that stay: ascending row numbers within the piece, and one row of `extra` for each."""

    rows: np.ndarray
    extra: pa.RecordBatch


def count(problems: dict[str, int], name: str, many: int) -> None:
    """Add to a reason's count; nothing is added for none."""
    if many:
        problems[name] = problems.get(name, 0) + many
