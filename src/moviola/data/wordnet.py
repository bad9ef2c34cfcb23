"""Words from a WordNet database folder, such as that of Debian's `wordnet-base`.

The format is that of wndb(5WN): `data.noun`, `data.verb`, `data.adj` and `data.adv`, one synset a line,
after a licence whose lines begin with a space.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moviola.types import UsageError, printable

PARTS = ("noun", "verb", "adj", "adv")
"""Parts of speech, as their files end."""
_MARKER = re.compile(r"\((?:a|p|ip)\)$")  # where an adjective may stand: galore(ip)


@dataclass(frozen=True, slots=True)
class Synset:
    """Words with one meaning. `parents` are the offsets of the synsets above it (hypernyms)."""

    words: tuple[str, ...]
    parents: tuple[str, ...]
    gloss: str


def read_synsets(folder: str | Path, part: str) -> dict[str, Synset]:
    """Synsets of one part of speech (`noun`, `verb`, `adj`, `adv`) by their eight-digit offset.

    Words keep their case; underscores become spaces and adjectives lose their place markers.
    Raises `UsageError` where the file is missing or is no WordNet data file.
    """
    if part not in PARTS:
        raise UsageError(f"WordNet has the parts {', '.join(PARTS)}, got {part!r}.")
    path = Path(folder) / f"data.{part}"
    try:
        lines = path.read_text(encoding="latin-1").split("\n")
    except FileNotFoundError:
        raise UsageError(
            f"{printable(path)} does not exist, expected a WordNet database folder with data.noun, "
            "data.verb, data.adj and data.adv.",
            hint="On Debian it is /usr/share/wordnet, from the package wordnet-base.",
        ) from None
    synsets = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith(" "):
            try:
                offset, synset = _synset(line)
            except (ValueError, IndexError) as error:
                raise UsageError(
                    f"{printable(path)}, line {number}, is no WordNet synset: {line[:60]!r}."
                ) from error
            synsets[offset] = synset
    if not synsets:
        raise UsageError(f"{printable(path)} holds no synset.")
    return synsets


def _synset(line: str) -> tuple[str, Synset]:
    data, _, gloss = line.partition(" | ")
    cells = data.split()
    offset = f"{int(cells[0]):08d}"
    count = int(cells[3], 16)
    words = tuple(_MARKER.sub("", cells[4 + 2 * i]).replace("_", " ") for i in range(count))
    first = 5 + 2 * count
    pointers = range(first, first + 4 * int(cells[first - 1]), 4)
    parents = tuple(cells[i + 1] for i in pointers if cells[i] in ("@", "@i"))
    return offset, Synset(words, parents, gloss.strip())


def read_nouns(folder: str | Path) -> dict[str, Synset]:
    """Noun synsets by their eight-digit offset (a `wnid` without its leading n)."""
    return read_synsets(folder, "noun")


def hypernyms(
    synsets: Mapping[str, Synset], offset: str, *, leave_out: Collection[str] = ()
) -> Iterator[str]:
    """The words of every synset above this one, nearest first.

    A synset that holds one of the words in `leave_out` is passed over.
    """
    leave = frozenset(leave_out)
    current = synsets[offset]
    while current.parents:
        current = synsets[current.parents[0]]
        if not leave.intersection(current.words):
            yield from current.words


def synset_names(folder: str | Path) -> list[str]:
    """The distinct names of all synsets of all parts of speech, sorted: MetaCLIP's first source.

    A synset's name is its first word in lower case. As in MetaCLIP it ends before the first full stop,
    where the number of the sense begins in the usual notation (`dog.n.01`), so `St. Louis` gives `st`;
    `.22 caliber` would give an empty name, which is left out.
    """
    names = {
        synset.words[0].lower().partition(".")[0]
        for part in PARTS
        for synset in read_synsets(folder, part).values()
    }
    return sorted(names - {""})
