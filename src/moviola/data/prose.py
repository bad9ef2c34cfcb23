"""English prose as it is found: cut into sentences, contractions written out.

>>> split_sentences("Dr. Low rode a horse. Did it jump? Yes, e.g. over a fence.")
['Dr. Low rode a horse.', 'Did it jump?', 'Yes, e.g. over a fence.']
>>> expand_contractions("It's old, they won't stop and the rider's horse can't.")
"It is old, they will not stop and the rider's horse cannot."
"""

from __future__ import annotations

import re

_END = re.compile(r"([.!?]+)[\"')\]\u2019\u201d\u00bb]*\s+")
_OPENING = "\"'([\u2018\u201c\u00ab"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_LAST = _words(
    "dr mr mrs ms prof st mt rev hon gen col capt sgt lt vs cf e.g i.e eg ie viz approx ca messrs"
)
_MAYBE_LAST = _words("etc al jr sr inc ltd co corp a.m p.m u.s u.k ft oz lb lbs min dept est ave")
_BEFORE_NUMBER = _words("no nos fig figs vol p pp ch sec art eq")

_WHOLE = {
    "can't": "cannot",
    "won't": "will not",
    "shan't": "shall not",
    "ain't": "are not",
    "let's": "let us",
    "y'all": "you all",
    "'cause": "because",
    "'tis": "it is",
    "o'clock": "of the clock",
    "gonna": "going to",
    "wanna": "want to",
    "gotta": "got to",
    "gimme": "give me",
    "lemme": "let me",
}
_AFTER = {"n't": " not", "'re": " are", "'ve": " have", "'ll": " will", "'m": " am", "'d": " would"}
# after any other word 's may be a possessive
_IS = _words("it he she that this what where who there here how when why everyone everything")
_WORD = re.compile(r"'?[A-Za-z]+(?:'[A-Za-z]+)*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a paragraph, with their full stops, by rules: nothing is learned.

    A sentence ends where white space follows `.`, `!` or `?`, and closing quotes; not after titles and
    the like ("Dr.", "e.g."), an initial ("J. Low"), or an ellipsis that goes on in small letters. What may
    end one or not ("etc.", "p.m.") does before a capital, "No." and "Fig." do unless a number follows.
    """
    found, start = [], 0
    for mark in _END.finditer(text):
        if _goes_on(text[start : mark.start()], mark[1], text[mark.end() :]):
            continue
        found.append(text[start : mark.end()].strip())
        start = mark.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def _goes_on(before: str, stop: str, after: str) -> bool:
    """Whether the sentence goes on after this full stop."""
    follows = after.lstrip(_OPENING)[:1]
    if stop != ".":
        return stop.startswith("..") and follows.islower()
    word = before.split()[-1].lstrip(_OPENING) if before.split() else ""
    if len(word) == 1 and word.isupper():
        return True
    word = word.lower()
    if word in _BEFORE_NUMBER and follows.isdigit():
        return True
    return word in _NEVER_LAST or (word in _MAYBE_LAST and not follows.isupper())


def expand_contractions(text: str) -> str:
    """Contractions written out ("don't": "do not"), possessives left alone; a capital at the front stays."""
    return _WORD.sub(lambda match: _expanded(match[0]), text.replace("\u2019", "'"))


def _expanded(word: str) -> str:
    lower = word.lower()
    if lower in _WHOLE:
        full = _WHOLE[lower]
        return full.capitalize() if word[:1].isupper() else full
    for end, full in _AFTER.items():
        if lower.endswith(end) and len(lower) > len(end):
            return word[: -len(end)] + full
    if lower.endswith("'s") and lower[:-2] in _IS:
        return word[:-2] + " is"
    return word
