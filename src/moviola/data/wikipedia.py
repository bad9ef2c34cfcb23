"""Counts of words, pairs of words and titles from local Wikipedia dumps, in bounded memory.

Dumps are the `pages-articles` XML files of dumps.wikimedia.org (.xml, .bz2, .gz, .xz; several streams in
one file are fine), views the hourly `pageviews-*` files (.gz, .bz2 or plain). Both are read as streams.
What a file gave is kept as sorted tables in a work folder, so that a second run reads only new files.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, cast
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moviola.data.tally import Runs, Tally, merged, read_tables, with_counts, write_tables
from moviola.data.wikitext import DROPPED_NAMESPACES, Words, plain_text
from moviola.types import UsageError, printable

Progress = Callable[[float, float | None, str], None]
"""Called with megabytes read, megabytes in all, and the file's name."""
Cut = Callable[[str], Iterator[list[str]]]
"""From plain text to runs of words that follow one another."""

_VERSION = "1"  # of what a kept table holds: another number and old ones are made anew
_CHUNK = 1 << 18
_PAGES = 256  # pages between two reports of progress
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Page:
    """An article: its title and its markup."""

    title: str
    markup: str


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The bytes of a file, unpacked by its ending, and the file itself, whose place tells the progress."""
    try:
        raw = path.open("rb")
    except FileNotFoundError:
        raise UsageError(f"{printable(path)} does not exist.", hint="Check the path.") from None
    with raw:
        openers: dict[str, Callable[..., Any]] = {".bz2": bz2.open, ".gz": gzip.open, ".xz": lzma.open}
        packed = openers.get(path.suffix.lower())
        if packed is None:
            yield raw, raw
        else:
            with packed(raw, "rb") as unpacked:
                yield cast(IO[bytes], unpacked), raw


def read_dump(
    path: str | Path, *, on_bytes: Callable[[int], None] | None = None
) -> Iterator[tuple[Page, frozenset[str]]]:
    """The articles of a dump, with the names of the namespaces whose links are no text.

    Only pages of the main namespace that are no redirects. Of a page with several revisions the last
    counts. `on_bytes` gets the packed bytes read so far. Raises `UsageError` for a file that is no dump
    or is cut short; pages before the damage have been given by then.
    """
    path = Path(path)
    dropped = set(DROPPED_NAMESPACES)
    parser: ElementTree.XMLPullParser[Any] = ElementTree.XMLPullParser(("start", "end"))
    reader = _Pages(dropped)
    with _opened(path) as (file, raw):
        try:
            while chunk := file.read(_CHUNK):
                parser.feed(chunk)
                for page in reader.take(parser.read_events()):
                    yield page, frozenset(dropped)
                if on_bytes is not None:
                    on_bytes(raw.tell())
            parser.close()
        except ElementTree.ParseError as error:
            what = "is no XML" if not reader.started else "is damaged or cut short"
            raise UsageError(
                f"{printable(path)} {what} ({error}), after {reader.pages} pages.",
                hint="Copy it again; expected a pages-articles dump of Wikipedia.",
            ) from error
        except _BROKEN as error:
            raise UsageError(
                f"{printable(path)} cannot be unpacked ({error}), after {reader.pages} pages.",
                hint="Copy it again.",
            ) from error
    if not reader.pages:
        raise UsageError(
            f"{printable(path)} holds no page, expected a pages-articles dump of Wikipedia.",
            hint="Take the file named like enwiki-20240501-pages-articles.xml.bz2.",
        )


class _Pages:
    """Articles from the events of an XML parser, every element forgotten once it is done with."""

    def __init__(self, dropped: set[str]) -> None:
        self.dropped = dropped
        self.started = False
        self.pages = 0
        self._path: list[ElementTree.Element] = []
        self._title = self._space = self._markup = ""
        self._redirect = False

    def take(self, events: Iterator[Any]) -> Iterator[Page]:
        for event, element in events:
            self.started = True
            name = element.tag.rpartition("}")[2]
            if event == "start":
                self._path.append(element)
                if name == "page":
                    self._title = self._space = self._markup = ""
                    self._redirect = False
                continue
            self._path.pop()
            parent = self._path[-1].tag.rpartition("}")[2] if self._path else ""
            if parent == "page" and name == "title":
                self._title = element.text or ""
            elif parent == "page" and name == "ns":
                self._space = (element.text or "").strip()
            elif parent == "page" and name == "redirect":
                self._redirect = True
            elif parent == "revision" and name == "text":
                self._markup = element.text or ""
            elif name == "namespace" and element.get("key") in ("6", "14") and element.text:
                self.dropped.add(element.text.strip().lower())
            if self._path:
                self._path[-1].remove(element)
            if name == "page":
                self.pages += 1
                if self._space in ("", "0") and not self._redirect:
                    yield Page(self._title, self._markup)


# --------------------------------------------------------------------------------------------------
# Words and pairs of words
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WordCounts:
    """Sorted tables (`value`, `count`) on disk: words, and pairs of words with one space between."""

    unigrams: Path
    bigrams: Path

    def total(self) -> int:
        """How many words there are, repeats counted."""
        return sum(pc.sum(table["count"]).as_py() for table in read_tables(self.unigrams))


def count_words(
    dumps: Sequence[Path],
    work: Path,
    *,
    words: Cut | None = None,
    keep: str = "",
    memory: int = 1 << 30,
    on_progress: Progress | None = None,
) -> WordCounts:
    """Count the words and pairs of words of all articles.

    `words` cuts text into runs of words; without it `Words(keep=keep)` does. What each dump gave is
    kept in `work` by the file's path, size and time, and by how words are cut.
    """
    cut = Words(keep=keep) if words is None else words
    how = f"{_VERSION} {keep!r}" if words is None else f"{_VERSION} {_name_of(words)}"
    meter = _Meter(dumps, on_progress)
    done: list[WordCounts] = []
    for path in dumps:
        stem = work / _key(path, how)
        counts = WordCounts(stem.with_suffix(".unigrams.parquet"), stem.with_suffix(".bigrams.parquet"))
        if not counts.unigrams.exists() or not counts.bigrams.exists():
            _count_dump(path, counts, work / f"{stem.name}.runs", cut, memory, meter)
        meter.finished(path)
        done.append(counts)
    if len(done) == 1:
        return done[0]
    name = hashlib.sha256("\n".join(c.unigrams.name for c in done).encode()).hexdigest()[:16]
    both = WordCounts(work / f"all-{name}.unigrams.parquet", work / f"all-{name}.bigrams.parquet")
    for to, parts in (
        (both.bigrams, [c.bigrams for c in done]),
        (both.unigrams, [c.unigrams for c in done]),
    ):
        if not to.exists():
            _merge(parts, to, work / f"{name}.runs", memory)
    return both


def _merge(parts: Sequence[Path], to: Path, folder: Path, memory: int) -> None:
    """Sum sorted tables into one; more than a merge can hold open go through runs."""
    if len(parts) <= 64:
        write_tables(merged(parts), to, ("count",))
        return
    runs = Runs(folder, memory=memory)
    for part in parts:
        for table in read_tables(part):
            runs.add(table)
    runs.finish(to)


def _count_dump(path: Path, counts: WordCounts, folder: Path, cut: Cut, memory: int, meter: _Meter) -> None:
    _empty(folder)
    # there are some ten times as many distinct pairs as words
    unigrams = Tally(folder / "unigrams", memory=memory // 5)
    bigrams = Tally(folder / "bigrams", memory=memory // 5 * 3)
    for number, (page, dropped) in enumerate(read_dump(path, on_bytes=meter.at)):
        for run in cut(plain_text(page.markup, dropped=dropped)):
            unigrams.add(run)
            bigrams.add(map(" ".join, pairwise(run)))
        if number % _PAGES == 0:
            meter.tell(path)
    bigrams.finish(counts.bigrams)
    unigrams.finish(counts.unigrams)
    _empty(folder)


def _empty(folder: Path) -> None:
    """Delete runs that an earlier, killed run left."""
    if folder.is_dir():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def pairs_by_pmi(counts: WordCounts, work: Path, *, least: float, memory: int = 1 << 30) -> pa.Table:
    """Pairs of words whose pointwise mutual information is at least `least`.

    PMI is log2(count(x, y) * N / (count(x) * count(y))) with N words in all. Columns `value`, `count` and
    `score` (the PMI), greatest first, equals by value. A pair cannot be more frequent than its words, so
    most are dropped once the count of the first word is known.
    """
    total = counts.total()
    folder = work / "pairs.runs"
    _empty(folder)
    turned = Runs(folder, ("count", "first"), memory=memory // 2)
    blocks = (t.append_column("word", _part(t["value"], 0)) for t in read_tables(counts.bigrams))
    for table in with_counts(blocks, read_tables(counts.unigrams), "word", "first"):
        count, first = table["count"].to_numpy(), table["first"].to_numpy()
        hopeful = pmi(count, first, count, total) >= least - 1e-9
        kept = table.filter(pa.array(hopeful))
        if kept.num_rows:
            second = _part(kept["value"], 1)
            value = pc.binary_join_element_wise(second, kept["word"], " ")
            turned.add(pa.table({"value": value, "count": kept["count"], "first": kept["first"]}))
    found = []
    blocks = (t.append_column("word", _part(t["value"], 0)) for t in turned.merged())
    for table in with_counts(blocks, read_tables(counts.unigrams), "word", "second"):
        count, first, second = (table[name].to_numpy() for name in ("count", "first", "second"))
        score = pmi(count, first, second, total)
        keep = pa.array(score >= least)
        kept = table.append_column("score", pa.array(score)).filter(keep)
        if kept.num_rows:
            value = pc.binary_join_element_wise(_part(kept["value"], 1), kept["word"], " ")
            found.append(pa.table({"value": value, "count": kept["count"], "score": kept["score"]}))
    turned.clear()
    schema = pa.schema([("value", pa.string()), ("count", pa.int64()), ("score", pa.float64())])
    table = pa.concat_tables(found) if found else schema.empty_table()
    return table.sort_by([("score", "descending"), ("value", "ascending")])


def pmi(count: np.ndarray, first: np.ndarray, second: np.ndarray, total: int) -> np.ndarray:
    """Pointwise mutual information in bits, float64.

    >>> pmi(np.array([2]), np.array([2]), np.array([4]), 1024).tolist()
    [8.0]
    """
    return np.log2(count.astype(np.float64) * total) - np.log2(first.astype(np.float64) * second)


def greatest_pmi(total: int) -> float:
    """No pair among `total` words has more: two words that come once each, together."""
    return math.log2(total) if total else 0.0


def _part(values: pa.ChunkedArray, which: int) -> pa.Array:
    """The first or second word of each pair."""
    return pc.list_element(pc.split_pattern(values, " ", max_splits=1), which)


# --------------------------------------------------------------------------------------------------
# Titles
# --------------------------------------------------------------------------------------------------


UNREADABLE = ""
"""The title under which `count_views` counts lines that it could not read."""


def count_views(
    files: Sequence[Path],
    work: Path,
    *,
    language: str = "en",
    hourly: int = 50,
    mobile: bool = False,
    memory: int = 1 << 30,
    on_progress: Progress | None = None,
) -> Path:
    """Sum the views of each title over hourly files: a sorted table of `value` and `count`.

    Counts under `hourly` in one file are ignored, titles with a colon dropped; underscores become
    spaces. `mobile` adds the views of the mobile site.
    """
    site = language.replace("_", "-").encode()
    prefixes = (site + b" ", site + b".m ") if mobile else (site + b" ",)
    how = f"{_VERSION} {prefixes!r} {hourly}"
    meter = _Meter(files, on_progress)
    parts = []
    for path in files:
        part = work / f"{_key(path, how)}.views.parquet"
        if not part.exists():
            folder = work / f"{part.name}.runs"
            _empty(folder)
            tally = Tally(folder, memory=memory)
            for title, views in _views(path, prefixes, meter):
                if title == UNREADABLE or (views >= hourly and ":" not in title):
                    tally.add_counts({title: views})
            tally.finish(part)
        meter.finished(path)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    name = hashlib.sha256("\n".join(p.name for p in parts).encode()).hexdigest()[:16]
    to = work / f"all-{name}.views.parquet"
    if not to.exists():
        _merge(parts, to, work / f"{name}.runs", memory)
    return to


def _views(path: Path, prefixes: tuple[bytes, ...], meter: _Meter) -> Iterator[tuple[str, int]]:
    """(title, views) of the lines of a site; (`UNREADABLE`, 1) for one that is no such line."""
    lines = 0
    with _opened(path) as (file, raw):
        try:
            for line in file:
                lines += 1
                if lines % (1 << 18) == 0:
                    meter.at(raw.tell())
                    meter.tell(path)
                if line.startswith(prefixes):
                    yield _view(line)
        except _BROKEN as error:
            raise UsageError(
                f"{printable(path)} cannot be unpacked ({error}), after {lines} lines.",
                hint="Copy it again.",
            ) from error


def _view(line: bytes) -> tuple[str, int]:
    cells = line.rstrip(b"\r\n").split(b" ")
    if len(cells) != 4 or not cells[2].isdigit():
        return UNREADABLE, 1
    try:
        title = cells[1].decode().replace("_", " ").strip()
    except UnicodeDecodeError:
        return UNREADABLE, 1
    return (title, int(cells[2])) if title else (UNREADABLE, 1)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def find_files(sources: Sequence[str | Path], what: str, endings: Sequence[str]) -> list[Path]:
    """Files named, found by a pattern, or with one of the endings in a folder; each once, sorted by name.

    Raises `UsageError` for a path that is not there or a folder without such a file.
    """
    found: dict[Path, Path] = {}
    for source in map(Path, sources):
        if source.is_file():
            files = [source]
        elif source.is_dir():
            files = [p for p in source.iterdir() if p.is_file() and p.name.lower().endswith(tuple(endings))]
        else:
            files = sorted(p for p in source.parent.glob(source.name) if p.is_file())
        if not files:
            raise UsageError(
                f"{printable(source)} gives no {what}.",
                hint=f"Expected files that end in {', '.join(endings)}.",
            )
        for path in files:
            found.setdefault(path.resolve(), path)
    return sorted(found.values(), key=lambda path: (path.name, str(path)))


def _key(path: Path, how: str) -> str:
    """A file name for what `path` gave when read as `how` says."""
    if not path.is_file():
        raise UsageError(f"{printable(path)} does not exist.", hint="Check the path.")
    stat = path.stat()
    named = f"{path.resolve()}\n{stat.st_size} {stat.st_mtime_ns}\n{how}"
    digest = hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{path.name.partition('.')[0][:80]}-{digest}"


def _name_of(words: Cut) -> str:
    named = words if hasattr(words, "__qualname__") else type(words)
    return f"{named.__module__}.{named.__qualname__}"


class _Meter:
    """Bytes read of several files, told as megabytes."""

    def __init__(self, files: Sequence[Path], on_progress: Progress | None) -> None:
        self._sizes = {path: path.stat().st_size if path.is_file() else 0 for path in files}
        self._total = sum(self._sizes.values())
        self._done = self._here = 0
        self._tell = on_progress

    def at(self, place: int) -> None:
        self._here = place

    def tell(self, path: Path) -> None:
        if self._tell is not None:
            self._tell((self._done + self._here) / 1e6, self._total / 1e6, path.name)

    def finished(self, path: Path) -> None:
        self._done += self._sizes[path]
        self._here = 0
        self.tell(path)
