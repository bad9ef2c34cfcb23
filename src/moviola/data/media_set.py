"""A set of pictures or clips that is known by name and read one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from moviola.data.hashing import permutation
from moviola.data.tables import Media, Skip, Table, media_cell, skip_row, span_columns
from moviola.media import walk
from moviola.types import Clip, UsageError

Stream = Callable[[Collection[int] | None, Skip | None], Iterator[tuple[int, str, Media]]]


class MediaSet:
    """Items in an order that never changes. `ids` name them; pixels stay on the disk until `stream`."""

    def __init__(self, source: Path, ids: Sequence[str], stream: Stream, files: Sequence[Path]) -> None:
        self.source = source
        self.ids = tuple(ids)
        self._stream = stream
        self._files = tuple(files)

    def __len__(self) -> int:
        return len(self.ids)

    def stream(
        self, rows: Collection[int] | None = None, *, on_skip: Skip | None = None
    ) -> Iterator[tuple[int, str, Media]]:
        """(index, id, clip or encoded bytes) in order; of the indices in `rows` where that is given."""
        return self._stream(None if rows is None else frozenset(rows), on_skip)

    def sample(self, limit: int | None, seed: int = 0) -> list[int]:
        """Indices of at most `limit` items, drawn by hash so that every class has its share."""
        if limit is None or limit >= len(self):
            return list(range(len(self)))
        if limit < 1:
            raise UsageError(f"The limit must be at least 1, got {limit}.")
        return sorted(permutation(seed, 0, len(self))[:limit].tolist())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when an item comes, goes, or its file changes."""
        digest = hashlib.sha256()
        for name in self.ids:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        for path in self._files:
            digest.update(os.fsencode(path.absolute()))
            try:
                found = path.stat()
            except OSError:
                continue  # it will be reported when it is read
            digest.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


def file_stream(clips: Sequence[Clip], ids: Sequence[str]) -> Stream:
    """A stream over clips that are known already."""

    def stream(rows: Collection[int] | None, on_skip: Skip | None) -> Iterator[tuple[int, str, Media]]:
        for index, (name, clip) in enumerate(zip(ids, clips, strict=True)):
            if rows is None or index in rows:
                yield index, name, clip

    return stream


def table_stream(
    table: Table, media_name: str, numbers: Sequence[int], ids: Sequence[str], root: Path
) -> Stream:
    """A stream over the rows `numbers` of a table, in rising order; the table is read anew each time."""
    at = {number: index for index, number in enumerate(numbers)}
    spans = span_columns(table)

    def stream(rows: Collection[int] | None, on_skip: Skip | None) -> Iterator[tuple[int, str, Media]]:
        for number, row in table.rows([media_name, *spans], on_skip=lambda where, why: None):
            index = at.get(number)  # rows that are not in it were reported when the set was made
            if index is None or (rows is not None and index not in rows):
                continue
            media = media_cell(row.get(media_name), root, row if spans else None)
            if isinstance(media, str):
                skip_row(ids[index], media, on_skip)
            else:
                yield index, ids[index], media

    return stream


class Finder:
    """Finds media files below a folder by relative path, else by name, else by name without ending."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, *names: str) -> Path | str:
        """The file, or why there is none. `names` are relative paths, the likeliest first."""
        for name in names:
            if (self.root / name).is_file():
                return self.root / name
        last = Path(names[-1])
        if last.is_absolute():
            return "there is no such file"
        index = self._index()
        found = index.get(last.name) or index.get(f"{last.name}.*") or []
        if len(found) > 1:
            places = ", ".join(str(path.relative_to(self.root)) for path in found[:3])
            return f"{len(found)} files under the media folder have this name ({places})"
        return found[0] if found else "there is no such file under the media folder"

    def _index(self) -> dict[str, list[Path]]:
        if self._by_name is None:
            self._by_name = {}
            for found in walk(self.root):
                for key in (found.path.name, f"{found.path.stem}.*"):
                    self._by_name.setdefault(key, []).append(found.path)
        return self._by_name


def row_numbers(values: Sequence[int]) -> np.ndarray:
    """Integers as an array, also when there are none."""
    return np.array(values, dtype=np.int64)
