"""What a file or a folder of training rows offers to `RowSource`, and the columns that rows share.

A shard's rows are numbered from 0. Most shards read any row cheaply; Parquet reads a block of rows at a
time, so it names its blocks and what each weighs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moviola.data.pairs.batches import is_list
from moviola.data.tables import MEDIA_COLUMNS
from moviola.media.files import PICTURES, VIDEOS
from moviola.types import UsageError, printable

MEDIA = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
"""A cell of `image` or `video`: encoded bytes, or the path of a file, or neither; `path` starting with
`REFUSED` is the reason why there is neither."""
REFUSED = "\0"
BLOCK_ROWS = 4096
"""Rows of a block where any row can be read by itself."""

_VIDEO_NAMES = ("video", "clip", "video_path", "video_file")
_PICTURE_NAMES = ("image", "picture", "photo", "img", "image_path", "image_file")
_SHARED_NAMES = tuple(name for name in MEDIA_COLUMNS if name not in _VIDEO_NAMES + _PICTURE_NAMES)


class Shard(Protocol):
    """One file of rows, or one folder of pictures.

    name      for messages and ids, unique in a source
    columns   as they are stored
    media     `image` and `video` -> the stored column that holds the media
    root      where relative paths start; nothing outside it is read
    absolute  whether an absolute path may point elsewhere: in a list that somebody wrote on this machine
    files     (name, path) of what the fingerprint looks at
    ids       the stored column that names rows, None where there is none
    start_K   first row of each block; `bytes_K` what it weighs, 0 where any row is read by itself
    """

    name: str
    count: int
    columns: tuple[str, ...]
    media: dict[str, str]
    root: Path
    absolute: bool
    files: list[tuple[str, Path]]
    start_K: np.ndarray
    bytes_K: np.ndarray

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Stored columns of some rows, in the order asked; of cheap shards only."""
        ...

    def block(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Stored columns of a whole block; of shards with blocks that weigh something."""
        ...

    def close(self) -> None:
        """Let go of open files; the next read opens them again."""
        ...


class CheapShard:
    """The parts that are the same wherever a row is read by itself."""

    name: str
    count: int

    def blocks(self) -> None:
        """Blocks only group rows for the shuffle; they weigh nothing."""
        self.start_K = np.arange(0, max(self.count, 1), BLOCK_ROWS, dtype=np.int64)
        self.bytes_K = np.zeros(len(self.start_K), np.int64)

    def block(self, number: int, columns: Sequence[str]) -> pa.Table:
        first = int(self.start_K[number])
        return self.take(np.arange(first, min(first + BLOCK_ROWS, self.count)), columns)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        raise AssertionError("each shard reads its own rows")

    def close(self) -> None:
        """Nothing stays open between reads."""


def media_columns(columns: Sequence[str], renames: Mapping[str, str]) -> dict[str, str]:
    """Which stored columns hold pictures and videos: those renamed so, or those with a usual name."""
    lower: dict[str, str] = {}
    for name in columns:
        lower.setdefault(name.lower(), name)
    endings = {"image": PICTURES, "video": VIDEOS}
    usual = {"image": _PICTURE_NAMES, "video": _VIDEO_NAMES}
    found = {}
    for kind in ("image", "video"):
        names = [*usual[kind], *sorted(e[1:] for e in endings[kind]), *_SHARED_NAMES]
        stored = renames.get(kind)
        if stored is None:
            stored = next((lower[name] for name in names if name in lower), None)
        if stored in columns:
            found[kind] = str(stored)
    return found


def as_media(values: pa.ChunkedArray, shard: Shard, column: str) -> pa.Array:
    """A stored column as `MEDIA`: paths are made absolute, those that lead out of the root are refused."""
    array = plain(values)
    kind = array.type
    if pa.types.is_struct(kind):
        names = [f.name for f in kind]
        data = pc.struct_field(array, "bytes") if "bytes" in names else pa.nulls(len(array))
        paths = pc.struct_field(array, "path") if "path" in names else pa.nulls(len(array))
        if "bytes" in names or "path" in names:
            return _media(data, paths, shard)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _media(array, pa.nulls(len(array)), shard)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return _media(pa.nulls(len(array)), array, shard)
    raise UsageError(
        f"The column {column!r} of {printable(shard.name)} holds {kind}, expected encoded pictures (bytes), "
        "{bytes, path} structs or paths.",
        hint="Name the column of pictures with --column image=NAME (columns={'image': 'NAME'}).",
    )


def _media(data: pa.Array, paths: pa.Array, shard: Shard) -> pa.Array:
    data = data.cast(pa.large_binary())
    paths = paths.cast(pa.large_string())
    wanted = pc.and_(pc.is_null(data), pc.is_valid(paths)).to_numpy(zero_copy_only=False)
    told: list[str | None] = [None] * len(paths)
    for row in np.flatnonzero(wanted).tolist():
        told[row] = _resolved(paths[row].as_py(), shard)
    return pa.StructArray.from_arrays([data, pa.array(told, pa.large_string())], fields=list(MEDIA))


def _resolved(path: str, shard: Shard) -> str | None:
    """The path as a file name, `REFUSED` and a reason, or None for none."""
    if not path.strip():
        return None
    if path.startswith(("http://", "https://")):
        return f"{REFUSED}{printable(path)} is a web address, expected a file: download it first"
    if "\0" in path:
        return f"{REFUSED}its path holds a zero byte"
    root = os.path.abspath(shard.root)  # noqa: PTH100 (links stay: data folders are often links)
    full = os.path.normpath(os.path.join(root, path))  # noqa: PTH118
    inside = full == root or full.startswith(root.rstrip(os.sep) + os.sep)
    if inside or (shard.absolute and Path(path).is_absolute() and ".." not in Path(path).parts):
        return full
    return f"{REFUSED}{printable(path)} leads out of {printable(shard.root)}: name a root that holds it"


# --------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------


def plain(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array without dictionaries and views; binary columns take large offsets so that any sum fits."""
    if isinstance(values, pa.ChunkedArray):
        chunks = [plain(chunk) for chunk in values.chunks]
        if not chunks:
            return plain(pa.array([], values.type))
        return chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    kind = values.type
    if pa.types.is_dictionary(kind):
        return plain(values.dictionary_decode())
    if pa.types.is_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return values.cast(pa.large_binary())
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.large_string())
    if isinstance(kind, pa.BaseExtensionType):
        return plain(values.storage)
    return values


def joined(parts: Sequence[pa.Array], column: str) -> pa.Array:
    """One column from several shards; texts join with lists of texts, numbers with wider ones."""
    kinds = {part.type for part in parts}
    if len(kinds) == 1:
        return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
    if any(is_list(kind) for kind in kinds):
        parts = [_listed(part) for part in parts]
    try:
        tables = [pa.table({column: part}) for part in parts]
        return plain(pa.concat_tables(tables, promote_options="permissive")[column])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        named = " and ".join(sorted(str(kind) for kind in kinds))
        raise UsageError(
            f"The column {column!r} holds {named} in different files, which do not go together.",
            hint="Write the files alike, or train on some of them.",
        ) from error


def _listed(values: pa.Array) -> pa.Array:
    """Single values as lists of one; nulls stay."""
    if is_list(values.type) or pa.types.is_null(values.type):
        return values
    offsets = pa.array(np.arange(len(values) + 1), pa.int64())
    lists = pa.LargeListArray.from_arrays(offsets, values)
    return pc.if_else(values.is_valid(), lists, pa.scalar(None, lists.type))


def column_of(values: list[Any]) -> pa.Array:
    """Python values of one column, whatever they are: what does not go together becomes lists or text."""
    if any(isinstance(v, list) for v in values) and any(
        v is not None and not isinstance(v, list) for v in values
    ):
        values = [v if v is None or isinstance(v, list) else [v] for v in values]
    try:
        return plain(pa.array(values))
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        UnicodeEncodeError,
        OverflowError,
    ):
        told = [v if v is None or isinstance(v, str) else str(v) for v in values]
        clean = [None if v is None else v.encode("utf-8", "replace").decode() for v in told]
        return pa.array(clean, pa.large_string())
