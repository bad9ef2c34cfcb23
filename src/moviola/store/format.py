"""What an index folder holds: names, schemas, and the manifest that makes a state complete.

An index is a folder of immutable Arrow files (Feather version 2, readable by pandas, polars and
DuckDB) and one small JSON manifest that lists them. A state exists once the manifest that names it
has been renamed into place; everything else in the folder is rubbish from a run that was killed. So
readers never see half a commit, and nothing has to be repaired. docs/index-format.md describes each
column and gives the measurements behind the choice.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from moviola.types import StoreError, printable

FORMAT = 2
MANIFEST = "moviola-index.json"
LOCK = "writer.lock"
OUR_PREFIXES = ("units-", "texts-", "files-", MANIFEST, LOCK)

TEXTS_SCHEMA = pa.schema(
    [
        ("take", pa.int64()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("text", pa.string()),
        ("source", pa.string()),
    ]
)
FILES_SCHEMA = pa.schema(
    [
        ("take", pa.int64()),
        ("id", pa.string()),
        ("path", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("kind", pa.string()),
        ("duration", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("done_until", pa.float64()),
        ("units", pa.int64()),
        ("shots", pa.int64()),
        ("text_take", pa.int64()),
        ("sidecars", pa.string()),
    ]
)


def units_schema(dim: int) -> pa.Schema:
    """Rows of one embedded unit (a frame, a window or a picture) with a vector of `dim` numbers."""
    return pa.schema(
        [
            ("take", pa.int64()),
            ("start", pa.float64()),
            ("end", pa.float64()),
            ("shot", pa.int32()),
            ("norm", pa.float32()),
            ("vector", pa.list_(pa.float16(), dim)),
            ("thumbnail", pa.binary()),
        ]
    )


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Which model made the vectors; an index takes vectors of one model only.

    tokenizer   absolute path of the tokenizer that was given for a checkpoint without one; its content
                hash stands in the recipe. None where the checkpoint has its own, or none was given
    """

    name: str
    hash: str
    system: str
    source: str
    dim: int
    recipe_hash: str
    recipe: dict[str, Any]
    has_text: bool = True
    separable: bool = True
    tokenizer: str | None = None

    def same_vectors(self, other: ModelCard) -> bool:
        """True when vectors of both may be compared: same weights, same preparation, same width.

        A model loaded without its tokenizer makes the same vectors of pictures, so it counts as the same.
        """
        if (self.tokenizer_hash is None) != (other.tokenizer_hash is None):
            return self._pictures == other._pictures
        return (self.hash, self.recipe_hash, self.dim) == (other.hash, other.recipe_hash, other.dim)

    def same_but_tokenizer(self, other: ModelCard) -> bool:
        """True when the two have different tokenizers and nothing else differs."""
        known = None not in (self.tokenizer_hash, other.tokenizer_hash)
        return known and self._pictures == other._pictures and self.tokenizer_hash != other.tokenizer_hash

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the tokenizer's content, whatever file it came from; None without a tokenizer."""
        return self.recipe.get("tokenizer")

    @property
    def _pictures(self) -> tuple[str, int, str]:
        """All that decides the vectors of pictures: weights, width, and the recipe but its tokenizer."""
        rest = {key: value for key, value in self.recipe.items() if key != "tokenizer"}
        return self.hash, self.dim, json.dumps(rest, sort_keys=True)

    def __str__(self) -> str:
        return f"'{self.name}' (weights {self.hash[:8]}, recipe {self.recipe_hash[:8]})"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How videos were cut into units: a frame per `every` seconds, key frames only, or windows.

    `window` is the number of frames a clip encoder sees at once, `hop` by how many frames
    neighbouring windows are apart; None where each frame is a unit of its own.
    """

    every: float = 1.0
    keyframes: bool = False
    window: int | None = None
    hop: int | None = None

    @property
    def step(self) -> float:
        """Seconds between neighbouring units (for key frames: an upper guess, times are stored)."""
        return self.every * (self.hop or 1)

    def __str__(self) -> str:
        frames = "key frames only" if self.keyframes else f"a frame every {self.every:g} s"
        return f"{frames}, in windows of {self.window}" if self.window else frames


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file of the index.

    take        number of the pass over the file whose rows count; a changed file gets a new one, so
                its old rows stop counting in the same instant
    status      done, partial (a long video whose rest is still to do) or failed
    reason      why it failed, or what of it could not be read; empty if all is well
    done_until  the last unit's start in seconds, -1 before the first
    text_take   number of the pass whose texts count, where they were read again since; None: `take`
    sidecars    mark of the subtitle files beside it when they were read (`media.sidecar_marks`); None
                where that is not known
    """

    take: int
    path: bytes
    size: int
    mtime_ns: int
    kind: str
    duration: float = 0.0
    status: str = "partial"
    reason: str = ""
    done_until: float = -1.0
    units: int = 0
    shots: int = 0
    text_take: int | None = None
    sidecars: str | None = None

    @property
    def texts_of(self) -> int:
        """The take that the texts that count were stored under."""
        return self.take if self.text_take is None else self.text_take

    @property
    def file(self) -> str:
        """The path as text; bytes that are not UTF-8 become surrogates, as everywhere in Python."""
        return os.fsdecode(self.path)


@dataclass(frozen=True, slots=True)
class Segment:
    """One immutable Arrow file of rows."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One complete state of an index."""

    model: ModelCard
    sampling: Sampling
    generation: int = 0
    next_take: int = 0
    files: str = ""
    units: tuple[Segment, ...] = ()
    texts: tuple[Segment, ...] = ()
    made_by: str = field(default_factory=lambda: f"moviola {importlib.metadata.version('moviola')}")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @property
    def names(self) -> set[str]:
        return {self.files, *(segment.name for segment in (*self.units, *self.texts))}


def file_id(path: bytes) -> str:
    """The public id of a file: 16 hex digits of a hash over its absolute path's bytes."""
    return hashlib.blake2b(path, digest_size=8).hexdigest()


def absolute_bytes(path: str | Path) -> bytes:
    """The absolute path as the system's own bytes; symbolic links are not followed."""
    return os.fsencode(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps "..")


def read_manifest(folder: Path) -> Manifest:
    """The current state, or `StoreError` when there is none that this version can read."""
    where = printable(folder)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise StoreError(
                f"There is no index at {where}.",
                hint=f"Make one with: moviola index VIDEOS --to {where}",
            ) from None
        raise StoreError(
            f"{where} is not a Moviola index: expected the file {MANIFEST} in it, which is missing.",
            hint="Name the folder that 'moviola index ... --to' wrote.",
        ) from None
    except OSError as error:
        raise StoreError(f"The index {where} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError:
        raise _damaged(where, f"{MANIFEST} is not text") from None
    try:
        data = json.loads(text)
        version = data["format"]
    except (ValueError, KeyError, TypeError):
        raise _damaged(where, f"{MANIFEST} is not the JSON this version wrote") from None
    if not isinstance(version, int) or version > FORMAT:
        raise StoreError(
            f"The index {where} has format {version}, but this Moviola reads up to {FORMAT} "
            f"(the index was made by {data.get('made_by', 'a newer version')}).",
            hint="Upgrade with: pip install -U moviola",
        )
    try:
        return Manifest(
            model=ModelCard(**data["model"]),
            sampling=Sampling(**data["sampling"]),
            generation=data["generation"],
            next_take=data["next_take"],
            files=data["files"],
            units=tuple(Segment(**one) for one in data["units"]),
            texts=tuple(Segment(**one) for one in data["texts"]),
            made_by=data["made_by"],
        )
    except (KeyError, TypeError) as error:
        raise _damaged(where, f"{MANIFEST} lacks or misspells {error}") from None


def _damaged(where: str, what: str) -> StoreError:
    return StoreError(
        f"The index {where} is damaged: {what}.", hint="Delete the folder and run 'moviola index' again."
    )


def open_segment(folder: Path, name: str) -> pa.Table:
    """A segment mapped into memory: rows are read from disk only when looked at."""
    try:
        with pa.memory_map(os.fsdecode(folder / name)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as error:
        raise _damaged(printable(folder), f"{name} is not a complete Arrow file ({error})") from error


def files_table(rows: list[FileRow]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in FILES_SCHEMA.names}
    for row in rows:
        for name, values in columns.items():
            values.append(file_id(row.path) if name == "id" else getattr(row, name))
    return pa.table(columns, schema=FILES_SCHEMA)


def files_from(table: pa.Table) -> dict[bytes, FileRow]:
    """The rows of a files table by path."""
    names = [name for name in table.column_names if name != "id"]  # format 1 had fewer
    columns = [table[name].to_pylist() for name in names]
    rows = (FileRow(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True))
    return {row.path: row for row in rows}
