"""Tables of pictures or clips with texts: CSV, TSV, JSON Lines, JSON and Parquet, read as a stream.

Pictures stand in a column as paths, relative to the table's folder, or as encoded bytes (a binary
column, or the `{bytes, path}` structs of Hugging Face datasets).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moviola.media import media_kind
from moviola.types import Clip, Pair, TimeSpan, UsageError, printable

Media = Clip | bytes
Skip = Callable[[str, str], None]
"""Called with what was passed over (a path, or `table:row`) and the reason."""

MEDIA_COLUMNS = [
    "image",
    "picture",
    "photo",
    "img",
    "video",
    "clip",
    "media",
    "file",
    "path",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "video_path",
    "image_file",
    "video_file",
]
TEXT_COLUMNS = [
    "caption",
    "captions",
    "text",
    "texts",
    "sentence",
    "sentences",
    "description",
    "raw",
    "title",
    "prompt",
    "query",
]
ID_COLUMNS = ["id", "uid", "key", "image_id", "video_id", "item_id"]

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_PARQUET_ROWS = 128  # rows held at once; photos of COCO's size make about 20 MB of them


class Table:
    """One table, opened: its columns are known, its rows are read when iterated.

    `columns` of a JSON table are those of its first row; later rows may have others.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = self.path.parent
        if not self.path.is_file():
            what = "is a folder, expected a table" if self.path.is_dir() else "does not exist"
            raise UsageError(f"The table {printable(path)} {what}.", hint="Check the path.")
        self.format = _FORMATS.get(self.path.suffix.lower())
        if self.format is None:
            raise UsageError(
                f"{printable(path)} is not a table this version reads.",
                hint=f"Use one of: {', '.join(_FORMATS)}.",
            )
        self.columns = self._columns()

    def where(self, row: int) -> str:
        """How messages name a row; rows count from 1, after the header."""
        return f"{printable(self.path.name)}:{row}"

    def rows(
        self, columns: Sequence[str] | None = None, *, on_skip: Skip | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row number, cells) of every row. `columns` says which are needed; Parquet reads only those.

        A row that cannot be read goes to `on_skip`, or raises `UsageError` where there is none.
        """
        if self.format == "csv":
            return self._csv(on_skip)
        if self.format == "parquet":
            return self._parquet(columns)
        return self._json(on_skip)

    def metadata(self) -> Mapping[bytes, bytes]:
        """The key-value metadata of a Parquet schema; empty for other tables."""
        return (self._open_parquet().schema_arrow.metadata or {}) if self.format == "parquet" else {}

    def column(self, given: str | None, known: Sequence[str], what: str, option: str) -> str:
        """The column that the caller named, or the first whose name says that it holds `what`."""
        found = self.find(given, known)
        if found is None:
            there = ", ".join(map(repr, self.columns)) or "none"
            asked = f"no column {given!r}" if given is not None else f"no column that names itself {what}"
            raise UsageError(
                f"The table {printable(self.path)} has {asked}. Its columns: {there}.",
                hint=f"Name the column of {what} with {option}=.",
            )
        return found

    def find(self, given: str | None, known: Sequence[str]) -> str | None:
        if given is not None:
            return given if given in self.columns else None
        lower: dict[str, str] = {}
        for name in self.columns:
            lower.setdefault(name.lower(), name)
        return next((lower[name] for name in known if name in lower), None)

    # ------------------------------------------------------------------------------- the formats

    def _columns(self) -> tuple[str, ...]:
        if self.format == "parquet":
            return tuple(self._open_parquet().schema_arrow.names)
        if self.format == "csv":
            header = next(self._csv_lines(), (0, []))[1]
            twice = sorted({name for name in header if header.count(name) > 1})
            if not header or twice:
                problem = f"names {', '.join(twice)} twice" if twice else "is empty"
                raise UsageError(f"The header of {printable(self.path)} {problem}.")
            return tuple(header)
        first = next(self._json(lambda where, why: None), None)
        if first is None:
            raise UsageError(f"The table {printable(self.path)} holds no JSON object, expected one a row.")
        return tuple(first[1])

    def _csv_lines(self) -> Iterator[tuple[int, list[str]]]:
        tab = self.path.suffix.lower() != ".csv"
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if tab else ",")
            number = 0
            try:
                for line in reader:
                    if line:
                        yield number, line
                        number += 1
            except (csv.Error, UnicodeDecodeError) as error:
                raise UsageError(
                    f"{printable(self.path)}, line {reader.line_num + 1}: it is no readable CSV ({error}).",
                    hint="Save it as UTF-8 text with one row a line.",
                ) from error

    def _csv(self, on_skip: Skip | None) -> Iterator[tuple[int, dict[str, Any]]]:
        lines = self._csv_lines()
        next(lines, None)
        for number, line in lines:
            if len(line) != len(self.columns):
                why = f"expected {len(self.columns)} cells as in the header, got {len(line)}"
                skip_row(self.where(number), why, on_skip)
            else:
                yield number, dict(zip(self.columns, line))

    def _json(self, on_skip: Skip | None) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, value in enumerate(self._json_values(on_skip), 1):
            if isinstance(value, dict):
                yield number, value
            elif not isinstance(value, json.JSONDecodeError):
                why = f"expected a JSON object, got a {type(value).__name__}"
                skip_row(self.where(number), why, on_skip)

    def _json_values(self, on_skip: Skip | None) -> Iterator[Any]:
        if self.format == "json":
            values = read_json(self.path)
            if not isinstance(values, list):
                raise UsageError(
                    f"{printable(self.path)} holds a JSON {type(values).__name__}, expected a list of rows."
                )
            yield from values
            return
        number = 0
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                for line in file:
                    if not line.strip():
                        continue
                    number += 1
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        skip_row(self.where(number), f"it is no JSON ({error})", on_skip)
                        yield error
        except UnicodeDecodeError as error:
            raise UsageError(f"{printable(self.path)} is not UTF-8 text ({error}).") from error

    def _open_parquet(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.path, memory_map=True, pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(
                f"{printable(self.path)} is no readable Parquet file ({error}).", hint="Copy it again."
            ) from error

    def _parquet(self, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow as pa

        number = 0
        wanted = None if columns is None else list(dict.fromkeys(columns))
        with self._open_parquet() as file:
            try:
                for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
            except (pa.ArrowInvalid, OSError) as error:
                raise UsageError(
                    f"{printable(self.path)} is damaged after row {number} ({error}).", hint="Copy it again."
                ) from error


def read_pairs(
    source: str | Path | Sequence[str | Path],
    *,
    media_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    media_root: str | Path | None = None,
    on_skip: Skip | None = None,
) -> Iterator[Pair]:
    """Pairs of a picture or clip with its texts from one table or several, as a stream.

    Columns that are not named are found by their usual names (`image`, `path`, `video` ...;
    `caption`, `text` ...). A list in the text column gives several texts. Columns `start` and `end`,
    in seconds, make a clip of a video. Without an id column the id is `table.csv:7`, the seventh row.
    Paths are not looked at: a file that is missing shows when it is read.

    A row without media or text goes to `on_skip(row, reason)`; where there is none it raises
    `UsageError`, as does a table without those columns.
    """
    paths = [source] if isinstance(source, str | Path) else list(source)
    if not paths:
        raise UsageError("There is no table to read.")
    # all are opened before the first row is read, so that a wrong column is not found hours later
    plans = []
    for path in paths:
        table = Table(path)
        media = table.column(media_column, MEDIA_COLUMNS, "pictures or videos", "media_column")
        text = table.column(text_column, TEXT_COLUMNS, "texts", "text_column")
        if id_column is not None:
            table.column(id_column, (), "ids", "id_column")
        plans.append((table, media, text, table.find(id_column, ID_COLUMNS)))
    return _pairs(plans, media_root, on_skip)


def _pairs(
    plans: Sequence[tuple[Table, str, str, str | None]], media_root: str | Path | None, on_skip: Skip | None
) -> Iterator[Pair]:
    for table, media_name, text_name, id_name in plans:
        root = Path(media_root) if media_root is not None else table.folder
        spans = span_columns(table)
        wanted = [media_name, text_name, *spans, *([id_name] if id_name is not None else [])]
        for number, row in table.rows(wanted, on_skip=on_skip):
            media = media_cell(row.get(media_name), root, row if spans else None)
            texts = text_cell(row.get(text_name))
            if isinstance(media, str) or not texts:
                skip_row(table.where(number), media if isinstance(media, str) else "it has no text", on_skip)
                continue
            yield Pair(row_id(table, number, row, id_name), media, texts)


def row_id(table: Table, number: int, row: Mapping[str, Any], id_name: str | None) -> str:
    value = row.get(id_name) if id_name is not None else None
    return table.where(number) if value is None or value == "" else str(value)


def span_columns(table: Table) -> tuple[str, ...]:
    """`start` and `end` where the table has both."""
    return ("start", "end") if {"start", "end"} <= set(table.columns) else ()


def media_cell(value: Any, root: Path, row: Mapping[str, Any] | None = None) -> Media | str:
    """What a cell holds: a clip, encoded bytes, or a sentence that says why neither.

    `row` holds `start` and `end` in seconds where the table has them.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value) or "its picture has no bytes"
    if value is None or value == "":
        return "it names no picture or video"
    if not isinstance(value, str):
        return f"expected a path or bytes as its picture or video, got a {type(value).__name__}"
    if value.startswith(("http://", "https://")):
        return f"{printable(value)} is a web address, expected a file: download it first"
    path = root / value
    if row is None or media_kind(path) == "picture":
        return Clip(path)
    cells = row.get("start"), row.get("end")
    if all(cell in (None, "") for cell in cells):
        return Clip(path)
    try:
        start, end = (float(cell) for cell in cells)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return f"expected seconds as start and end, got {cells[0]!r} and {cells[1]!r}"
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start <= end):
        return f"expected 0 <= start <= end in seconds, got {start:g} and {end:g}"
    return Clip(path, TimeSpan(start, end))


def text_cell(value: Any) -> tuple[str, ...]:
    """The texts of a cell, a string or a list of them, without the empty ones."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text for v in values if isinstance(v, str) and (text := v.strip()))


def skip_row(where: str, why: str, on_skip: Skip | None) -> None:
    if on_skip is None:
        raise UsageError(f"{where}: {why}.", hint="Mend the row, or pass on_skip= to go on without it.")
    on_skip(where, why)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"{printable(path)} does not exist.", hint="Check the path.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{printable(path)} is no JSON ({error}).") from error
