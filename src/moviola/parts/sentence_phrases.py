"""Noun phrases from tagged words: the second step of `sentence_parser.RuleParser`."""

from __future__ import annotations

from dataclasses import dataclass, field

from moviola.parts import sentence_lexicon as lex
from moviola.parts.sentence_tags import Word

__all__ = ["Piece", "Thing", "phrases"]


@dataclass(slots=True, eq=False)
class Thing:
    """One noun phrase."""

    noun: str
    attributes: list[str]
    definite: bool = False
    owned: bool = False  # a possessive stands before it
    said: list[str] = field(default_factory=list)  # adjectives said of it elsewhere: "the dog is brown"

    @property
    def animate(self) -> bool:
        return lex.animate(self.noun)

    def repeats(self, earlier: Thing) -> bool:
        """Whether this speaks of `earlier`, of the same noun: no attribute of its own tells it apart."""
        same = set(self.attributes) == set(earlier.attributes)
        return same or (self.definite and set(self.attributes) <= set(earlier.attributes))


@dataclass(slots=True)
class Piece:
    """`kind` is NP, V, A (predicate adjectives), K (a particle) or the class of a function word."""

    kind: str
    word: Word
    thing: Thing | None = None


def phrases(words: list[Word]) -> list[Piece]:
    """Noun phrases put together; everything else goes through, adverbs and question words left out."""
    out: list[Piece] = []
    i = 0
    while i < len(words):
        word = words[i]
        if word.tag == "O":
            out.append(Piece("NP", word, Thing(word.text, [], definite=True)))
        elif word.tag in "DSMAN":
            i, pieces = _noun_phrase(words, i)
            out += pieces
            continue
        elif word.tag not in "RQ":
            out.append(Piece(word.tag, word))
        i += 1
    for here, after in zip(out, [*out[1:], Piece(".", Word("", "."))]):
        if here.kind == "P" and after.kind in ("C", ",", ".", "B", "V", "X", "P", "T"):
            here.kind = "K"
    return [piece for piece in out if piece.kind != "K" or piece.word.text in lex.PARTICLES]


def _noun_phrase(words: list[Word], i: int) -> tuple[int, list[Piece]]:
    attributes: list[str] = []
    nouns: list[str] = []
    definite = owned = False
    start = i
    while i < len(words):
        word = words[i]
        if word.tag in "DSM" and nouns:
            break
        if word.tag in "DS":
            owned = owned or word.tag == "S"
            definite = definite or owned or word.text in lex.DEFINITE
        elif word.tag in "MA" and not nouns:
            attributes.append(word.text)
        elif word.tag == "N":
            nouns.append(word.text)
        elif word.tag in ("C", ",") and not nouns and attributes and _adjectives_go_on(words, i + 1):
            pass
        elif word.text == "of" and nouns and nouns[-1] in lex.COLLECTIVES and _bare(words, i + 1):
            nouns.append("of")
        elif word.tag != "R" or nouns:
            break
        i += 1
    if not nouns:
        adjectives = [Piece("A", w) for w in words[start:i] if w.tag == "A"]
        return max(i, start + 1), adjectives
    thing = Thing(" ".join(nouns), attributes, definite, owned)
    pieces = [Piece("NP", words[i - 1], thing)]
    if i < len(words) and words[i].tag == "G":  # "the boy's bike": two things
        pieces[0].kind = "owner"
        i += 1
    return i, pieces


def _adjectives_go_on(words: list[Word], i: int) -> bool:
    while i < len(words) and words[i].tag in "AR":
        i += 1
    return i < len(words) and words[i].tag == "N" and words[i - 1].tag == "A"


def _bare(words: list[Word], i: int) -> bool:
    return i < len(words) and words[i].tag in "MAN"
