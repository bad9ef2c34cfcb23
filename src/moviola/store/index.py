"""Reading an index: one consistent state, opened in milliseconds, whatever a writer does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from moviola.store.format import (
    FileRow,
    Manifest,
    files_from,
    open_segment,
    read_manifest,
)
from moviola.store.scan import exact_scores
from moviola.types import StoreError, printable

# A writer may replace the state between reading the manifest and opening its files; then the new
# manifest is read. More rounds than this can only mean missing files.
_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Units:
    """The live rows of an index, sorted by file and start. Arrays of one length N.

    file_N   position in `Index.files`
    start_N, end_N  seconds (equal for a frame, both 0 for a picture)
    shot_N   number of the shot within its file
    norm_N   length of the vector before it was made a unit vector
    row_N    position among all stored rows
    """

    file_N: np.ndarray
    start_N: np.ndarray
    end_N: np.ndarray
    shot_N: np.ndarray
    norm_N: np.ndarray
    row_N: np.ndarray

    def __len__(self) -> int:
        return len(self.file_N)

    def bounds(self, files: int) -> np.ndarray:
        """Where each file's rows begin: (files + 1,), so file f has rows `bounds[f]:bounds[f + 1]`."""
        return np.searchsorted(self.file_N, np.arange(files + 1))


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text with its place: a file's name (`source="name"`, no time) or a subtitle."""

    file: int
    start: float
    end: float
    text: str
    source: str


class Index:
    """One state of an index, read only. Later commits do not change it; open it again to see them.

    >>> Index("my.index").files[0].file                                       # doctest: +SKIP
    '/home/me/videos/beach.mp4'
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for _ in range(_ROUNDS):
            self.manifest: Manifest = read_manifest(self.folder)
            try:
                files = open_segment(self.folder, self.manifest.files)
                self._units = [open_segment(self.folder, one.name) for one in self.manifest.units]
                self._texts = [open_segment(self.folder, one.name) for one in self.manifest.texts]
                break
            except FileNotFoundError as error:
                missing = error
        else:
            raise StoreError(
                f"The index {printable(self.folder)} is damaged: a file it lists is missing ({missing}).",
                hint="Delete the folder and run 'moviola index' again.",
            )
        rows = files_from(files)
        self.files: list[FileRow] = [rows[path] for path in sorted(rows)]

    @cached_property
    def position(self) -> dict[bytes, int]:
        """Path to position in `files`."""
        return {row.path: i for i, row in enumerate(self.files)}

    def _file_of(self, take_N: np.ndarray, take_of: Callable[[FileRow], int]) -> np.ndarray:
        """Position in `files` of each row's take, -1 where the row no longer counts."""
        if not self.files:
            return np.full(len(take_N), -1, dtype=np.int64)
        take_F = np.array([take_of(row) for row in self.files], dtype=np.int64)
        order_F = np.argsort(take_F)
        take_F = take_F[order_F]
        at_N = np.minimum(np.searchsorted(take_F, take_N), len(take_F) - 1)
        return np.where(take_F[at_N] == take_N, order_F[at_N], -1)

    def _column(self, name: str) -> np.ndarray:
        parts = [
            chunk.to_numpy(zero_copy_only=False) for table in self._units for chunk in table[name].chunks
        ]
        dtype = {"take": np.int64, "shot": np.int32, "norm": np.float32}.get(name, np.float64)
        return np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype, copy=False)

    @cached_property
    def units(self) -> Units:
        file_N, start_N = self._file_of(self._column("take"), lambda row: row.take), self._column("start")
        live_N = np.flatnonzero(file_N >= 0)
        row_N = live_N[np.lexsort((start_N[live_N], file_N[live_N]))]
        return Units(
            file_N=file_N[row_N],
            start_N=start_N[row_N],
            end_N=self._column("end")[row_N],
            shot_N=self._column("shot")[row_N],
            norm_N=self._column("norm")[row_N],
            row_N=row_N,
        )

    @cached_property
    def _chunks(self) -> list[np.ndarray]:
        """Stored vectors as mapped (n, D) float16 arrays, in storage order."""
        dim = self.manifest.model.dim
        return [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, dim)
            for table in self._units
            for chunk in table["vector"].chunks
        ]

    @cached_property
    def _starts(self) -> np.ndarray:
        """First storage row of each chunk."""
        return np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    def scores(self, queries_QD: np.ndarray) -> np.ndarray:
        """Cosines of every unit with unit queries: queries_QD -> (N, Q) float32, in the order of `units`."""
        dim = self.manifest.model.dim
        if queries_QD.ndim != 2 or queries_QD.shape[1] != dim:
            raise StoreError(f"The index holds vectors of {dim} numbers, got a query of {queries_QD.shape}.")
        return exact_scores(self._chunks, queries_QD)[self.units.row_N]

    def vectors(self, units: np.ndarray, *, unit_length: bool = True) -> np.ndarray:
        """Vectors of some units (positions in `units`) as (n, D) float32.

        `unit_length=False` gives them back their former lengths, as encoders' `score` wants them.
        """
        rows = self.units.row_N[units]
        chunk_of = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), self.manifest.model.dim), dtype=np.float32)
        for i, (row, chunk) in enumerate(zip(rows, chunk_of, strict=True)):
            out[i] = self._chunks[chunk][row - self._starts[chunk]]
        return out if unit_length else out * self.units.norm_N[units][:, None]

    def thumbnail(self, unit: int) -> bytes | None:
        """The JPEG stored with a unit, None where the unit has none."""
        row = int(self.units.row_N[unit])
        for table in self._units:
            if row < table.num_rows:
                return table["thumbnail"][row].as_py()
            row -= table.num_rows
        raise IndexError(unit)

    @cached_property
    def texts(self) -> list[TextRow]:
        """File names and subtitles of the files that count, by file and time."""
        if not self._texts:
            return []
        table = pa.concat_tables(self._texts)
        file_N = self._file_of(table["take"].to_numpy(), lambda row: row.texts_of)
        columns = [table[name].to_pylist() for name in ("start", "end", "text", "source")]
        rows = [
            TextRow(int(file), *values)
            for file, values in zip(file_N, zip(*columns, strict=True), strict=True)
            if file >= 0
        ]
        return sorted(rows, key=lambda row: (row.file, row.start))

    @property
    def bytes_on_disk(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.manifest.names)
