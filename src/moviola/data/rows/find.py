"""From what the user names to shards of rows."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from moviola.data.pairs import find_pairs
from moviola.data.pairs.types import PairFile
from moviola.data.rows.folders import FolderShard
from moviola.data.rows.lines import LineShard
from moviola.data.rows.parquet import ParquetShard
from moviola.data.rows.shards import Shard
from moviola.data.rows.source import RowSource, Window
from moviola.data.rows.tar import TarShard
from moviola.media.files import media_kind
from moviola.types import UsageError, printable

_BLOCKS = 8  # blocks that a window holds at least, so that rows of different blocks mix


def open_rows(
    sources: Sequence[str | Path],
    *,
    columns: Mapping[str, str] | None = None,
    root: Path | None = None,
    window: Window | None = None,
) -> RowSource:
    """The rows of Parquet, CSV, TSV and JSON Lines tables, WebDataset tars and folders, by number.

    `sources` are files, folders (of such files, or of pictures) and globs: rows of files come first, then
    those of folders of pictures, each in the order named, each file once. `columns` renames:
    {'image': 'jpg', 'text': 'my_caption'}. `root` is where relative picture paths start (default: the
    table's folder); paths that lead out of it are refused row by row, except absolute ones in CSV, TSV and
    JSON Lines. `window` bounds what is shuffled and held at a time of Parquet files.

    `UsageError` where a source is missing, holds nothing usable or is compressed; `PairError` where a
    file is damaged.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise UsageError("There is no data to train on.", hint="Name a file, a folder or a glob.")
    renames = dict(columns or {})
    window = window or Window()
    if root is not None and not Path(root).is_dir():
        raise UsageError(f"The root {printable(root)} is no folder.", hint="Check the path.")
    shards: list[Shard] = []
    tables: list[str | Path] = []
    folders: list[Path] = []
    for source in sources:
        many = _picture_folders(source)
        seen = {folder.resolve() for folder in folders}
        folders += [folder for folder in many if folder.resolve() not in seen]
        if not many:
            tables.append(source)
    if tables:
        for file in find_pairs(tables):
            shards.append(_shard(file, root, renames, max(1, window.bytes // _BLOCKS)))
    shards += [FolderShard(folder, renames=renames) for folder in folders]
    made = RowSource(shards, renames=renames, window=window)
    if not len(made):
        named = ", ".join(printable(source) for source in sources[:5])
        raise UsageError(f"{named} holds no rows.", hint="Check the path.")
    return made


def _shard(file: PairFile, root: Path | None, renames: Mapping[str, str], most_bytes: int) -> Shard:
    if file.compression is not None:
        raise UsageError(
            f"{printable(file.path)} is compressed: its rows cannot be read one by one.",
            hint="Unpack it first, for example with gunzip, or save it as Parquet.",
        )
    root = None if root is None else Path(root)
    if file.format == "parquet":
        return ParquetShard(file.path, file.name, root=root, renames=renames, most_bytes=most_bytes)
    if file.format == "webdataset":
        return TarShard(file, root=root, renames=renames)
    return LineShard(file, root=root, renames=renames)


def _picture_folders(source: str | Path) -> list[Path]:
    """The folders of pictures that a source names: itself, or what its glob finds; [] for files of rows."""
    path = Path(source)
    if path.is_dir():
        return [path] if _holds_pictures(path) else []
    if path.exists() or not glob.has_magic(str(source)):
        return []
    found = [Path(p) for p in sorted(glob.glob(str(source), recursive=True))]  # noqa: PTH207
    if found and all(p.is_dir() for p in found):
        return [p for p in found if _holds_pictures(p)]
    return []


def _holds_pictures(folder: Path) -> bool:
    """Whether there are pictures or videos and no files of rows that could name them."""
    try:
        files = find_pairs([folder])
    except UsageError as error:
        if "holds no pair files" not in error.problem:
            raise
        files = []
    if files:
        return False
    return any(media_kind(p) is not None for p in folder.rglob("*"))
