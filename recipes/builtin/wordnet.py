"""Words above a word in WordNet, without those that are too general to caption a picture with."""

from __future__ import annotations

from collections.abc import Iterator

from moviola.data import wordnet
from moviola.data.wordnet import Synset, read_nouns

__all__ = ["VAGUE", "Synset", "hypernyms", "read_nouns"]

VAGUE = frozenset(
    """entity;physical entity;object;whole;living thing;organism;artifact;matter;causal agent;abstraction
    instrumentality;physical object;unit;chordate;vertebrate;placental;conveyance;natural object
    geological formation;substance;part;thing;solid;attribute;measure;relation;group
    causal agency;cause;artefact;instrumentation;covering;commodity;consumer goods""".replace(
        "\n    ", ";"
    ).split(";")
)


def hypernyms(synsets: dict[str, Synset], offset: str) -> Iterator[str]:
    """The words of every synset above this one, nearest first, without the vague ones."""
    return wordnet.hypernyms(synsets, offset, leave_out=VAGUE)
