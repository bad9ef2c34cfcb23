"""Word classes of an English caption by lists and by place: the first step of `sentence_parser.RuleParser`.

`tag` cuts a sentence into words and gives each one class:

D article or other determiner dropped from names, S possessive determiner, M numeral, A adjective, N noun,
G genitive 's, O personal pronoun, V verb, X auxiliary, P preposition or particle, T an infinitive's "to",
R adverb, C coordinating conjunction, B subordinating conjunction, W relative pronoun, Q question word,
E the "there" of "there is", "," a comma or colon, "." an end.

One pass from left to right; a word in two classes is decided by what stands around it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moviola.parts import sentence_lexicon as lex

__all__ = ["Word", "plural", "tag"]

_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+(?:[-']\w+)*|[.,;:!?]")
_LOOK_AHEAD = 12
# Classes that open a noun phrase whose noun is still to come.
_OPENERS = frozenset("DSMAG")
# A word in two lists has the class of the later one.
_FUNCTION_WORDS = {
    word: tag
    for tag, words in (
        ("R", lex.ADVERBS),
        ("B", lex.SUBORDINATORS),
        ("Q", lex.QUESTIONS),
        ("W", lex.RELATIVES),
        ("P", lex.PREPOSITIONS | lex.PARTICLES),
        ("C", lex.CONJUNCTIONS),
        ("X", lex.AUXILIARIES),
        ("O", lex.PRONOUNS),
        ("M", lex.NUMERALS),
        ("D", lex.ARTICLES),
        ("S", lex.POSSESSIVES),
        (",", (",", ":")),
        (".", (".", "!", "?", ";")),
    )
    for word in words
}


@dataclass(frozen=True, slots=True)
class Word:
    """One word, lower-case. `base` and `form` (base, s, ing, ed) are those of verbs, else empty."""

    text: str
    tag: str
    base: str = ""
    form: str = ""


def plural(noun: str) -> bool:
    last = noun.split()[-1]
    return last in lex.PLURALS or (last.endswith("s") and not last.endswith(("ss", "us", "is")))


def _adjective(word: str) -> bool:
    """Whether the word is a known adjective, or ends like one: "dark-haired", "colourless"."""
    if word in lex.ADJECTIVES:
        return True
    if word.endswith(("er", "est")):  # taller, bigger, happiest
        stem = word[:-2] if word.endswith("er") else word[:-3]
        return bool({stem, stem + "e", stem[:-1], stem[:-1] + "y"} & lex.ADJECTIVES) and len(stem) > 2
    last = word.rpartition("-")[2]
    if last != word:
        return last in lex.ADJECTIVES or (_verb(last) or ("", ""))[1] in ("ing", "ed")
    return len(word) > 5 and word.endswith(("ful", "ous", "less", "ible"))


def _verb(word: str) -> tuple[str, str] | None:
    """(base, form) of a known verb form, or of an unknown word that ends like one."""
    if word in lex.NOT_VERBAL:
        return None
    known = lex.verb_forms().get(word)
    if known is None and len(word) > 5 and word.isalpha() and word not in lex.ADVERBS:
        for ending in ("ing", "ed"):
            if word.endswith(ending) and re.search("[aeiouy]", word[: -len(ending)]):
                return word[: -len(ending)], ending
    return known


def _split(sentence: str) -> list[str]:
    """Lower-case words and marks; complex prepositions are one word, and so is each clitic."""
    clean = "".join(c if c.isprintable() else " " for c in sentence.replace("’", "'")).lower()
    words: list[str] = []
    for word in _WORD.findall(clean):
        stem, mark, clitic = word.rpartition("'")
        words += [stem, mark + clitic] if stem and clitic in ("s", "re", "m", "ll", "ve", "d") else [word]
    merged, i = [], 0
    while i < len(words):
        runs = (len(c) for c in lex.COMPLEX_PREPOSITIONS if tuple(words[i : i + len(c)]) == c)
        size = max(runs, default=1)
        merged.append(" ".join(words[i : i + size]))
        i += size
    return merged


class _Tagger:
    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.tagged: list[Word] = []
        self.forms: set[str] = set()  # of the verbs so far
        self.restart()

    def restart(self) -> None:
        """Forget the clause so far. `owed`: a relative clause began before its noun's own verb came."""
        self.owed = False
        self.finite = False
        self.first_noun = ""
        self.joined = False

    # -- what stands around place i ---------------------------------------------------------------

    def back(self, steps: int = 1) -> Word:
        """The word `steps` before the present one, adverbs not counted; an end where there is none."""
        for word in reversed(self.tagged):
            if word.tag != "R":
                steps -= 1
                if steps == 0:
                    return word
        return Word("", ".")

    def at(self, i: int) -> str:
        return self.words[i] if i < len(self.words) else "."

    def closed(self, i: int) -> str:
        """The class of word i where its list alone decides it, else ""."""
        word = self.at(i)
        if " " in word:
            return "P"
        if word.replace(",", "").replace(".", "").isdigit() and word not in ".,":
            return "M"
        return _FUNCTION_WORDS.get(word, "")

    def nominal(self, i: int) -> bool:
        """Whether word i can go on a noun phrase: an adjective, a noun, or "and" between adjectives."""
        end = i + _LOOK_AHEAD
        while i < end and self.at(i) in (",", "and") and _adjective(self.at(i + 1)):
            i += 2
        word, tag = self.at(i), self.closed(i)
        if tag:
            return tag == "M" or (tag == "R" and _adjective(word))
        verb = _verb(word)
        if verb is None or _adjective(word):
            return True
        base, form = verb
        if form in ("ing", "ed"):
            return self.at(i + 1) in lex.COMPOUND_TAILS or (not self.closed(i + 1) and self.at(i + 1) != ".")
        if form == "base" and not self.closed(i + 1) and self.at(i + 1) != ".":
            return True
        return base in lex.NOUN_OR_VERB and not (form == "s" and self.closed(i + 1) in ("D", "S", "O"))

    def verb_ahead(self, i: int) -> bool:
        """Whether the clause from word i on holds a verb: what "as" and "before" need to be conjunctions."""
        for k in range(i, min(i + _LOOK_AHEAD, len(self.words))):
            tag = self.closed(k)
            if tag in (".", "B") or (tag == "," and k > i):
                return False
            if tag == "X":
                return True
            verb = _verb(self.at(k))
            passive = verb and (verb[1] == "ing" or self.at(k + 1) == "by")
            if verb and not passive and not tag and k > i and self.closed(k - 1) not in ("D", "S", "M", "P"):
                return True
        return False

    # -- closed classes ---------------------------------------------------------------------------

    def function_word(self, i: int) -> str:
        """The class of word i if it is a function word here, else ""."""
        word, after, before = self.at(i), self.closed(i + 1), self.back().tag
        tag = "" if self.at(i + 1) in lex.COMPOUNDS.get(word, ()) else self.closed(i)
        opened = before in _OPENERS
        if word == "'s":
            return "X" if before in ("O", "E", "Q", "W") or after in ("D", "P") else "G"
        if word in lex.ARTICLES | lex.NUMERALS and self.at(i + 1) == "of":
            return "D"
        if word == "of" and before == "D":
            return "D"
        if word == "there":
            return "E" if self.at(i + 1) in lex.AUXILIARIES else "R"
        if word == "her":
            return "S" if not after or after == "M" or _adjective(self.at(i + 1)) else "O"
        if word == "that":
            return "W" if before in ("N", "O") else "D"
        if word == "to":
            return "T" if self.infinitive(i + 1) else "P"
        if word in ("as", "before", "after", "until", "since"):
            return "B" if self.verb_ahead(i + 1) else "P"
        if word in ("where", "when") and before != ".":
            return "B"
        if opened and word in ("can", "will", "past", "back") and after != "D":
            return ""
        if tag == "R" and _adjective(word) and before != "N":
            return ""
        if tag == "R" and opened and not self.nominal(i + 1):
            return ""
        if not tag and len(word) > 4 and word.endswith("ly"):
            return "" if word in lex.NOT_VERBAL or _adjective(word) else "R"
        return tag

    def infinitive(self, i: int) -> bool:
        verb = _verb(self.at(i))
        if verb is None or verb[1] != "base":
            return self.at(i) in ("be", "have", "do")
        return (
            verb[0] not in lex.NOUN_OR_VERB
            or self.back().base in lex.CATENATIVES
            or self.back().tag == "A"
            or self.closed(i + 1) in ("D", "S", "O")
        )

    # -- open classes -----------------------------------------------------------------------------

    def open_word(self, i: int) -> str:
        """A, N or V for word i."""
        word, before = self.at(i), self.back()
        verb = _verb(word)
        if self.at(i + 1) in lex.COMPOUNDS.get(word, ()):
            return "N"
        if before.tag in ("X", "T", "W", "O", "N", "E") and verb and self.verb_here(i, *verb):
            return "V"
        if before.tag in ("N", "O"):
            return "A" if word in lex.POSTNOMINAL else "N"
        if verb and verb[1] == "ing" and self.at(i + 1) in lex.COMPOUND_TAILS:
            return "N"
        nominal = self.nominal(i + 1)
        if before.tag in _OPENERS:
            if _adjective(word) and before.tag == "A" and not nominal and self.predicate():
                return "A"
            return "A" if nominal and (_adjective(word) or (verb and verb[1] in ("ing", "ed"))) else "N"
        if _adjective(word):
            dressed = before.tag == "P" or before.base in ("wear", "dress")
            joined = before.tag in ("C", ",") and self.back(2).tag != "A"
            return "A" if nominal or not (dressed or joined) else "N"
        if verb and self.verb_here(i, *verb):
            return "V"
        return "A" if verb and verb[1] in ("ing", "ed") and nominal else "N"

    def predicate(self) -> bool:
        """Whether the run of adjectives before the present word follows a copula, not an article."""
        for word in reversed(self.tagged):
            if word.tag not in ("A", "R", "C", ","):
                return word.tag in ("X", "V")
        return False

    def verb_here(self, i: int, base: str, form: str) -> bool:
        """Whether a word with a verb's form, outside an opened noun phrase, is a verb."""
        word, before, after, nominal = self.at(i), self.back(), self.closed(i + 1), self.nominal(i + 1)
        firm = base not in lex.NOUN_OR_VERB
        takes_object = after in ("D", "S", "O", "M")
        match before.tag:
            case "T" | "W":
                return True
            case "X":
                return form in ("ing", "ed") or base in lex.UNCHANGED or before.text not in lex.BE
            case "N" | "O" | "E":
                if form in ("ing", "ed"):
                    return not _adjective(word) or after in ("P", "R", ".")
                if form == "s":
                    due = not self.finite or (self.owed and (firm or after in ("P", ".", "D", "S", "O")))
                    many = plural(before.text) and not (self.first_noun and not plural(self.first_noun))
                    return due and (after != "X" or self.owed) and (firm or not many)
                if self.finite:
                    return self.causative() and (firm or takes_object or not nominal)
                many = plural(before.text) or (self.first_noun and plural(self.first_noun)) or self.joined
                return bool(many or takes_object or (firm and not nominal and after != "X"))
            case "P":
                return form == "ing" and takes_object
            case "V":
                if form == "ing":
                    return not nominal or before.base in lex.CATENATIVES | lex.POSTURES
                if form == "ed":
                    return not nominal
                if form == "s":
                    return self.owed and (after != "" or not nominal)
                return form == "base" and before.base in lex.CATENATIVES | {"help"}
            case "C" | ",":
                if form in ("ing", "ed"):
                    return not nominal or form in self.forms
                same = form in self.forms
                ready = takes_object or after in ("P", "R", ".", ",", "C", "B")
                return firm or (ready and (same or (form == "s" and self.owed)))
            case "B":
                return form in ("ing", "ed")
            case _:
                if form in ("ing", "ed"):
                    return not nominal or (form == "ing" and not self.verb_ahead(i + 1))
                return takes_object or (firm and form == "base") or (form == "base" and after == "P")

    def causative(self) -> bool:
        """Whether the last verb takes a clause without "to": "helps a child climb"."""
        last = next((w for w in reversed(self.tagged) if w.tag in ("V", "X")), None)
        return last is not None and (last.base in lex.CAUSATIVES or last.text in lex.AUXILIARIES - lex.BE)

    # -- the pass ---------------------------------------------------------------------------------

    def run(self) -> list[Word]:
        for i, word in enumerate(self.words):
            tag = self.function_word(i)
            if not tag:
                tag = self.open_word(i)
                if tag == "N" and self.unknown_verb(i):
                    self.tagged.append(Word(word, "V", word[:-1], "s"))
                    self.finite = True
                    continue
            base, form = _verb(word) or ("", "")
            self.tagged.append(Word(word, tag, base, form) if tag == "V" else Word(word, tag))
            if tag == "V":
                self.forms.add(form)
            if tag in (",", ".", "C", "B", "W"):
                joined, first = tag == "C" and not self.finite, self.first_noun
                owed = tag in "W," and (self.owed or (bool(first) and not self.finite))
                self.restart()
                self.owed = owed
                if joined:
                    self.joined, self.first_noun = True, first
            elif tag == "X" or (
                tag == "V" and (form in ("s", "base") or self.closed(i + 1) in ("D", "S", "O"))
            ):
                self.owed = self.owed and not (self.finite and form == "s")
                self.finite = self.finite or form != "ing"
            elif tag in ("N", "O") and not self.first_noun and self.closed(i + 1):
                self.first_noun = word
        return self.tagged

    def unknown_verb(self, i: int) -> bool:
        """A word of no list in -s between a singular noun and an object: "a man vlogs his day"."""
        word, before = self.at(i), self.back()
        return (
            word.endswith("s")
            and not word.endswith(("ss", "us", "is"))
            and before.tag == "N"
            and not plural(before.text)
            and not self.finite
            and word not in lex.NOT_VERBAL
            and self.closed(i + 1) in ("D", "S", "O")
        )


def tag(sentence: str) -> list[Word]:
    """The words of a sentence with their classes. Marks other than `. , ; : ! ?` are dropped."""
    return _Tagger(_split(sentence)).run()
