"""JSON Lines files of pairs: one object a line; kept lines keep their own bytes and gain fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moviola.data.pairs.batches import RawRows
from moviola.data.pairs.lines import blocks
from moviola.data.pairs.streams import Kept, check_extra, compressed, glued, json_texts, whole_output
from moviola.data.pairs.types import (
    ROW_NOT_JSON,
    ROW_NOT_OBJECT,
    ROW_NOT_UTF8,
    KeptRows,
    PairColumns,
    PairError,
    PairFile,
    Piece,
    count,
)

_LOOKED_AT = 1000  # lines whose fields count as the file's columns
_loads = json.JSONDecoder().decode


def jsonl_columns(file: PairFile) -> list[str]:
    """The fields of the first lines, in order. `PairError` where none is an object."""
    names: dict[str, None] = {}
    for block in blocks(file, None, 1 << 20):
        for start, end in list(zip(block.start_R.tolist(), block.end_R.tolist()))[:_LOOKED_AT]:
            value = parsed(block.data[start:end])
            if isinstance(value, dict):
                names.update(dict.fromkeys(value))
        break
    if not names and not file.path.stat().st_size:
        raise PairError(file.path, "is empty, it holds no JSON object.", hint="Leave it out.")
    if not names:
        raise PairError(file.path, "its first lines hold no JSON object, expected one a line.")
    return list(names)


def read_jsonl(piece: Piece, columns: PairColumns) -> Iterator[RawRows]:
    for block in blocks(piece.file, None):
        data = block.data
        values = [parsed(data[s:e]) for s, e in zip(block.start_R.tolist(), block.end_R.tolist())]
        yield raw_rows(block.first, values, columns)


def parsed(line: bytes) -> dict[str, Any] | str | None:
    """The object of a line, or what is wrong with it; None for a line of spaces."""
    try:
        value = _loads(line.decode())
    except UnicodeDecodeError:
        return ROW_NOT_UTF8
    except (json.JSONDecodeError, RecursionError):
        return ROW_NOT_JSON if line.strip() else None
    except ValueError:  # a number of thousands of digits
        return ROW_NOT_JSON
    return value if isinstance(value, dict) else ROW_NOT_OBJECT


def raw_rows(first: int, values: Sequence[dict[str, Any] | str | None], columns: PairColumns) -> RawRows:
    """Objects as columns; rows that are none are counted and marked."""
    problems: dict[str, int] = {}
    bad = np.fromiter((not isinstance(value, dict) for value in values), bool, len(values))
    objects: list[dict[str, Any]] = []
    for value in values:
        if isinstance(value, dict):
            objects.append(value)
        else:
            objects.append({})
            if value is not None:
                count(problems, value, 1)
    texts = [text_column([o.get(name) for o in objects]) for name in columns.texts]
    ids = None if columns.id is None else label_column([o.get(columns.id) for o in objects])
    languages = None if columns.language is None else label_column([o.get(columns.language) for o in objects])
    return RawRows(
        first,
        [column for column, _ in texts],
        ids,
        languages,
        problems,
        bad if bad.any() else None,
        [other for _, other in texts],
    )


def text_column(values: list[Any]) -> tuple[pa.Array, np.ndarray | None]:
    """Texts, or lists of them, as an Arrow column, and which of the candidates are no strings."""
    kind = pa.large_string()
    if not any(isinstance(value, str) for value in values):  # Arrow would take a string for a list of letters
        kind = pa.large_list(kind)
    try:
        return pa.array(values, kind), None
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        pass  # not all of this kind: they are looked at one by one
    rows: list[list[bytes | None]] = []
    other: list[bool] = []
    for value in values:
        several = value if isinstance(value, list) else [value]
        other += [not (text is None or isinstance(text, str)) for text in several]
        # half of a surrogate pair, which JSON can name, makes bytes that are no UTF-8: counted as such
        rows.append([t.encode("utf-8", "surrogatepass") if isinstance(t, str) else None for t in several])
    return pa.array(rows, pa.large_list(pa.large_binary())), np.array(other, bool)


def label_column(values: list[Any]) -> pa.Array:
    """Ids or languages as strings: numbers in decimals, lists and objects as JSON text."""
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError):
        return pa.array([_label(value) for value in values], pa.string())


def _label(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text.encode("utf-8", "backslashreplace").decode()


def write_jsonl(piece: Piece, to: Path, kept: Iterable[KeptRows], extra: pa.Schema) -> int:
    file = piece.file
    rows = Kept(piece, kept, extra)
    names = [json.dumps(name).encode() for name in extra.names]
    written = seen = 0
    with whole_output(to) as plain, compressed(plain, file.compression) as out:
        for block in blocks(file, None):
            seen = block.first + len(block.start_R)
            here = rows.before(seen)
            if not len(here.rows):
                continue
            at = here.rows - block.first
            data = block.data
            suspect = any(name in data for name in names)
            parts: list[bytes] = []
            places = zip(block.start_R[at].tolist(), block.end_R[at].tolist(), block.next_R[at].tolist())
            for (start, end, after), fields in zip(places, json_fields(here.extra)):
                line = data[start:end]
                if suspect:
                    check_extra(file, parsed(line) or (), extra)
                parts += (with_fields(line, fields), data[end:after] or b"\n")
            out.write(b"".join(parts))
            written += len(at)
        rows.finish(seen)
    return written


def json_fields(extra: pa.RecordBatch) -> list[bytes]:
    """Each row as the inside of a JSON object: `"a": 1, "b": [2]`."""
    columns: list[Any] = []
    for name, column in zip(extra.schema.names, extra.columns):
        columns += [f"{', ' if columns else ''}{json.dumps(name)}: ", json_texts(column)]
    if not columns:
        return [b""] * extra.num_rows
    return glued(*columns).cast(pa.large_binary()).to_pylist()


def with_fields(text: bytes, fields: bytes) -> bytes:
    """A JSON object with more fields at its end; all other bytes stay."""
    head, brace, tail = text.rpartition(b"}")
    if not brace or tail.strip():
        raise ValueError("not a JSON object")
    body = head.rstrip()
    return (
        body
        + (b", " if fields and not body.endswith(b"{") else b"")
        + fields
        + head[len(body) :]
        + b"}"
        + tail
    )
