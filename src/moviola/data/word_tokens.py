"""One token a word, for made worlds whose captions use few words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moviola.types import UsageError


def word_tokens(
    texts: Sequence[str],
    numbers: Mapping[str, int],
    length: int,
    *,
    world: str,
    end: int | None = None,
    words: Callable[[str], list[str]] = str.split,
) -> np.ndarray:
    """tokens_NL int64: each word's number, then `end` (by default one more than there are words), then 0.

    `words` cuts a text; what does not fit into `length` - 1 is left out. A word without a number raises
    `UsageError`, which names the `world`.
    """
    made_NL = np.zeros((len(texts), length), np.int64)
    closing = len(numbers) + 1 if end is None else end
    for row_L, text in zip(made_NL, texts, strict=True):
        found = words(text)[: length - 1]
        unknown = [word for word in found if word not in numbers]
        if unknown:
            raise UsageError(f"{world} no word {unknown[0]!r}, met in {text!r}.")
        row_L[: len(found) + 1] = [*(numbers[word] for word in found), closing]
    return made_NL
