"""Rows as the formats read them -> checked batches of texts. Axis letters: U texts of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moviola.data.pairs.types import (
    ROW_WITHOUT_TEXT,
    TEXT_EMPTY,
    TEXT_NOT_STRING,
    TEXT_NOT_UTF8,
    TEXT_NULL,
    PairBatch,
    count,
)


@dataclass(slots=True)
class RawRows:
    """Rows as a format reads them: Arrow columns of texts (strings, bytes or lists of these).

    Rows in `bad` were already counted in `problems`. `not_strings` marks, for each text column, those
    of its candidates that are no strings (and stand as nulls).
    """

    first: int
    texts: Sequence[pa.Array]
    ids: pa.Array | None
    languages: pa.Array | None
    problems: dict[str, int] = field(default_factory=dict)
    bad: np.ndarray | None = None
    not_strings: Sequence[np.ndarray | None] = ()


def batches(raw: RawRows, batch_bytes: int) -> Iterator[PairBatch]:
    """Check the texts of some rows and cut them where `batch_bytes` of text are full."""
    rows = len(raw.texts[0])
    problems = dict(raw.problems)
    texts, row_U, text_U = _candidates(raw, rows, problems)
    ids = None if raw.ids is None else _labels(raw.ids)
    languages = None if raw.languages is None else _labels(raw.languages)
    start = 0
    for stop in _cuts(texts, row_U, rows, batch_bytes):
        first_text, last_text = np.searchsorted(row_U, [start, stop]).tolist()
        yield PairBatch(
            raw.first + start,
            stop - start,
            texts.slice(first_text, last_text - first_text).cast(pa.string()),
            row_U[first_text:last_text] - start,
            text_U[first_text:last_text],
            None if ids is None else ids.slice(start, stop - start),
            None if languages is None else languages.slice(start, stop - start),
            problems if start == 0 else {},
        )
        start = stop


def _candidates(raw: RawRows, rows: int, problems: dict[str, int]) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """The usable texts of all text columns, in order of (row, candidate)."""
    before = np.zeros(rows, np.int64)  # candidates of each row in earlier columns
    found: list[tuple[pa.Array, np.ndarray, np.ndarray]] = []
    for column, not_strings in zip_longest(raw.texts, raw.not_strings):
        values, row, nth, size = _flat(column, rows, raw.bad, problems)
        nth = nth + before[row]
        before += size
        good, why = _usable(values)
        if not_strings is not None:
            why[TEXT_NULL] &= ~not_strings
            why[TEXT_NOT_STRING] = not_strings
        if raw.bad is not None:
            told = raw.bad[row]
            good &= ~told
            why = {name: mask & ~told for name, mask in why.items()}
        for name, mask in why.items():
            count(problems, name, int(mask.sum()))
        if not good.all():
            values, row, nth = values.filter(pa.array(good)), row[good], nth[good]
        if pa.types.is_large_binary(values.type):
            values = values.view(pa.large_string())  # what is no UTF-8 is out
        found.append((values, row, nth))
    if len(found) == 1:
        values, row, nth = found[0]
        return values, row, nth.astype(np.int32)
    row = np.concatenate([f[1] for f in found])
    order = np.argsort(row, kind="stable")
    values = pa.concat_arrays([f[0] for f in found]).take(pa.array(order))
    return values, row[order], np.concatenate([f[2] for f in found])[order].astype(np.int32)


def _flat(
    column: pa.Array, rows: int, bad: np.ndarray | None, problems: dict[str, int]
) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray | int]:
    """A column's candidates as large strings or bytes, their rows, their places, candidates a row."""
    kind = column.type
    if not is_list(kind):
        return _plain(column), np.arange(rows), np.zeros(rows, np.int64), 1
    if not pa.types.is_large_list(kind):
        column = column.cast(pa.large_list(kind.value_type))
    size = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    empty, null = size == 0, column.is_null().to_numpy(zero_copy_only=False)
    if bad is not None:
        empty, null = empty & ~bad, null & ~bad
    count(problems, TEXT_NULL, int(null.sum()))
    count(problems, ROW_WITHOUT_TEXT, int((empty & ~null).sum()))
    row = np.repeat(np.arange(rows), size)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(size) - size, size)
    # a null takes a place, as it does in a column of plain texts
    return _plain(column.flatten()), row, nth, size + column.is_null().to_numpy(zero_copy_only=False)


def _plain(values: pa.Array) -> pa.Array:
    """Strings, views, dictionaries or bytes as large strings (not checked) or large bytes."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.large_string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values.cast(pa.large_string())
    return values.cast(pa.large_binary())


def _usable(values: pa.Array) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which texts can be matched, and for each reason which cannot. Bytes become strings in place."""
    null = values.is_null().to_numpy(zero_copy_only=False)
    wrong = _not_utf8(values)
    if wrong is not None:
        # what is no text cannot be looked at as one: only the emptiness of the others is asked
        sound = pa.array(np.arange(len(values)), mask=wrong)
        values = values.take(sound)
    text = values.view(pa.large_string()) if pa.types.is_large_binary(values.type) else values
    blank = pc.or_(pc.equal(pc.binary_length(text), 0), pc.utf8_is_space(text))
    empty = blank.fill_null(False).to_numpy(zero_copy_only=False)
    why = {TEXT_NULL: null, TEXT_EMPTY: empty}
    good = ~(null | empty)
    if wrong is not None:
        why[TEXT_NOT_UTF8] = wrong
        good &= ~wrong
    return good, why


def _not_utf8(values: pa.Array) -> np.ndarray | None:
    """Which values are no UTF-8; None when all are."""
    as_text = values.view(pa.large_string()) if pa.types.is_large_binary(values.type) else values
    try:
        as_text.validate(full=True)
    except pa.ArrowInvalid:
        return np.array([not _decodes(v) for v in as_text.view(pa.large_binary()).to_pylist()], bool)
    return None


def _decodes(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _labels(values: pa.Array) -> pa.StringArray:
    """Ids or languages as strings: numbers in decimals, bytes that are no text in hex, nulls as ''."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([v.hex() if v is not None else "" for v in values.to_pylist()], pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        values = values.cast(pa.large_binary())
        if _not_utf8(values) is None:
            values = values.view(pa.large_string())
    elif (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and _not_utf8(values) is not None:
        values = values.cast(pa.large_binary())
    if pa.types.is_large_binary(values.type):
        texts = [v if v is None else v.decode() if _decodes(v) else v.hex() for v in values.to_pylist()]
        values = pa.array(texts, pa.string())
    values = values.cast(pa.string())
    return values.fill_null("") if values.null_count else values


def _cuts(texts: pa.Array, row_U: np.ndarray, rows: int, batch_bytes: int) -> Iterator[int]:
    """Rows to end a batch at, so that each holds `batch_bytes` of text or one row."""
    if not len(texts):
        if rows:
            yield rows
        return
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if ends[-1] - ends[0] <= batch_bytes:
        yield rows
        return
    size = np.bincount(row_U, weights=np.diff(ends), minlength=rows).cumsum()
    start = 0
    while start < rows:
        begun = size[start - 1] if start else 0.0
        start = max(start + 1, int(np.searchsorted(size, begun + batch_bytes, side="right")))
        yield start


def is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )
