"""What is wrong with a list of entries: duplicates, entries that no text can hold, broken encodings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from moviola.data.matching import BLANKS, SPACED_MARKS, spaced_entry

_SPECIAL = re.compile(f"[{re.escape(''.join((*SPACED_MARKS, *BLANKS)))}\ud800-\udfff]")


def why_unmatchable(entry: str, *, languages: bool = False) -> str | None:
    """Why no text can hold the entry, or None where one can: exact, by the spacing rule.

    In a spaced text there is no tab, line feed or carriage return, and each of `, . ; : ? ! \\`` has a
    space of its own on both sides. `languages`: MetaCLIP 2's rule (see `matching.spaced_entry`).

    >>> why_unmatchable("hot dog"), why_unmatchable("St. Louis")
    (None, "'.' touches 't'; in a spaced text it stands between spaces")
    """
    if not entry:
        return "it is empty" if languages else None
    if not _SPECIAL.search(entry):
        return None
    for character in entry:
        if character in BLANKS:
            return f"it holds {character!r}, which becomes a space in every text"
        if "\ud800" <= character <= "\udfff":
            return "it holds half a surrogate pair, which no UTF-8 text does"
    form = spaced_entry(entry, languages=languages)
    for at, character in enumerate(form):
        if character not in SPACED_MARKS:
            continue
        before, after = form[at - 1 : at], form[at + 1 : at + 2]
        for beside in (before, after):
            if beside and beside != " ":
                return f"{character!r} touches {beside!r}; in a spaced text it stands between spaces"
        second = form[at + 2 : at + 3]
        if second in SPACED_MARKS:
            return f"{character!r} and {second!r} share a space; a spaced text has two between them"
    return None


def witness(entry: str, *, languages: bool = False) -> str | None:
    """A text in which the entry is found, or None where there is none.

    >>> witness("dog , cat")
    ' dog,cat '
    """
    if why_unmatchable(entry, languages=languages) is not None:
        return None
    form = spaced_entry(entry, languages=languages)
    # a mark at the end of an entry that asks for no space there has one in the text all the same
    before = " " if form[0] in SPACED_MARKS else ""
    after = " " if form[-1] in SPACED_MARKS else ""
    text = before + form + after
    for mark in SPACED_MARKS:
        text = text.replace(f" {mark} ", mark)
    return text


# --------------------------------------------------------------------------------------------------
# Checking
# --------------------------------------------------------------------------------------------------

Kind = Literal["empty", "duplicate", "no text", "unmatchable", "blanks", "not normalised", "garbled"]
ERRORS = frozenset({"empty", "duplicate", "no text"})
"""Problems with which curation refuses a list; the others make an entry useless or doubtful."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One entry, by its number from 0, and why it is a problem."""

    number: int
    entry: str
    kind: Kind
    why: str

    @property
    def is_error(self) -> bool:
        return self.kind in ERRORS

    def __str__(self) -> str:
        return f"{self.number}: {self.entry!r}: {self.why}"


def find_problems(entries: Iterable[object], *, languages: bool = False) -> Iterator[Problem]:
    """Every problem of every entry, in order. `entries` may hold what is no string (see `raw_entries`)."""
    first: dict[str, int] = {}
    for number, entry in enumerate(entries):
        why = not_text(entry)
        if why is not None:
            shown = entry.decode("utf-8", "backslashreplace") if isinstance(entry, bytes) else str(entry)
            yield Problem(number, shown, "no text", f"it {why}")
            continue
        assert isinstance(entry, str)
        if not entry:
            yield Problem(number, entry, "empty", "it is empty")
            continue
        if entry in first:
            yield Problem(number, entry, "duplicate", f"it is the same as entry {first[entry]}")
            continue
        first[entry] = number
        why = why_unmatchable(entry, languages=languages)
        if why is not None:
            yield Problem(number, entry, "unmatchable", f"no text can hold it: {why}")
        elif entry != entry.strip(" ") or "  " in entry:
            yield Problem(number, entry, "blanks", "only texts with as many spaces in a row hold it")
        elif entry != entry.strip():
            yield Problem(number, entry, "blanks", "it begins or ends with white space other than a space")
        if not entry.isascii():
            yield from _encoding(number, entry)


def not_text(entry: object) -> str | None:
    """Why something is no UTF-8 string, as the end of a sentence about it; None where it is one."""
    if isinstance(entry, bytes):
        return "is not UTF-8"
    if not isinstance(entry, str):
        return "is null" if entry is None else f"is a {type(entry).__name__}, expected a string"
    if not entry.isascii() and any("\ud800" <= c <= "\udfff" for c in entry):
        return "holds half a surrogate pair, which UTF-8 cannot"
    return None


def _encoding(number: int, entry: str) -> Iterator[Problem]:
    import ftfy

    if "\ufffd" in entry:
        yield Problem(number, entry, "garbled", "it holds U+FFFD, the sign for a lost character")
    elif (better := ftfy.fix_encoding(entry)) != entry:
        yield Problem(number, entry, "garbled", f"it was decoded wrongly, perhaps it is {better!r}")
    if not unicodedata.is_normalized("NFC", entry):
        composed = unicodedata.normalize("NFC", entry)
        why = f"it is not in the composed form {composed!r} of most texts; texts are not normalised"
        yield Problem(number, entry, "not normalised", why)
