"""Names, synonyms and hypernyms from a WordNet database folder (such as Debian's `wordnet-base`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Too general to caption a picture with.
VAGUE = frozenset(
    """entity;physical entity;object;whole;living thing;organism;artifact;matter;causal agent;abstraction
    instrumentality;physical object;unit;chordate;vertebrate;placental;conveyance;natural object
    geological formation;substance;part;thing;solid;attribute;measure;relation;group
    causal agency;cause;artefact;instrumentation;covering;commodity;consumer goods""".replace(
        "\n    ", ";"
    ).split(";")
)


@dataclass(frozen=True)
class Synset:
    words: tuple[str, ...]
    parents: tuple[str, ...]
    gloss: str


def read_nouns(folder: Path) -> dict[str, Synset]:
    """Noun synsets by their eight-digit offset (a `wnid` without its leading n)."""
    synsets = {}
    for line in (folder / "data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence at the head of the file
            continue
        data, _, gloss = line.partition(" | ")
        parts = data.split()
        words = int(parts[3], 16)
        pointers = parts[5 + 2 * words :]
        synsets[parts[0]] = Synset(
            words=tuple(parts[4 + 2 * i].replace("_", " ") for i in range(words)),
            parents=tuple(
                pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")
            ),
            gloss=gloss.strip(),
        )
    return synsets


def hypernyms(synsets: dict[str, Synset], offset: str) -> Iterator[str]:
    """The words of every synset above this one, nearest first, without the vague ones."""
    current = synsets[offset]
    while current.parents:
        current = synsets[current.parents[0]]
        if not VAGUE.intersection(current.words):
            yield from current.words
