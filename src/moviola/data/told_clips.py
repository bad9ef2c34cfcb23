"""Two things done one after the other, told by observers, by documents and by names: a made world of words.

A class is an ordered pair of actions of the made world, and half of the classes are the others in reverse.
`observations` are what imperfect captioners say of clips, `documents` prose about each class, `paraphrases`
pairs of texts that say the same of OTHER ordered pairs: what a sentence encoder may learn from. A test class
is thus new to such an encoder in both its orders; its words are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np

from moviola.data.word_tokens import word_tokens
from moviola.data.world_actions import ACTION_WORDS
from moviola.data.world_shapes import COLOURS, SHAPES

ACTIONS = (
    "bounces",
    "blinks",
    "shakes",
    "grows",
    "shrinks",
    "moves left",
    "moves right",
    "rotates clockwise",
)
COUPLES = ((0, 1), (2, 3), (4, 5), (6, 7), (1, 6), (3, 0))
"""Actions of the classes, in both orders: two in a row are each other's reverse."""
PAIRS = tuple(order for couple in COUPLES for order in (couple, couple[::-1]))
CLASSES = tuple(f"{ACTIONS[a]} {ACTIONS[b]}" for a, b in PAIRS)
SENTENCES = tuple(f"something {ACTIONS[a]}, then it {ACTIONS[b]}" for a, b in PAIRS)
"""The names of the classes as sentences of the kind that encoders learn from."""
LENGTH = 80

# {first} and {second} are clauses in the order in which they happen
_FORMS = (
    "{first} and then {second}",
    "{first}, then {second}",
    "first {first}, then {second}",
    "{first} before {second}",
    "after {first}, {second}",
    "{second} after {first}",
    "{second}, but first {first}",
    "at first {first}, at the end {second}",
    "{first}, and later {second}",
)
_ONE = ("{first}", "we see that {first}", "a video where {first}", "only one thing happens: {first}")
_PROSE = (
    "watch closely for a little while and you will see that {told}, which is all there is to it.",
    "many short films of this kind are alike: {told}, and nothing else changes until the very end.",
    "to give one more example out of the many that could be given here, {told}, just as one expects.",
    "it is easy to tell once you know it, because {told} in every film of this kind.",
    "people who have seen it once remember it like this: {told} while the camera does not move at all.",
)
_ASIDES = (
    "the word has been in use for a long time, and nobody can say who was the first to use it.",
    "there are many books about the subject, and most of them are found in any good library near you.",
    "such films are often shown at school, where children learn to tell colours and shapes apart.",
    "it should be said that the camera is never moved while a film like this is made at home.",
)
_PLAIN = ("something", "a thing", "a shape", "an object")


def _clause(action: int, who: str, dice: Random, wording: Sequence[int]) -> str:
    phrases = [finite for part in wording for finite, _ in ACTION_WORDS[ACTIONS[action]][part]]
    return f"{who} {dice.choice(phrases)}"


def _who(dice: Random) -> str:
    return f"a {dice.choice(tuple(COLOURS))} {dice.choice(SHAPES)}"


def tell(
    actions: Sequence[int], who: str, dice: Random, *, wording: Sequence[int] = (0, 1), plain: float = 0.3
) -> str:
    """A sentence of one action or two in their order; `plain`: how often the thing is just a thing."""
    form = dice.choice(_FORMS if len(actions) > 1 else _ONE)
    named = dice.choice(_PLAIN) if dice.random() < plain else who
    slots = sorted(("first", "second")[: len(actions)], key=lambda slot: form.index("{" + slot + "}"))
    names = dict(zip(slots, (named, "it")))  # as they are read
    return form.format(
        **{slot: _clause(a, names[slot], dice, wording) for slot, a in zip(("first", "second"), actions)}
    )


def observations(
    seed: int, count: int, observers: int, *, wrong: float = 0.2, half: float = 0.3
) -> tuple[list[list[str]], np.ndarray]:
    """Of each of `count` clips a sentence by each observer, and labels_N.

    An observer takes one of the two actions for another one in a share `wrong` of clips, and sees only one of
    the two in a share `half`. Two observers err by themselves.
    """
    dice = Random(f"observations {seed}")
    labels = [n % len(PAIRS) for n in range(count)]
    told = []
    for label in labels:
        who, said = _who(dice), []
        for _ in range(observers):
            seen = list(PAIRS[label])
            chance, place = dice.random(), dice.randrange(2)
            if chance < wrong:
                seen[place] = dice.choice([a for a in range(len(ACTIONS)) if a not in seen])
            elif chance < wrong + half:
                seen = [seen[place]]
            said.append(tell(seen, who, dice, wording=(0,)))
        told.append(said)
    return told, np.array(labels)


def documents(seed: int, sentences: int = 16) -> dict[str, str]:
    """A page of prose for each class, one sentence in four of it about something else."""
    dice = Random(f"documents {seed}")
    pages = {}
    for name, pair in zip(CLASSES, PAIRS):
        lines = []
        for n in range(sentences):
            told = tell(pair, _who(dice), dice, wording=(1,), plain=0.5)
            line = dice.choice(_ASIDES) if n % 4 == 3 else dice.choice(_PROSE).format(told=told)
            lines.append(line[0].upper() + line[1:])
        pages[name] = " ".join(lines)
    return pages


def paraphrases(seed: int, scenes: int, most: int = 2) -> tuple[list[str], list[str]]:
    """Texts that say the same, row by row, in runs of four rows about one thing: a, then b; b, then a; a
    alone; b alone. None tells the two actions of a class together, in either order."""
    dice = Random(f"paraphrases {seed}")
    apart = {frozenset(pair) for pair in PAIRS}
    free = [(a, b) for a in range(len(ACTIONS)) for b in range(a) if frozenset((a, b)) not in apart]
    left: list[str] = []
    right: list[str] = []
    for _ in range(scenes):
        a, b = dice.choice(free)
        who = _who(dice)
        for actions in ((a, b), (b, a), (a,), (b,)):
            for side in (left, right):
                texts = [tell(actions, who, dice) for _ in range(dice.randint(1, most))]
                if dice.random() < 0.3:
                    texts = [dice.choice(_PROSE).format(told=texts[0])]
                side.append(" ".join(texts))
    return left, right


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Every word that can be met, numbered from 1."""
    phrases = [f for name in ACTIONS for part in ACTION_WORDS[name] for f, _ in part]
    forms = [form.format(first="", second="", told="") for form in (*_FORMS, *_ONE, *_PROSE, *_ASIDES)]
    texts = [*phrases, *forms, *CLASSES, *COLOURS, *SHAPES, *_PLAIN, "a it"]
    return {word: n for n, word in enumerate(dict.fromkeys(w for text in texts for w in _words(text)), 1)}


def tokens(texts: Sequence[str], length: int = LENGTH) -> np.ndarray:
    """tokens_NL of a word each; the largest number ends a text, and 0 fills it up."""
    return word_tokens(texts, vocabulary(), length, world="The told clips know", words=_words)
