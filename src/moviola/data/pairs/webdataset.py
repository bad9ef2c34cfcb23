"""WebDataset tars of pairs. A sample is a run of files that share their path up to the first dot of the
name; what follows the dot, in lower case, names the column (`txt`), or with a field of the sample's JSON
(`json.caption`). `__key__` is the shared path. Pictures are skipped on reading and copied on writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from moviola.data.pairs.batches import RawRows
from moviola.data.pairs.jsonl import json_fields, label_column, parsed, text_column, with_fields
from moviola.data.pairs.streams import DAMAGE, Kept, check_extra, compressed, damaged, opened, whole_output
from moviola.data.pairs.tar import BLOCK, END, Member, TarError, TarReader, new_header
from moviola.data.pairs.types import (
    MOST_RECORD_BYTES,
    TEXT_TWICE,
    KeptRows,
    PairColumns,
    PairError,
    PairFile,
    Piece,
    count,
)
from moviola.types import printable

KEY = "__key__"
_LOOKED_AT = 100  # samples whose members count as the file's columns
_ROWS = 4096  # samples of a batch
_RECORD = 20 * BLOCK  # tar pads an archive to this


@dataclass(slots=True)
class _Sample:
    key: str
    cells: dict[str, bytes] = field(default_factory=dict)
    twice: bool = False


def webdataset_columns(file: PairFile) -> list[str]:
    """Member endings and fields of the JSON members of the first samples, after `__key__`."""
    names: dict[str, None] = {KEY: None}
    samples = 0
    with _reader(file) as reader:
        for _, ending, _, starts in _members(file, reader):
            samples += starts
            if samples > _LOOKED_AT:
                break
            names[ending] = None
            if ending == "json":
                value = parsed(_read(file, reader))
                names.update(
                    dict.fromkeys(f"json.{name}" for name in value) if isinstance(value, dict) else ()
                )
    if len(names) == 1:
        raise PairError(file.path, "holds no samples, expected files such as 00001.jpg and 00001.txt.")
    return list(names)


def read_webdataset(piece: Piece, columns: PairColumns, batch_bytes: int) -> Iterator[RawRows]:
    wanted = {"json" if name.startswith("json.") else name for name in columns.all} - {KEY}
    samples: list[_Sample] = []
    first = held = 0
    with _reader(piece.file) as reader:
        for key, ending, _, starts in _members(piece.file, reader):
            if starts:
                if held >= batch_bytes or len(samples) >= _ROWS:
                    yield _raw(first, samples, columns)
                    first += len(samples)
                    samples, held = [], 0
                samples.append(_Sample(key))
            if ending in wanted:
                sample = samples[-1]
                sample.twice = sample.twice or ending in sample.cells
                sample.cells[ending] = _read(piece.file, reader)
                held += len(sample.cells[ending])
    if samples:
        yield _raw(first, samples, columns)


def write_webdataset(piece: Piece, to: Path, kept: Iterable[KeptRows], extra: pa.Schema) -> int:
    """Kept samples with all their files as they were; the extra columns are fields of their JSON file,
    which is made where there is none.
    """
    file = piece.file
    rows = Kept(piece, kept, extra)
    number, known, written = -1, 0, 0
    fields_of: dict[int, bytes] = {}  # of the kept samples among the next ones
    fields: bytes | None = None  # of the present sample, while it is kept and has not got them yet
    stays = False
    last: tuple[str, Member] | None = None
    with whole_output(to) as plain, compressed(plain, file.compression) as stream, _reader(file) as reader:
        out = _Counted(stream)
        for key, ending, member, starts in _members(file, reader):
            if starts:
                _finish(out, last, fields)
                number += 1
                if number == known:
                    known += _ROWS
                    here = rows.before(known)
                    fields_of = dict(zip(here.rows.tolist(), json_fields(here.extra)))
                fields = fields_of.pop(number, None)
                stays = fields is not None
                written += stays
            last = key, member
            if not stays:
                continue
            if ending != "json" or fields is None:
                out.write(member.header)
                for chunk in _body(file, reader):
                    out.write(chunk)
                out.write(bytes(-member.size % BLOCK))
                continue
            text = _read(file, reader)
            value = parsed(text)
            if not isinstance(value, dict):
                raise PairError(
                    file.path,
                    f"{printable(member.name)} is no JSON object, so its sample cannot take the matches.",
                    hint="Mend or drop that file.",
                )
            check_extra(file, value, extra)
            _add(out, member.name, with_fields(text, fields), member)
            fields = None
        _finish(out, last, fields)
        if fields_of:
            raise rows.changed(min(fields_of), number + 1)
        rows.finish(number + 1)
        out.write(END)
        out.write(bytes(-out.written % _RECORD))
    return written


class _Counted:
    """A writer that knows how much it wrote: a compressed stream cannot always tell."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.written = 0

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self.written += len(data)


def _finish(out: _Counted, last: tuple[str, Member] | None, fields: bytes | None) -> None:
    """A kept sample that had no JSON file gets one."""
    if fields is not None and last is not None:
        key, like = last
        _add(out, f"{key}.json", b"{" + fields + b"}", like)


def _add(out: _Counted, name: str, body: bytes, like: Member) -> None:
    out.write(new_header(name, len(body), like))
    out.write(body + bytes(-len(body) % BLOCK))


@contextmanager
def _reader(file: PairFile) -> Iterator[TarReader]:
    """`PairError` where the file cannot be opened; plain archives are skipped through by seeking."""
    with ExitStack() as stack:
        try:
            length = file.path.stat().st_size if file.compression is None else None
            stream = stack.enter_context(opened(file))
        except DAMAGE as error:
            raise damaged(file, error) from error
        yield TarReader(stream, length)


def _members(file: PairFile, reader: TarReader) -> Iterator[tuple[str, str, Member, bool]]:
    """(key, ending, member, whether it begins a sample) of each member that belongs to one."""
    present: str | None = None
    try:
        for member in reader:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if not stem or not dot or (name.startswith("__") and name.endswith("__")):
                continue  # as data loaders do: hidden files, names without an ending, remarks
            key = f"{folder}{slash}{stem}"
            yield key, ending.lower(), member, key != present
            present = key
    except (*DAMAGE, TarError) as error:
        raise damaged(file, error) from error


def _read(file: PairFile, reader: TarReader) -> bytes:
    """The present member's bytes."""
    try:
        data = reader.read(MOST_RECORD_BYTES + 1)
    except (*DAMAGE, TarError) as error:
        raise damaged(file, error) from error
    if len(data) > MOST_RECORD_BYTES:
        raise PairError(file.path, f"a text file in it is longer than {MOST_RECORD_BYTES >> 20} MB.")
    return data


def _body(file: PairFile, reader: TarReader) -> Iterator[bytes]:
    try:
        yield from reader.chunks()
    except (*DAMAGE, TarError) as error:
        raise damaged(file, error) from error


def _raw(first: int, samples: list[_Sample], columns: PairColumns) -> RawRows:
    problems: dict[str, int] = {}
    rows = len(samples)
    bad = np.fromiter((sample.twice for sample in samples), bool, rows)
    count(problems, TEXT_TWICE, int(bad.sum()))
    objects: list[dict[str, Any]] = [{}] * rows
    if any(name.startswith("json.") for name in columns.all):
        for row, sample in enumerate(samples):
            text = sample.cells.get("json")
            value = parsed(text) if text is not None else {}
            if isinstance(value, dict):
                objects[row] = value
            else:
                count(problems, value or "", int(value is not None and not bad[row]))
                bad[row] = True

    def cells(name: str) -> list[Any]:
        if name.startswith("json."):
            return [o.get(name.removeprefix("json.")) for o in objects]
        if name == KEY:
            return [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
        return [sample.cells.get(name) for sample in samples]

    def label(name: str | None) -> pa.Array | None:
        if name is None:
            return None
        return label_column(cells(name)) if name.startswith("json.") else pa.array(cells(name), pa.binary())

    texts = [
        text_column(cells(name))
        if name.startswith("json.")
        else (pa.array(cells(name), pa.large_binary()), None)
        for name in columns.texts
    ]
    return RawRows(
        first,
        [column for column, _ in texts],
        label(columns.id),
        label(columns.language),
        problems,
        bad if bad.any() else None,
        [other for _, other in texts],
    )
