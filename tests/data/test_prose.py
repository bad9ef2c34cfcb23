"""Sentences and contractions of English prose."""

from __future__ import annotations

import pytest

from moviola.data.prose import expand_contractions, split_sentences


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "stop." Then he went.', ['He said "stop."', "Then he went."]),
        ("Dr. Low and J. Smith ride, e.g. on horses.", ["Dr. Low and J. Smith ride, e.g. on horses."]),
        ("Bows, arrows, etc. are used. Balls etc. They fly.", 3),
        ("See Fig. 3 here. Say no. It is No. 5.", 3),
        ("At 5 p.m. it began. It ended at 6 p.m. Then we left.", 3),
        ("He waits... then he runs. It is 3.5 m long.", ["He waits... then he runs.", "It is 3.5 m long."]),
        ("take vitamin a. then run.", ["take vitamin a.", "then run."]),
        ("", []),
        ("  \n ", []),
    ],
)
def test_sentences(text, wanted):
    found = split_sentences(text)
    assert (len(found) if isinstance(wanted, int) else found) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I don't, can't and won't.", "I do not, cannot and will not."),
        ("It\u2019s his; she's here, they're there.", "It is his; she is here, they are there."),
        ("the horse's legs, the boys' ball", "the horse's legs, the boys' ball"),
        ("Let's go: we've won, you'll see, I'd bet, I'm sure.",
         "Let us go: we have won, you will see, I would bet, I am sure."),
        ("Shouldn't he?", "Should not he?"),
    ],
)  # fmt: skip
def test_contractions(text, wanted):
    assert expand_contractions(text) == wanted
