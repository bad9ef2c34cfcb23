"""Metadata: the list of entries that curation looks for in texts, read, checked, put together, written.

An entry's number is its place in the list. Entries are case-sensitive strings and are never changed. A
list has a hash over its entries and their order, the same for every format, by which counts are known
to belong to it.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import string
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from moviola.data.metadata_check import not_text, why_unmatchable
from moviola.data.wikitext import punctuation
from moviola.files import atomic
from moviola.types import UsageError, printable

ENTRY_COLUMNS = ("entry", "entries", "metadata", "text", "name")
"""Usual names of the column with the entries in a Parquet file."""
_FORMATS = {".txt": "text", ".json": "json", ".parquet": "parquet"}
_PACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}

# --------------------------------------------------------------------------------------------------
# Reading and writing
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """Entries in order; `hash` is of them and their order; `language` is None where none is named."""

    entries: tuple[str, ...]
    language: str | None = None
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hash", entries_hash(self.entries))

    def __len__(self) -> int:
        return len(self.entries)


def entries_hash(entries: Iterable[str]) -> str:
    """16 hex digits over the entries and their order."""
    digest = hashlib.sha256()
    for entry in entries:
        data = entry.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def read_metadata(path: str | Path, *, column: str | None = None, language: str | None = None) -> Metadata:
    """Read a list of entries: one a line (.txt), a JSON list or object's keys (.json), or a Parquet column.

    .txt and .json may be packed (.gz, .bz2, .xz). `column` names the Parquet column; without it, it is
    found by its usual name or as the only column of strings. Entries are not changed: an empty or
    double one stays, and the matcher refuses it. Raises `UsageError` for a file that holds no entries,
    or whose entries are no UTF-8 strings.
    """
    path = Path(path)
    entries = []
    for number, entry in enumerate(raw_entries(path, column=column)):
        why = not_text(entry)
        if why is not None:
            raise UsageError(
                f"{printable(path)}: entry {number} {why}.",
                hint=f"See all of them with: moviola metadata check {printable(path)}",
            )
        entries.append(cast(str, entry))
    if not entries:
        raise UsageError(f"{printable(path)} holds no entry.", hint="Build one with: moviola metadata build")
    return Metadata(tuple(entries), language)


def metadata_files(folder: str | Path) -> dict[str, Path]:
    """The lists in a folder by language, which is the file's name before its endings: `zh.json` is `zh`."""
    folder = Path(folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and _format(path)[0] is not None:
            language = path.name.partition(".")[0]
            if language in found:
                raise UsageError(
                    f"{printable(folder)} holds two lists for {printable(language)}: "
                    f"{printable(found[language].name)} and {printable(path.name)}.",
                    hint="Leave one.",
                )
            found[language] = path
    if not found:
        raise UsageError(
            f"{printable(folder)} holds no metadata.",
            hint="Expected one file a language, such as en.txt, zh.json or th.parquet.",
        )
    return found


def read_languages(folder: str | Path) -> dict[str, Metadata]:
    """Every list of a folder with one file per language, by language."""
    files = metadata_files(folder)
    return {language: read_metadata(path, language=language) for language, path in files.items()}


def _format(path: Path) -> tuple[str | None, str | None]:
    """(text, json, parquet or None, the packing's ending or None)"""
    ending = path.suffix.lower()
    if ending not in _PACKED:
        return _FORMATS.get(ending), None
    inner = _FORMATS.get(Path(path.stem).suffix.lower())
    return (None if inner == "parquet" else inner), ending


def raw_entries(path: str | Path, *, column: str | None = None) -> Iterator[object]:
    """The entries as they stand in the file: also what is no string; bytes where a line is not UTF-8."""
    path = Path(path)
    kind, packing = _format(path)
    if kind is None:
        raise UsageError(
            f"{printable(path)} is no metadata by its name.",
            hint="Expected .txt (one entry a line), .json (a list) or .parquet (a column).",
        )
    if column is not None and kind != "parquet":
        raise UsageError(f"{printable(path)} has no columns, so there is no column {column!r}.")
    if kind == "parquet":
        yield from _parquet_entries(path, column)
        return
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{printable(path)} does not exist.", hint="Check the path.") from None
    if packing is not None:
        try:
            data = _PACKED[packing](data)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise UsageError(
                f"{printable(path)} cannot be unpacked ({error}).", hint="Copy it again."
            ) from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(
            f"{printable(path)} is UTF-16, expected UTF-8.",
            hint=f"Convert it with: iconv -f UTF-16 -t UTF-8 {printable(path)}",
        )
    data = data.removeprefix(b"\xef\xbb\xbf")
    yield from _lines(data) if kind == "text" else _json_entries(data, path)


def _lines(data: bytes) -> Iterator[object]:
    lines = data.split(b"\n")
    if lines[-1] == b"":  # the end of the last line is no entry
        lines.pop()
    for line in lines:
        bare = line.removesuffix(b"\r")
        try:
            yield bare.decode()
        except UnicodeDecodeError:
            yield bare


def _json_entries(data: bytes, path: Path) -> Iterator[object]:
    try:
        # an object's keys, so that one that comes twice shows
        value = json.loads(data.decode(), object_pairs_hook=lambda pairs: _Keys(key for key, _ in pairs))
    except UnicodeDecodeError as error:
        raise UsageError(f"{printable(path)} is not UTF-8 ({error}).") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{printable(path)} is no JSON ({error}).") from error
    if not isinstance(value, list):
        raise UsageError(
            f"{printable(path)} holds a JSON {type(value).__name__}, expected a list of strings."
        )
    yield from value


class _Keys(list[str]):
    """The keys of a JSON object, in order."""


def _parquet_entries(path: Path, column: str | None) -> Iterator[object]:
    if not path.exists():
        raise UsageError(f"{printable(path)} does not exist.", hint="Check the path.")
    try:
        with pq.ParquetFile(path) as file:
            name = _entry_column(file.schema_arrow, column, path)
            for batch in file.iter_batches(columns=[name]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(
            f"{printable(path)} is no readable Parquet file ({error}).", hint="Copy it again."
        ) from error


def _entry_column(schema: pa.Schema, column: str | None, path: Path) -> str:
    strings = [f.name for f in schema if _holds_strings(f.type)]
    names = ", ".join(printable(f"{f.name} ({f.type})") for f in schema)
    if column is not None:
        if column in strings:
            return column
        what = "is no column of strings" if column in schema.names else "is not there"
        raise UsageError(f"{printable(path)}: column {printable(column)} {what}. It has: {names}.")
    for name in ENTRY_COLUMNS:
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    raise UsageError(
        f"{printable(path)}: no column is named {', '.join(ENTRY_COLUMNS)}. It has: {names}.",
        hint=f"Rename it to {ENTRY_COLUMNS[0]}. (`moviola metadata check` takes --column.)",
    )


def _holds_strings(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def write_metadata(
    entries: Sequence[str],
    to: str | Path,
    *,
    sources: Sequence[str] | None = None,
    scores: Sequence[float | None] | None = None,
    made: dict[str, Any] | None = None,
) -> None:
    """Write entries as `to`'s ending says (.txt, .json, .parquet), whole or not at all.

    A Parquet file also tells each entry's source and score and, as file metadata, how it was `made`.
    """
    to = Path(to)
    kind = check_target(to)
    if kind == "text":
        broken = next((e for e in entries if "\n" in e or e.endswith("\r")), None)
        if broken is not None:
            raise UsageError(
                f"The entry {broken!r} holds a line's end, which a file with one entry a line cannot.",
                hint="Write .json or .parquet.",
            )
    with atomic(to) as file:
        if kind == "text":
            file.write("".join(f"{entry}\n" for entry in entries).encode())
        elif kind == "json":
            file.write(json.dumps(list(entries), ensure_ascii=False, indent=0).encode())
        else:
            columns: dict[str, Any] = {"entry": pa.array(entries, pa.string())}
            if sources is not None:
                columns["source"] = pa.array(sources, pa.string())
            if scores is not None:
                columns["score"] = pa.array(scores, pa.float64())
            table = pa.table(columns)
            if made is not None:
                table = table.replace_schema_metadata({"moviola": json.dumps(made, sort_keys=True)})
            pq.write_table(table, file, compression="zstd")


def check_target(to: Path) -> str:
    """The format that `to`'s ending names; `UsageError` for another ending."""
    kind, packing = _format(to)
    if kind is None or packing is not None:
        raise UsageError(
            f"{printable(to)} names no format to write.", hint="Use the ending .txt, .json or .parquet."
        )
    return kind


# --------------------------------------------------------------------------------------------------
# Putting together
# --------------------------------------------------------------------------------------------------

SOURCES = ("numbers", "wordnet", "words", "unigrams", "bigrams", "titles")
"""In this order: an entry belongs to the first source that has it."""
NO_SPACE_LANGUAGES = frozenset(
    {"bo", "dz", "ja", "km", "lo", "my", "ryu", "th", "zh", "zh_classical", "zh_yue"}
)
"""Wikipedias whose language puts no space between words: their pairs are joined without one."""


@dataclass(frozen=True)
class MetadataRules:
    """Which candidates become entries. The defaults are those of MetaCLIP for English.

    A share is of the distinct candidates of a source, the most frequent first; a share and a greatest
    number count new entries only. `most` is for the whole list. `all_marks` leaves out entries made of
    punctuation however long, not just single ASCII marks; `longest` is in characters.
    """

    numbers: int = 100
    unigram_count: int = 100
    unigram_share: float = 1.0
    unigrams: int | None = None
    bigram_pmi: float = 30.0
    bigram_count: int = 1
    bigrams: int | None = None
    title_hourly: int = 50
    title_views: int = 70
    title_share: float = 1.0
    titles: int | None = None
    mobile: bool = False
    longest: int | None = None
    all_marks: bool = False
    most: int | None = 500_000

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("unigram_share", "title_share") and not 0 <= value <= 1:
                raise UsageError(f"{one.name} is a share between 0 and 1, got {value}.")
            if one.name == "bigram_pmi" and value != value:
                raise UsageError("bigram_pmi must be a number, got NaN.")
            if isinstance(value, int) and value < 0:
                raise UsageError(f"{one.name} must not be negative, got {value}.")

    @classmethod
    def of(cls, language: str, **changes: Any) -> MetadataRules:
        """The rules of a language: MetaCLIP's for English (`en`), MetaCLIP 2's for the others.

        `changes` that are None leave a rule as it is.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        rules = cls() if language == "en" else OTHER_LANGUAGES
        return replace(rules, **given)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


OTHER_LANGUAGES = MetadataRules(
    unigram_count=1,
    unigram_share=0.1,
    unigrams=251_465,
    bigrams=100_646,
    title_hourly=1,
    title_views=1,
    title_share=0.76,
    titles=61_235,
    mobile=True,
    longest=256,
    all_marks=True,
    most=None,
)


@dataclass
class SourceReport:
    """How many candidates a source had, how many became entries, and why the others did not."""

    name: str
    candidates: int = 0
    added: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def leave(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1


class Assembly:
    """A list of entries that grows source by source, each entry once.

    `matchable` leaves out what no text can hold, by MetaCLIP 2's rule if `languages`.
    """

    def __init__(self, rules: MetadataRules, *, matchable: bool = False, languages: bool = False) -> None:
        self.rules, self.matchable, self.languages = rules, matchable, languages
        self.entries: dict[str, tuple[str, float | None]] = {}
        self.reports: list[SourceReport] = []

    @property
    def full(self) -> bool:
        return self.rules.most is not None and len(self.entries) >= self.rules.most

    def add(
        self, source: str, candidates: Iterable[tuple[str, float | None]], *, most: int | None = None
    ) -> SourceReport:
        """Add a source's candidates, (entry, score), in their order; at most `most` new ones."""
        report = SourceReport(source)
        self.reports.append(report)
        for entry, score in candidates:
            report.candidates += 1
            why = self._why_not(entry, report.added, most)
            if why is None:
                self.entries[entry] = (source, score)
                report.added += 1
            else:
                report.leave(why)
        return report

    def _why_not(self, entry: str, added: int, most: int | None) -> str | None:
        if not entry:
            return "empty"
        if entry in self.entries:
            return "already there"
        if entry in _ASCII_MARKS or (self.rules.all_marks and punctuation().issuperset(entry)):
            return "only punctuation"
        if self.rules.longest is not None and len(entry) > self.rules.longest:
            return f"over {self.rules.longest} characters"
        if self.matchable and why_unmatchable(entry, languages=self.languages) is not None:
            return "no text can hold it"
        if self.full or (most is not None and added >= most):
            return "over the limit"
        return None


_ASCII_MARKS = frozenset(string.punctuation)
