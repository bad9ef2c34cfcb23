"""One token a word."""

from __future__ import annotations

import pytest

from moviola.data.word_tokens import word_tokens
from moviola.types import UsageError

NUMBERS = {"a": 1, "red": 2, "circle": 3}


def test_words_then_the_end_then_zeros():
    made = word_tokens(["a red circle", "red"], NUMBERS, 5, world="Here is")
    assert made.tolist() == [[1, 2, 3, 4, 0], [2, 4, 0, 0, 0]]
    assert word_tokens(["a red circle"], NUMBERS, 3, world="Here is", end=9).tolist() == [[1, 2, 9]]
    assert word_tokens(["a,red"], NUMBERS, 3, world="", words=lambda t: t.split(",")).tolist() == [[1, 2, 4]]


def test_an_unknown_word_is_named():
    with pytest.raises(UsageError, match=r"Here is no word 'blue', met in 'a blue circle'"):
        word_tokens(["a blue circle"], NUMBERS, 5, world="Here is")
