"""Words in file names and subtitles."""

from __future__ import annotations

import pytest

from moviola.store.words import match, words_of
from moviola.types import UsageError

TEXTS = [
    "Hello, World!",
    "the world of dogs",
    "DOG_park-2.mp4",
    "\u00c9t\u00e9 \u00e0 Paris",
    "hello hello there",
    "",
]


def hits(query: str) -> list[int]:
    return [at for at, _ in match(query, TEXTS)]


def test_every_word_must_be_there_whatever_the_case_and_accents() -> None:
    assert hits("hello world") == [0]
    assert hits("WORLD") == [0, 1]
    assert hits("ete a paris") == [3]
    assert hits("nothing") == []
    assert words_of("\u00c9t\u00e9_2") == ["ete", "2"]


def test_the_last_word_may_be_a_beginning_but_not_the_others() -> None:
    assert sorted(hits("dog")) == [1, 2]
    assert hits("hel wor") == []
    assert hits("hello wor") == [0]


def test_phrases_stand_together() -> None:
    assert hits('"hello world"') == [0]
    assert hits('"world hello"') == []


def test_rare_and_repeated_words_rank_higher() -> None:
    assert hits("hello")[0] == 4
    scores = [score for _, score in match("hello", TEXTS)]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) > 0


def test_no_word_at_all_is_an_error() -> None:
    with pytest.raises(UsageError, match="empty"):
        match(' "" !', TEXTS)
