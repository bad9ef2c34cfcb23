"""The pairs that `moviola reinforce` reads: rows with a picture and captions, numbered, from any row on.

Parquet, CSV, TSV and JSON Lines tables, and WebDataset tars (also compressed). What cannot be used comes
as a row that says why, so that two passes number the rows alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moviola.data.pairs import PAIR_ID_COLUMNS, PAIR_TEXT_COLUMNS, PairError, PairFile
from moviola.data.pairs.jsonl import parsed
from moviola.data.pairs.streams import DAMAGE, damaged, opened
from moviola.data.pairs.tar import TarError, TarReader
from moviola.data.pairs.webdataset import KEY, webdataset_columns
from moviola.data.tables import MEDIA_COLUMNS, Table, media_cell, text_cell
from moviola.types import Clip, UsageError, printable

NO_PICTURE = "row has no picture"
NO_CAPTION = "row has no caption"
BAD_ROW = "row cannot be read"
DAMAGED = "the file is damaged from here on"

_ROWS = 64  # of a Parquet file, held at once
PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row of a file, from 0. `problem` is why it cannot be used, with `detail`; None for a good one."""

    number: int
    id: str
    picture: Path | bytes = b""
    captions: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    problem: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Source:
    """One file of pairs and the columns that are read of it."""

    file: PairFile
    pictures: tuple[str, ...]
    """The first of these that a row has; a tar may hold .jpg and .png."""
    texts: tuple[str, ...]
    synthetic: tuple[str, ...]
    id: str | None
    root: Path

    @classmethod
    def open(
        cls,
        file: PairFile,
        *,
        picture: str | None = None,
        texts: Sequence[str] = (),
        synthetic: Sequence[str] = (),
        id: str | None = None,
        root: str | Path | None = None,
    ) -> Source:
        """Columns that are not named are found by their usual names; `UsageError` names those there."""
        if file.format != "webdataset" and file.compression is not None:
            raise UsageError(
                f"{printable(file.path)} is compressed, which only WebDataset tars may be here.",
                hint="Unpack it first.",
            )
        there = webdataset_columns(file) if file.format == "webdataset" else Table(file.path).columns
        lower: dict[str, str] = {}
        for name in there:
            lower.setdefault(name.lower(), name)

        def find(asked: str | None, known: Sequence[str], what: str, option: str | None) -> str | None:
            found = next((lower[n] for n in known if n in lower), None) if asked is None else asked
            if (found is None or found not in there) and (asked is not None or option is not None):
                named = f"no column {asked!r}" if asked is not None else f"no column that names itself {what}"
                raise UsageError(
                    f"{printable(file.path)} has {named}. Its columns: {', '.join(map(repr, there))}.",
                    hint=f"Name the column of {what}{f' with {option}' if option else ''}.",
                )
            return found

        endings = PICTURE_ENDINGS if file.format == "webdataset" else MEDIA_COLUMNS
        found = str(find(picture, endings, "pictures", "--image-column"))
        several = file.format == "webdataset" and picture is None
        captions = [find(name, PAIR_TEXT_COLUMNS, "captions", "--text-column") for name in texts or (None,)]
        made = [find(name, (), "synthetic captions", "--synthetic") for name in synthetic]
        return cls(
            file,
            PICTURE_ENDINGS if several else (found,),
            tuple(map(str, captions)),
            tuple(map(str, made)),
            find(id, PAIR_ID_COLUMNS, "ids", None),
            Path(root) if root is not None else file.path.parent,
        )

    def count(self) -> int:
        """How many rows `rows()` gives, without reading pictures."""
        if self.file.format == "parquet":
            with pq.ParquetFile(self.file.path) as parquet:
                return parquet.metadata.num_rows
        if self.file.format == "webdataset":
            return sum(1 for _ in self._samples(0, frozenset()))
        return sum(1 for _ in self._table())

    def rows(self, start: int = 0) -> Iterator[SourceRow]:
        """Every row from `start` on. A file that breaks gives a last row whose problem is `DAMAGED`."""
        for number, cells in self._cells(start):
            if number >= start:
                yield cells if isinstance(cells, SourceRow) else self._row(number, cells)

    def _cells(self, start: int) -> Iterator[tuple[int, Mapping[str, Any] | SourceRow]]:
        if self.file.format == "parquet":
            return self._parquet(start)
        if self.file.format == "webdataset":
            return self._samples(start, frozenset(self._names()))
        return self._table()

    def _names(self) -> list[str]:
        names = [*self.pictures, *self.texts, *self.synthetic, *([self.id] if self.id else [])]
        return list(dict.fromkeys(names))

    def _row(self, number: int, cells: Mapping[str, Any]) -> SourceRow:
        name = cells.get(self.id) if self.id is not None else None
        if name is None or name == "":
            id = self._where(number)
        else:
            id = _text(name) or self._where(number) if isinstance(name, bytes) else str(name)
        cell = next((cells[name] for name in self.pictures if cells.get(name)), None)
        media = media_cell(cell, self.root)
        if isinstance(media, str):
            return SourceRow(number, id, problem=NO_PICTURE, detail=media)
        captions, synthetic = self._texts(cells, self.texts), self._texts(cells, self.synthetic)
        if not captions:
            return SourceRow(number, id, problem=NO_CAPTION, detail="it has no text")
        return SourceRow(number, id, media.path if isinstance(media, Clip) else media, captions, synthetic)

    @staticmethod
    def _texts(cells: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
        found: list[str] = []
        for name in names:
            cell = cells.get(name)
            items = cell if isinstance(cell, list | tuple) else [cell]
            found += text_cell([_text(item) if isinstance(item, bytes) else item for item in items])
        return tuple(dict.fromkeys(found))

    def _where(self, number: int) -> str:
        return f"{self.file.name}:{number}"

    def _broken(self, number: int, why: str) -> tuple[int, SourceRow]:
        return number, SourceRow(number, self._where(number), problem=DAMAGED, detail=why)

    # ------------------------------------------------------------------------------- the formats

    def _parquet(self, start: int) -> Iterator[tuple[int, Mapping[str, Any] | SourceRow]]:
        names, number = self._names(), 0
        try:
            with pq.ParquetFile(self.file.path, pre_buffer=False, page_checksum_verification=True) as parquet:
                for group in range(parquet.metadata.num_row_groups):
                    size = parquet.metadata.row_group(group).num_rows
                    if number + size <= start:
                        number += size
                        continue
                    for batch in parquet.iter_batches(_ROWS, row_groups=[group], columns=names):
                        if number + batch.num_rows > start:
                            yield from zip(range(number, number + batch.num_rows), batch.to_pylist())
                        number += batch.num_rows
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            yield self._broken(number, " ".join(str(error).split()))

    def _table(self) -> Iterator[tuple[int, Mapping[str, Any] | SourceRow]]:
        """CSV, TSV or JSON Lines. Rows that cannot be read keep their numbers."""
        passed: list[SourceRow] = []
        number = -1
        broken: str | None = None

        def on_skip(where: str, why: str) -> None:
            at = int(where.rpartition(":")[2]) - 1  # `Table` counts from 1
            passed.append(SourceRow(at, self._where(at), problem=BAD_ROW, detail=why))

        rows = Table(self.file.path).rows(on_skip=on_skip)
        while True:
            try:
                item = next(rows, None)
            except UsageError as error:
                item, broken = None, error.problem
            for one in passed:
                number = one.number
                yield one.number, one
            passed.clear()
            if broken is not None:
                yield self._broken(number + 1, broken)
            if item is None:
                return
            number = item[0] - 1
            yield number, item[1]

    def _samples(
        self, start: int, names: frozenset[str]
    ) -> Iterator[tuple[int, Mapping[str, Any] | SourceRow]]:
        """The samples of a tar: runs of files that share their name up to its first dot."""
        number, key = -1, None
        cells: dict[str, Any] = {}
        wanted = {"json" if name.startswith("json.") else name for name in names}
        try:
            with opened(self.file) as stream:
                length = self.file.path.stat().st_size if self.file.compression is None else None
                for member in (reader := TarReader(stream, length)):
                    folder, slash, name = member.name.rpartition("/")
                    stem, dot, ending = name.partition(".")
                    if not stem or not dot or (name.startswith("__") and name.endswith("__")):
                        continue  # hidden files, names without an ending, remarks: as `data.pairs` has it
                    if f"{folder}{slash}{stem}" != key:
                        if key is not None and number >= start:
                            yield number, cells
                        number, key = number + 1, f"{folder}{slash}{stem}"
                        cells = {KEY: key}
                    ending = ending.lower()
                    if ending in wanted and number >= start:
                        body = reader.read()
                        if ending != "json":
                            cells[ending] = body
                            continue
                        value = parsed(body)
                        if isinstance(value, dict):
                            cells.update({f"json.{name}": cell for name, cell in value.items()})
        except (*DAMAGE, TarError) as error:
            # the sample that was being read may lack files
            yield self._broken(max(number, 0), damaged(self.file, error).reason)
            return
        if key is not None and number >= start:
            yield number, cells


def _text(data: bytes) -> str:
    """Bytes as text; "" where they are no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


__all__ = ["BAD_ROW", "DAMAGED", "NO_CAPTION", "NO_PICTURE", "PairError", "Source", "SourceRow"]
