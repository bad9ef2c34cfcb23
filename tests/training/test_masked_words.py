from __future__ import annotations

import pytest
import torch

from moviola.training.masked_words import IGNORED, MaskedWords
from moviola.types import UsageError

# 1 start, 2 end; 10 to 19 end a word, 20 to 29 do not
TEXTS = torch.tensor([[1, 20, 10, 11, 2, 0, 0, 0], [1, 11, 12, 20, 21, 13, 2, 0], [1, 14, 2, 0, 0, 0, 0, 0]])
ENDS = torch.tensor([4, 6, 2])
WORD_ENDS = set(range(10, 20))


def made(**options):
    return MaskedWords(TEXTS, ENDS, **{"mask": (9,), "word_ends": WORD_ENDS, **options})


def test_words_are_runs_of_tokens():
    words = made()
    assert words.words_C == [[(20, 10), (11,)], [(11,), (12,), (20, 21, 13)], [(14,)]]
    assert list(words.number) == [(11,), (12,), (14,), (20, 10), (20, 21, 13)]
    assert len(words) == 5
    tokens = MaskedWords(TEXTS, ENDS, mask=(9,))
    assert tokens.words_C[0] == [(20,), (10,), (11,)]


def test_a_text_without_a_start_token_keeps_its_first_word():
    words = MaskedWords(torch.tensor([[5, 6, 2], [7, 6, 2]]), torch.tensor([2, 2]), mask=(9,))
    assert words.words_C == [[(5,), (6,)], [(7,), (6,)]]


def test_a_hidden_word_is_named_where_the_mask_stands():
    words = made()
    assert words.text(0, [0]) == ([1, 9, 11, 2], [IGNORED, 3, IGNORED, IGNORED])
    assert words.text(1, [1, 2]) == ([1, 11, 9, 9, 2], [IGNORED, IGNORED, 1, 4, IGNORED])
    long = made(mask=(8, 9))
    assert long.text(0, [1]) == ([1, 20, 10, 8, 9, 2], [IGNORED] * 3 + [0, IGNORED, IGNORED])
    assert words.text(2, []) == ([1, 14, 2], [IGNORED] * 3)


@pytest.mark.parametrize(("rate", "counts"), [(0.2, [1, 1, 1]), (0.7, [1, 2, 1]), (1.0, [2, 3, 1])])
def test_a_fifth_of_the_words_but_one_at_least(rate, counts):
    words = made(rate=rate)
    torch.manual_seed(0)
    hidden = words.draw(torch.tensor([0, 1, 2]), 1)
    assert (hidden.word_mL != IGNORED).sum(1).tolist() == counts
    assert hidden.rows_m.tolist() == [0, 1, 2]
    assert hidden.tokens_mL.shape == hidden.word_mL.shape
    assert hidden.tokens_mL.dtype == torch.int64


def test_rows_are_drawn_by_chance():
    words, labels = made(), torch.zeros(4000, dtype=torch.int64)
    torch.manual_seed(0)
    assert len(words.draw(labels, 0).rows_m) == 0
    assert words.draw(labels, 0).tokens_mL.shape == (0, 1)
    assert len(words.draw(labels, 1).rows_m) == 4000
    assert abs(len(words.draw(labels, 0.3).rows_m) / 4000 - 0.3) < 0.03
    places = (words.draw(labels, 1).word_mL != IGNORED).float().mean(0)  # both words equally often
    assert places.tolist() == pytest.approx([0, 0.5, 0, 0.5, 0], abs=0.03)


def test_equal_states_draw_equally():
    words, labels = made(), torch.tensor([0, 1, 2, 1, 0])
    torch.manual_seed(4)
    first = words.draw(labels, 0.5)
    torch.manual_seed(4)
    again = words.draw(labels, 0.5)
    assert torch.equal(first.tokens_mL, again.tokens_mL)
    assert torch.equal(first.word_mL, again.word_mL)


def test_what_cannot_be_hidden_is_refused():
    with pytest.raises(UsageError, match="1 words of the class texts are not in the vocabulary of 4"):
        made(vocabulary=[(11,), (12,), (14,), (20, 10)])
    with pytest.raises(UsageError, match="class 1 has no word"):
        MaskedWords(torch.tensor([[1, 5, 2], [1, 2, 0]]), torch.tensor([2, 1]), mask=(9,))
    with pytest.raises(UsageError, match="class 0 has no room for a mask of 3 tokens: it fills 4 of 4"):
        MaskedWords(torch.tensor([[1, 5, 6, 2]] * 2), torch.tensor([3, 3]), mask=(7, 8, 9))
    for wrong in ({"mask": ()}, {"rate": 0}, {"rate": 1.5}):
        with pytest.raises(UsageError, match="rate lies in"):
            made(**wrong)


def test_a_given_vocabulary_keeps_its_numbers():
    words = made(vocabulary=[(14,), (99,), (20, 21, 13), (11,), (12,), (20, 10)])
    assert len(words) == 6
    assert words.text(2, [0])[1] == [IGNORED, 0, IGNORED]
