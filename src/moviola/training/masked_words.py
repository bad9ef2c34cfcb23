"""Class texts with some of their words hidden, and which words these were (masked language modelling).

A word is a run of tokens up to one that ends it. The words of all class texts are the vocabulary, so a hidden
word is one of few; its number stands where the text now says `mask`. Draws are torch's global ones.

Axis letters: B rows, m rows with a hidden word, C classes, L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moviola.types import UsageError

IGNORED = -100
"""The target of a token that hides no word, as `cross_entropy` knows it."""
Word = tuple[int, ...]


@dataclass(slots=True)
class HiddenWords:
    """The rows of a batch that hide a word: their numbers, texts and the word at each token or `IGNORED`."""

    rows_m: Tensor
    tokens_mL: Tensor
    word_mL: Tensor


class MaskedWords:
    """Hides `rate` of the words of a class text, one or more.

    tokens_CL, ends_C  the texts and where their end-of-text tokens are. A first token that all share is the
                       start-of-text token, and no word
    mask               what is written for a hidden word
    word_ends          the ids that end a word; None: every id is a word
    vocabulary         the words with a number, in order; None: those of the texts

    Raises `UsageError` for a text without words, with one that the vocabulary lacks, or that would outgrow
    its L tokens where `mask` is longer than a word.
    """

    def __init__(
        self,
        tokens_CL: Tensor,
        ends_C: Tensor,
        *,
        mask: Sequence[int],
        word_ends: Collection[int] | None = None,
        vocabulary: Sequence[Sequence[int]] | None = None,
        rate: float = 0.2,
    ) -> None:
        if not mask or not 0 < rate <= 1:
            raise UsageError(f"A mask is a token or more and the rate lies in (0, 1], got {mask}, {rate}.")
        rows = [row[: end + 1] for row, end in zip(tokens_CL.tolist(), ends_C.tolist(), strict=True)]
        shared = len({row[0] for row in rows}) == 1
        self.mask, self.rate = list(mask), rate
        self.start, self.end = rows[0][:1] if shared else [], rows[0][-1]
        self.words_C = [_words(row[len(self.start) : -1], word_ends) for row in rows]
        if not all(self.words_C):
            raise UsageError(f"The text of class {self.words_C.index([])} has no word to hide.")
        spelled = {word for words in self.words_C for word in words}
        kept = sorted(spelled) if vocabulary is None else [tuple(word) for word in vocabulary]
        self.number = {word: n for n, word in enumerate(kept)}
        if lacking := sorted(spelled - self.number.keys()):
            raise UsageError(
                f"{len(lacking)} words of the class texts are not in the vocabulary of {len(self.number)}; "
                f"the tokens of the first: {list(lacking[0])}.",
                hint="Leave the vocabulary out: it is then made from the class texts.",
            )
        for number, (row, words) in enumerate(zip(rows, self.words_C, strict=True)):
            grown = sorted((len(self.mask) - len(word) for word in words), reverse=True)
            if len(row) + sum(grown[: self.hidden(words)]) > tokens_CL.shape[1]:
                raise UsageError(
                    f"The text of class {number} has no room for a mask of {len(self.mask)} tokens: "
                    f"it fills {len(row)} of {tokens_CL.shape[1]}.",
                    hint="Shorten the class name or the template.",
                )

    def __len__(self) -> int:
        """Words of the vocabulary."""
        return len(self.number)

    def hidden(self, words: Sequence[Word]) -> int:
        """How many of these are hidden at a time."""
        return max(1, round(len(words) * self.rate))

    def text(self, label: int, hidden: Collection[int]) -> tuple[list[int], list[int]]:
        """The text of a class with the words at these places hidden, and the target at each token."""
        ids, targets = [*self.start], [IGNORED] * len(self.start)
        for place, word in enumerate(self.words_C[label]):
            shown = self.mask if place in hidden else word
            ids += shown
            targets += [self.number[word] if place in hidden else IGNORED] + [IGNORED] * (len(shown) - 1)
        return [*ids, self.end], [*targets, IGNORED]

    def draw(self, label_B: Tensor, chance: float) -> HiddenWords:
        """Each row's text hides words with this chance; as many tokens as the longest of them has."""
        rows = torch.nonzero(torch.rand(len(label_B)) < chance)[:, 0].tolist()
        made = []
        for label in label_B[rows].tolist():
            words = self.words_C[label]
            made.append(self.text(label, torch.randperm(len(words))[: self.hidden(words)].tolist()))
        longest = max((len(ids) for ids, _ in made), default=1)
        ids_mL = torch.zeros(len(made), longest, dtype=torch.int64)
        word_mL = torch.full_like(ids_mL, IGNORED)
        for row, (ids, targets) in enumerate(made):
            ids_mL[row, : len(ids)] = torch.tensor(ids)
            word_mL[row, : len(ids)] = torch.tensor(targets)
        place = label_B.device
        return HiddenWords(torch.tensor(rows, device=place).long(), ids_mL.to(place), word_mL.to(place))


def _words(ids: Sequence[int], word_ends: Collection[int] | None) -> list[Word]:
    words: list[Word] = []
    begun: list[int] = []
    for number in ids:
        begun.append(number)
        if word_ends is None or number in word_ends:
            words.append(tuple(begun))
            begun = []
    return [*words, tuple(begun)] if begun else words
