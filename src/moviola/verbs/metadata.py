"""Build and check metadata, the list of entries that curation balances a set of pairs by."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from moviola.data.metadata import (
    NO_SPACE_LANGUAGES,
    Assembly,
    MetadataRules,
    SourceReport,
    check_target,
    entries_hash,
    metadata_files,
    raw_entries,
    read_metadata,
    write_metadata,
)
from moviola.data.metadata_check import ERRORS, Problem, find_problems
from moviola.data.tally import best, read_tables, rows_of
from moviola.data.wikipedia import (
    UNREADABLE,
    Cut,
    count_views,
    count_words,
    find_files,
    greatest_pmi,
    pairs_by_pmi,
)
from moviola.data.wordnet import synset_names
from moviola.types import UsageError, printable
from moviola.verbs.common import Progress

DUMP_ENDINGS = (".xml", ".xml.bz2", ".xml.gz", ".xml.xz")
VIEW_ENDINGS = (".gz", ".bz2")


# --------------------------------------------------------------------------------------------------
# build
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildReport:
    """What was written, what each source gave, and what a reader should know."""

    to: Path
    language: str
    entries: int
    hash: str
    rules: MetadataRules
    sources: tuple[SourceReport, ...]
    notes: tuple[str, ...] = ()
    ok: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "to": str(self.to),
            "language": self.language,
            "entries": self.entries,
            "hash": self.hash,
            "sources": [vars(source) for source in self.sources],
            "rules": self.rules.to_json(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = []
        for source in self.sources:
            lines.append(f"{source.name}: {source.added} of {source.candidates} added{_left_out(source)}")
        lines += self.notes
        lines.append(f"{self.entries} entries in {printable(self.to)} (hash {self.hash}).")
        return "\n".join(lines)


def build(
    to: str | Path,
    *,
    language: str = "en",
    wordnet: str | Path | None = None,
    words: str | Path | None = None,
    dumps: Sequence[str | Path] = (),
    views: Sequence[str | Path] = (),
    rules: MetadataRules | None = None,
    matchable: bool = False,
    cut: Cut | None = None,
    keep: str = "",
    work: str | Path | None = None,
    memory: int = 1 << 30,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> BuildReport:
    """Put a list of entries together from local sources and write it to `to` (.txt, .json, .parquet).

    In this order, each entry once: the numbers 0 to 99, WordNet's synset names (`wordnet`, a database
    folder), a list of your own (`words`), frequent words and pairs of words with high pointwise mutual
    information from Wikipedia dumps (`dumps`), and much-viewed titles from hourly page views (`views`).
    WordNet's names come by the alphabet, the others by falling score, equals by their text. `rules`
    hold every threshold; without them they are the papers' for `language`, a Wikipedia's name.

    `matchable` leaves out entries that no text can hold. `cut` cuts text into words where the built-in
    rule will not do (languages without spaces); `keep` names marks that may stand inside a word. What
    was counted is kept in `work`, so that a build that was killed goes on from the files that it had
    finished, and other thresholds cost little; without it a temporary folder beside `to` is used and
    removed. `memory` in bytes bounds what counting holds, whatever the size of the dumps.

    Raises `UsageError` where there is no source, one cannot be read, `to` exists and `overwrite` is not
    said, or nothing but the numbers came of it.
    """
    to = Path(to)
    check_target(to)
    if to.exists() and not overwrite:
        raise UsageError(f"{printable(to)} exists.", hint="Name another file, or say --overwrite.")
    if wordnet is None and words is None and not dumps and not views:
        raise UsageError(
            "There is no source to build from.",
            hint="Name one: --wordnet FOLDER, --words FILE, --dump FILE or --views FOLDER.",
        )
    if wordnet is not None and language != "en":
        raise UsageError(
            f"A WordNet database folder is English, and the language is {language}.",
            hint="Give the words of that language's wordnet as a list: --words FILE.",
        )
    if memory < 16 << 20:
        raise UsageError(f"Counting needs at least 16 MB of memory, got {memory} bytes.")
    rules = MetadataRules.of(language) if rules is None else rules
    dump_files = find_files(dumps, "Wikipedia dump", DUMP_ENDINGS)
    view_files = find_files(views, "page views", VIEW_ENDINGS)
    made = Assembly(rules, matchable=matchable, languages=language != "en")
    made.add("numbers", ((str(n), None) for n in range(rules.numbers)))
    if wordnet is not None:
        made.add("wordnet", ((name, None) for name in synset_names(wordnet)))
    if words is not None:
        made.add("words", ((entry.strip(), None) for entry in read_metadata(words).entries))
    notes: list[str] = []
    with _work_folder(work, to) as folder:
        if dump_files:
            notes += _add_words(made, dump_files, folder, language, cut, keep, memory, on_progress)
        if view_files:
            notes += _add_titles(made, view_files, folder, language, memory, on_progress)
    entries = list(made.entries)
    if all(source == "numbers" for source, _ in made.entries.values()):
        raise UsageError(
            "No source gave an entry:\n" + "\n".join(str(note) for note in [*_told(made), *notes]),
            hint="Lower the thresholds, or give more sources.",
        )
    report = BuildReport(
        to, language, len(entries), entries_hash(entries), rules, tuple(made.reports), tuple(notes)
    )
    write_metadata(
        entries,
        to,
        sources=[source for source, _ in made.entries.values()],
        scores=[score for _, score in made.entries.values()],
        made=report.to_json(),
    )
    return report


def _left_out(source: SourceReport) -> str:
    return "".join(f", {count} {why}" for why, count in source.left_out.items())


def _told(made: Assembly) -> list[str]:
    return [
        f"  {source.name}: {source.candidates} candidates{_left_out(source)}"
        for source in made.reports
        if source.name != "numbers"
    ]


@contextmanager
def _work_folder(work: str | Path | None, to: Path) -> Iterator[Path]:
    if work is not None:
        Path(work).mkdir(parents=True, exist_ok=True)
        yield Path(work)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", suffix=".work", dir=to.parent) as folder:
        yield Path(folder)


def _add_words(
    made: Assembly,
    files: Sequence[Path],
    folder: Path,
    language: str,
    cut: Cut | None,
    keep: str,
    memory: int,
    on_progress: Progress | None,
) -> list[str]:
    rules = made.rules
    counts = count_words(files, folder, words=cut, keep=keep, memory=memory, on_progress=on_progress)
    distinct, total = rows_of(counts.unigrams), counts.total()
    notes = [f"The dumps hold {total} words, {distinct} of them distinct."]
    most = _most(rules.unigram_share, distinct, rules.unigrams)
    made.add("unigrams", _best(made, counts.unigrams, rules.unigram_count, most), most=most)
    if greatest_pmi(total) < rules.bigram_pmi:
        notes.append(
            f"Among {total} words no pair can have a pointwise mutual information over "
            f"{greatest_pmi(total):.1f}, so none reaches {rules.bigram_pmi:g}: lower --bigram-pmi."
        )
        made.add("bigrams", ())
        return notes
    pairs = pairs_by_pmi(counts, folder, least=rules.bigram_pmi, memory=memory)
    joint = "" if language in NO_SPACE_LANGUAGES else " "
    found = (
        (value.replace(" ", joint), score)
        for value, count, score in _rows(pairs, "value", "count", "score")
        if count >= rules.bigram_count
    )
    made.add("bigrams", found, most=rules.bigrams)
    return notes


def _add_titles(
    made: Assembly,
    files: Sequence[Path],
    folder: Path,
    language: str,
    memory: int,
    on_progress: Progress | None,
) -> list[str]:
    rules = made.rules
    views = count_views(
        files,
        folder,
        language=language,
        hourly=rules.title_hourly,
        mobile=rules.mobile,
        memory=memory,
        on_progress=on_progress,
    )
    # the lines that could not be read are counted under a title of their own, which sorts first
    head = next(read_tables(views), None)
    unreadable = 0
    if head is not None and head["value"][0].as_py() == UNREADABLE:
        unreadable = head["count"][0].as_py()
    distinct = rows_of(views) - (1 if unreadable else 0)
    most = _most(rules.title_share, distinct, rules.titles)
    candidates = _best(made, views, rules.title_views, most)
    made.add("titles", (one for one in candidates if one[0] != UNREADABLE), most=most)
    notes = [] if distinct else [f"The page views hold no title of {language}."]
    return notes + ([f"{unreadable} lines of page views could not be read."] if unreadable else [])


def _most(share: float, distinct: int, most: int | None) -> int | None:
    """How many a source may add; None for no limit."""
    if share >= 1:
        return most
    shared = int(distinct * share)
    return shared if most is None else min(shared, most)


def _best(made: Assembly, path: Path, least: int, most: int | None) -> Iterator[tuple[str, float]]:
    """Rows of a sorted table, greatest count first: enough of them that `most` can be new."""
    wanted = None if most is None else most + len(made.entries) + 1
    yield from _rows(best(read_tables(path), "count", least=least, most=wanted), "value", "count")


def _rows(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    for batch in table.select(columns).to_batches():
        yield from zip(*(batch.column(i).to_pylist() for i in range(len(columns))), strict=True)


# --------------------------------------------------------------------------------------------------
# check
# --------------------------------------------------------------------------------------------------


@dataclass
class ListReport:
    """The problems of one list. `hash` is None where an entry is no text."""

    path: Path
    language: str | None
    entries: int = 0
    hash: str | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(count for kind, count in self.kinds.items() if kind in ERRORS)

    @property
    def warnings(self) -> int:
        return sum(self.kinds.values()) - self.errors

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "language": self.language,
            "entries": self.entries,
            "hash": self.hash,
            "kinds": self.kinds,
            "problems": [
                {"number": p.number, "entry": p.entry, "kind": p.kind, "error": p.is_error, "why": p.why}
                for p in self.problems
            ],
        }

    def lines(self) -> Iterator[str]:
        yield f"{printable(self.path)}: {self.entries} entries" + (
            f" (hash {self.hash})" if self.hash else ""
        )
        for kind, count in self.kinds.items():
            grade = "error" if kind in ERRORS else "warning"
            yield f"  {count} {kind} ({grade})"
            shown = [p for p in self.problems if p.kind == kind]
            yield from (f"    {printable(problem)}" for problem in shown)
            if len(shown) < count:
                yield f"    and {count - len(shown)} more"


@dataclass(frozen=True)
class CheckReport:
    """The lists that were checked. `ok`: curation takes them (and, if strict, nothing is doubtful)."""

    lists: tuple[ListReport, ...]
    strict: bool = False

    @property
    def ok(self) -> bool:
        return not any(one.errors or (self.strict and one.warnings) for one in self.lists)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "lists": [one.to_json() for one in self.lists]}

    def __str__(self) -> str:
        lines = [line for one in self.lists for line in one.lines()]
        return "\n".join([*lines, "No problem." if not any(one.kinds for one in self.lists) else ""]).rstrip()


def check(
    path: str | Path,
    *,
    column: str | None = None,
    languages: bool | None = None,
    strict: bool = False,
    shown: int | None = 20,
) -> CheckReport:
    """Look for entries with which curation refuses a list, or which do nothing in it.

    Errors: empty entries, duplicates, what is no UTF-8 string. Warnings: entries that no text can hold,
    odd spaces, wrongly decoded characters and such in a form that texts seldom have. Each problem says
    why. `path` is a list or a folder with one per language. `languages` matches by MetaCLIP 2's rule;
    by default that of a folder. Of each kind at most `shown` problems are kept (None: all).
    """
    path = Path(path)
    if path.is_dir():
        files = [(language, file) for language, file in metadata_files(path).items()]
    elif path.exists():
        files = [(None, path)]  # type: ignore[list-item]
    else:
        raise UsageError(f"{printable(path)} does not exist.", hint="Check the path.")
    by_languages = path.is_dir() if languages is None else languages
    reports = []
    for language, file in files:
        report = ListReport(file, language)
        entries = list(raw_entries(file, column=column if file.suffix == ".parquet" else None))
        report.entries = len(entries)
        if not entries:
            raise UsageError(f"{printable(file)} holds no entry.")
        if all(isinstance(entry, str) for entry in entries):
            report.hash = entries_hash(entries)  # type: ignore[arg-type]
        for problem in find_problems(entries, languages=by_languages):
            report.kinds[problem.kind] = report.kinds.get(problem.kind, 0) + 1
            if shown is None or report.kinds[problem.kind] <= shown:
                report.problems.append(problem)
        reports.append(report)
    return CheckReport(tuple(reports), strict)
