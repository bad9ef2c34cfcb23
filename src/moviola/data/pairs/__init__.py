"""Files of image-text pairs by the million: found, cut into pieces, read as texts, written with what stays.

Parquet, CSV, TSV, JSON Lines (the last three plain or compressed) and WebDataset tars. Everything
streams: memory depends on the size of a batch, never on the size of a file. Two passes over a piece
number its rows alike, so the first says which rows stay and the second writes them:

    for piece in pieces(find_pairs(["pool/"])):
        columns = pair_columns(piece.file)
        for batch in read_texts(piece, columns):
            ...
        write_kept(piece, Path("out") / piece.output, kept, extra_schema)

Bad rows and texts are counted in the batches; a damaged file is a `PairError`, and others can go on.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from moviola.data.pairs.batches import RawRows, batches
from moviola.data.pairs.csv import csv_columns, read_csv, write_csv
from moviola.data.pairs.jsonl import jsonl_columns, read_jsonl, write_jsonl
from moviola.data.pairs.parquet import (
    check_label_column,
    check_text_column,
    parquet_columns,
    read_parquet,
    row_groups,
    write_parquet,
)
from moviola.data.pairs.streams import check_extra
from moviola.data.pairs.types import (
    PROBLEMS,
    KeptRows,
    OutputError,
    PairBatch,
    PairColumns,
    PairCompression,
    PairError,
    PairFile,
    PairFormat,
    Piece,
)
from moviola.data.pairs.webdataset import read_webdataset, webdataset_columns, write_webdataset
from moviola.data.tables import ID_COLUMNS, TEXT_COLUMNS
from moviola.types import UsageError, printable

__all__ = [
    "PROBLEMS",
    "KeptRows",
    "OutputError",
    "PairBatch",
    "PairColumns",
    "PairError",
    "PairFile",
    "Piece",
    "check_name",
    "find_pairs",
    "pair_columns",
    "pieces",
    "read_texts",
    "write_kept",
]

PAIR_TEXT_COLUMNS = [*TEXT_COLUMNS, "txt", *(f"json.{name}" for name in TEXT_COLUMNS)]
PAIR_ID_COLUMNS = [*ID_COLUMNS, "uuid", "sample_id", "__key__", "url", "image_url"]
LANGUAGE_COLUMNS = ["language", "lang", "json.language", "json.lang"]

_FORMATS: dict[str, PairFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tar": "webdataset",
}
_COMPRESSIONS: dict[str, PairCompression] = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
_SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}


# --------------------------------------------------------------------------------------------------
# Finding
# --------------------------------------------------------------------------------------------------


def find_pairs(sources: Sequence[str | Path]) -> list[PairFile]:
    """The pair files among files, folders (searched through, hidden ones left out) and globs.

    They come source by source, in natural order (2 before 10), each once. A file is named by its path
    under its folder or the glob's fixed part; where two would have one name, all are named from the
    folder they share.

    `UsageError` where a source is missing, is no pair file or holds none, where a folder holds the same
    pairs in two formats, or where a name is not UTF-8.
    """
    if not sources:
        raise UsageError("There are no pairs to read.", hint="Name a file, a folder or a glob.")
    found: dict[Path, PairFile] = {}
    for source in sources:
        files = _source(source)
        if not files:
            raise UsageError(
                f"{printable(source)} holds no pair files. Expected names ending in {_endings()}.",
                hint="Check the path.",
            )
        for file in files:
            found.setdefault(file.path.resolve(), file)
    files = list(found.values())
    for file in files:
        check_name(file.path)
    if len({file.name for file in files}) < len(files):
        shared = Path(os.path.commonpath([file.path.absolute().parent for file in files]))
        files = [
            PairFile(f.path, f.path.absolute().relative_to(shared).as_posix(), f.format, f.compression)
            for f in files
        ]
    return files


def check_name(path: str | Path) -> None:
    """Arrow opens files by their UTF-8 names: other names must not come up after hours."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"The name of {printable(path)} is not UTF-8.", hint="Rename it.") from None


def _source(source: str | Path) -> list[PairFile]:
    path = Path(source)
    if path.is_dir():
        return _one_format(path, _under(path, path))
    if path.exists():
        file = _pair_file(path, path.name)
        if file is None:
            json = path.suffix.lower() == ".json"
            raise UsageError(
                f"{printable(source)} is no pair file. Expected a name ending in {_endings()}.",
                hint="A JSON list cannot be streamed: write one object a line, as .jsonl." if json else None,
            )
        return [file]
    if not glob.has_magic(str(source)):
        raise UsageError(f"{printable(source)} does not exist.", hint="Check the path.")
    root = Path(*_fixed(path.parts))
    pattern = Path(*path.parts[len(root.parts) :]).as_posix()
    matches = sorted((m for m in root.glob(pattern) if not _hidden(m, root)), key=_natural)
    files: list[PairFile] = []
    for match in matches:
        if match.is_dir():
            files += _under(match, root)
        elif (file := _pair_file(match, match.relative_to(root).as_posix())) is not None:
            files.append(file)
    return files


def _fixed(parts: tuple[str, ...]) -> list[str]:
    fixed = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _under(folder: Path, root: Path) -> list[PairFile]:
    files = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(here) / name
            if not name.startswith(".") and path.is_file():
                files.append(_pair_file(path, path.relative_to(root).as_posix()))
    return sorted((file for file in files if file is not None), key=lambda file: _natural(file.path))


def _one_format(folder: Path, files: list[PairFile]) -> list[PairFile]:
    """Downloaders lay a table beside each tar with the same rows: reading both would double every pair."""
    formats: dict[str, PairFile] = {}
    for file in files:
        stem = file.name.removesuffix("".join(_suffixes(Path(file.name))))
        other = formats.setdefault(stem, file)
        if other.format != file.format:
            raise UsageError(
                f"{printable(folder)} holds the same name in two formats, {printable(other.path.name)} and "
                f"{printable(file.path.name)}: are they the same pairs?",
                hint=f"Say which you mean, for example: '{printable(folder)}/**/*{file.path.suffix}'",
            )
    return files


def _suffixes(path: Path) -> list[str]:
    """The endings that make the format and the compression, as they stand in the name."""
    last = path.suffix
    if last.lower() in _COMPRESSIONS:
        return [Path(path.stem).suffix, last]
    return [last]


def _pair_file(path: Path, name: str) -> PairFile | None:
    ending = "".join(_suffixes(path)).lower()
    ending = _SHORT.get(ending, ending)
    for packed, compression in _COMPRESSIONS.items():
        if ending.endswith(packed):
            kind = _FORMATS.get(ending.removesuffix(packed))
            return None if kind in (None, "parquet") else PairFile(path, name, kind, compression)
    kind = _FORMATS.get(ending)
    return None if kind is None else PairFile(path, name, kind)


def _endings() -> str:
    return f"{', '.join(_FORMATS)} (all but Parquet also with {', '.join(_COMPRESSIONS)})"


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Numbers in names sort by value; equal ones by how they are written."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


# --------------------------------------------------------------------------------------------------
# Pieces and columns
# --------------------------------------------------------------------------------------------------


def pieces(files: Iterable[PairFile], *, rows: int = 1_000_000) -> list[Piece]:
    """Units of work: Parquet files are cut between row groups into about `rows` rows, others stay whole.

    A file whose footer cannot be read is one piece; reading it raises the `PairError`.
    """
    if rows < 1:
        raise UsageError(f"A piece needs at least 1 row, got {rows}.")
    made: list[Piece] = []
    for file in files:
        cuts = _cuts(file, rows) if file.format == "parquet" else []
        if len(cuts) < 2:
            made.append(Piece(file))
        else:
            made += [Piece(file, i, len(cuts), (a, b), first_row) for i, (a, b, first_row) in enumerate(cuts)]
    outputs: dict[str, Piece] = {}
    for piece in made:
        other = outputs.setdefault(piece.output, piece)
        if other is not piece:
            raise UsageError(
                f"{printable(other.file.path)} and {printable(piece.file.path)} would both be written to "
                f"{printable(piece.output)}.",
                hint="Rename one of them.",
            )
    return made


def _cuts(file: PairFile, rows: int) -> list[tuple[int, int, int]]:
    """First row group, end, and first row of each piece."""
    try:
        sizes = row_groups(file)
    except PairError:
        return []  # it is told when the piece is read, where the run can go on without it
    cuts = []
    start = held = first_row = 0
    for group, size in enumerate(sizes):
        if held and held + size > rows:
            cuts.append((start, group, first_row))
            start, held, first_row = group, 0, first_row + held
        held += size
    return [*cuts, (start, len(sizes), first_row)]


def pair_columns(
    file: PairFile,
    *,
    texts: str | Sequence[str] | None = None,
    id: str | None = None,
    language: str | None = None,
    find_language: bool = False,
    extra: pa.Schema | None = None,
) -> PairColumns:
    """The columns to read: those that are named, or else the first with a usual name.

    Several text columns, and lists in a text column, give several texts a row. The id may be absent; the
    language is looked for only with `find_language`. JSON Lines and WebDataset have the columns of their
    first rows. `extra`: the columns that `write_kept` will add; the file must not have them.

    `PairError` names the columns that are there when one is missing, and says when one holds no text.
    """
    there = _COLUMNS[file.format](file)
    doubled = sorted({name for name in there if there.count(name) > 1})
    if doubled:
        raise PairError(file.path, f"has two columns {', '.join(map(repr, doubled))}.", hint="Rename one.")
    if extra is not None:
        tar = file.format == "webdataset"  # there they are fields of a sample's JSON file
        check_extra(file, [name.removeprefix("json.") if tar else name for name in there], extra)
    asked = [texts] if isinstance(texts, str) else list(texts or ())
    for name in (*asked, *(n for n in (id, language) if n is not None)):
        if name not in there:
            raise _no_column(file, f"no column {name!r}", there, "Name one of them.")
    usual = _usual(there, PAIR_TEXT_COLUMNS)
    if not asked:
        if usual is None:
            raise _no_column(file, "no column that names itself a text", there, "Name it with --text-column.")
        asked = [usual]
    found = PairColumns(
        tuple(dict.fromkeys(asked)),
        id if id is not None else _usual(there, PAIR_ID_COLUMNS),
        language if language is not None or not find_language else _usual(there, LANGUAGE_COLUMNS),
    )
    if file.format == "parquet":
        for name in found.texts:
            check_text_column(file, name)
        for label in (found.id, found.language):
            if label is not None:
                check_label_column(file, label)
    return found


def _usual(there: Sequence[str], known: Sequence[str]) -> str | None:
    lower: dict[str, str] = {}
    for name in there:
        lower.setdefault(name.lower(), name)
    return next((lower[name] for name in known if name in lower), None)


def _no_column(file: PairFile, what: str, there: Sequence[str], hint: str) -> PairError:
    names = ", ".join(map(repr, there[:50])) + (", ..." if len(there) > 50 else "")
    return PairError(file.path, f"has {what}. Its columns: {names or 'none'}.", hint=hint)


_COLUMNS: dict[str, Callable[[PairFile], list[str]]] = {
    "parquet": parquet_columns,
    "csv": csv_columns,
    "tsv": csv_columns,
    "jsonl": jsonl_columns,
    "webdataset": webdataset_columns,
}


# --------------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------------


def read_texts(piece: Piece, columns: PairColumns, *, batch_bytes: int = 16 << 20) -> Iterator[PairBatch]:
    """The texts of a piece in batches of about `batch_bytes`; a longer text is a batch of its own row.

    Parquet reads only the named columns, a plain tar only its text files. Every row of the piece is in
    one batch. `PairError` where the file is damaged, with the batches before it already given.
    """
    if batch_bytes < 1:
        raise UsageError(f"A batch needs at least 1 byte, got {batch_bytes}.")
    for raw in _raw(piece, columns, batch_bytes):
        yield from batches(raw, batch_bytes)


def _raw(piece: Piece, columns: PairColumns, batch_bytes: int) -> Iterator[RawRows]:
    if piece.file.format == "parquet":
        return read_parquet(piece, columns, batch_bytes)
    if piece.file.format == "jsonl":
        return read_jsonl(piece, columns)
    if piece.file.format == "webdataset":
        return read_webdataset(piece, columns, batch_bytes)
    return read_csv(piece, columns)


def write_kept(piece: Piece, to: str | Path, kept: Iterable[KeptRows], extra: pa.Schema) -> int:
    """Read the piece again and write the rows in `kept`, with the extra columns, in the input's format.

    All columns come along. Parquet keeps types, metadata, codecs and about its row groups; a CSV record,
    a JSON line and a tar's files keep their bytes (lists become JSON text in CSV; in a tar the extra
    columns go into the sample's JSON file). The same input gives the same bytes. The file takes its
    name only when it is whole and on the disk. Returns the rows written.

    `PairError` where the input is damaged, has an extra column's name or ends before a kept row;
    `OutputError` where the disk is full or the folder may not be written.
    """
    write = {"parquet": write_parquet, "jsonl": write_jsonl, "webdataset": write_webdataset}
    return write.get(piece.file.format, write_csv)(piece, Path(to), kept, extra)
