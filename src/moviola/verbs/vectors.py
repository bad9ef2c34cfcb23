"""Files of vectors: Parquet with a row per vector, or `.npy` with a `.npy.json` beside it.

Both are written as a stream and appear whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

import numpy as np

from moviola.files import atomic
from moviola.types import UsageError, printable

_KEY = b"moviola"
_FORMAT = 1
_GROUP_ROWS = 4096  # rows of one Parquet row group: small ones make files slow to read


@dataclass(frozen=True, slots=True)
class Row:
    """What a vector stands for: a file (`start` to `end` seconds; 0 and 0 for a picture) or a text."""

    kind: Literal["picture", "video", "frame", "text"]
    file: str | None = None
    text: str | None = None
    start: float = 0.0
    end: float = 0.0


class Sink(Protocol):
    """Where vectors go. Leaving the `with` block without an error keeps the file."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def add(self, rows: Sequence[Row], vectors_ND: np.ndarray) -> None: ...


def sink_for(to: str | Path, dim: int, about: Mapping[str, Any]) -> Sink:
    """The writer that the file's ending asks for; `about` is kept with the vectors."""
    path = Path(to)
    if path.is_dir():
        raise UsageError(f"{printable(path)} is a folder, expected a file for the vectors.")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _ParquetSink(path, dim, about)
    if path.suffix.lower() == ".npy":
        return _NpySink(path, dim, about)
    raise UsageError(
        f"Vectors are written as .parquet or .npy, got {printable(path.name)!r}.",
        hint="For example: --to vectors.parquet",
    )


class _ParquetSink:
    def __init__(self, path: Path, dim: int, about: Mapping[str, Any]) -> None:
        import pyarrow as pa

        self.path = path
        metadata = {_KEY: json.dumps({"format": _FORMAT, **about}).encode()}
        self.schema = pa.schema(
            [
                ("kind", pa.string()),
                ("file", pa.string()),
                ("text", pa.string()),
                ("start", pa.float64()),
                ("end", pa.float64()),
                ("vector", pa.list_(pa.float32(), dim)),
            ],
            metadata=metadata,
        )
        self.dim = dim
        self.stack = ExitStack()
        self.waiting: list[Any] = []
        self.count = 0

    def __enter__(self) -> Self:
        import pyarrow.parquet as pq

        with ExitStack() as stack:
            file = stack.enter_context(atomic(self.path))
            self.writer = stack.enter_context(pq.ParquetWriter(file, self.schema, compression="zstd"))
            self.stack = stack.pop_all()
        return self

    def add(self, rows: Sequence[Row], vectors_ND: np.ndarray) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(vectors_ND, dtype=np.float32).reshape(-1))
        columns = [
            pa.array([row.kind for row in rows], pa.string()),
            pa.array([_storable(row.file) for row in rows], pa.string()),
            pa.array([_storable(row.text) for row in rows], pa.string()),
            pa.array([row.start for row in rows], pa.float64()),
            pa.array([row.end for row in rows], pa.float64()),
            pa.FixedSizeListArray.from_arrays(flat, self.dim),
        ]
        self.waiting.append(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        self.count += len(rows)
        if self.count >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.waiting:
            self.writer.write_table(pa.Table.from_batches(self.waiting))
        self.waiting, self.count = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.stack.__exit__(kind, error, trace)
            return
        with self.stack:
            self._flush()


class _NpySink:
    def __init__(self, path: Path, dim: int, about: Mapping[str, Any]) -> None:
        self.path, self.dim, self.about = path, dim, dict(about)
        self.rows: list[Row] = []
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.file: IO[Any] = self.stack.enter_context(atomic(self.path))
        _npy_header(self.file, 0, self.dim)
        return self

    def add(self, rows: Sequence[Row], vectors_ND: np.ndarray) -> None:
        self.rows += rows
        self.file.write(np.ascontiguousarray(vectors_ND, dtype="<f4").data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            # NumPy pads the header so that the number of rows can grow without moving the data.
            self.file.seek(0)
            _npy_header(self.file, len(self.rows), self.dim)
            listed = [{**asdict(row), "file": _storable(row.file)} for row in self.rows]
            with self.stack, atomic(sidecar(self.path)) as beside:
                text = json.dumps({"format": _FORMAT, **self.about, "rows": listed}, ensure_ascii=True)
                beside.write(text.encode() + b"\n")
            return
        self.stack.__exit__(kind, error, trace)


def _npy_header(file: IO[Any], count: int, dim: int) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
    )


def sidecar(path: str | Path) -> Path:
    """The JSON file beside a `.npy`, with the rows and the model."""
    return Path(f"{path}.json")


def read_vectors(path: str | Path) -> tuple[list[Row], np.ndarray, dict[str, Any]]:
    """Rows, vectors_ND and what is known of their model, from a file that `embed` wrote."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"The file of vectors {printable(path)} does not exist.")
    if path.suffix.lower() == ".npy":
        if not sidecar(path).is_file():
            raise UsageError(
                f"{printable(sidecar(path))} is missing: the vectors in {printable(path)} have no names."
            )
        about = json.loads(sidecar(path).read_text(encoding="utf-8"))
        rows = [Row(**row) for row in about.pop("rows")]
        vectors_ND = np.load(path, allow_pickle=False)
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        stored = (table.schema.metadata or {}).get(_KEY)
        if stored is None:
            raise UsageError(f"{printable(path)} is not a file of vectors that moviola wrote.")
        about = json.loads(stored)
        names = ("kind", "file", "text", "start", "end")
        rows = [Row(*cells) for cells in zip(*(table.column(name).to_pylist() for name in names))]
        flat = table.column("vector").combine_chunks().flatten().to_numpy()
        vectors_ND = flat.reshape(len(rows), about["dim"])
    if len(rows) != len(vectors_ND):
        raise UsageError(f"{printable(path)} holds {len(vectors_ND)} vectors for {len(rows)} rows.")
    return rows, vectors_ND, about


def _storable(text: str | None) -> str | None:
    """Names with bytes that are no UTF-8 are escaped, since these formats hold only UTF-8."""
    if text is None:
        return None
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
