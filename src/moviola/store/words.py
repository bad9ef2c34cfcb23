"""Finding words in file names and subtitles: exact, without an index of its own.

A row answers when it has every word of the query (words in double quotes must stand together).
Case and accents do not matter, and the last word may be the beginning of a longer one. Rows are
ranked by BM25: rare words count more, and a short row that has them more than a long one.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from moviola.types import UsageError

_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75


def words_of(text: str) -> list[str]:
    """Lower-case words without accents: "Été à Paris_2" -> ete, a, paris, 2."""
    plain = unicodedata.normalize("NFKD", text.casefold().replace("_", " "))
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def parse(query: str) -> tuple[list[str], list[list[str]]]:
    """The query's words, and its quoted phrases as lists of words."""
    phrases = [words for words in map(words_of, re.findall(r'"([^"]*)"', query)) if words]
    words = words_of(query)
    if not words:
        raise UsageError(
            f"The words to look for are empty: got {query!r}.", hint='Give at least one word: --text "hello"'
        )
    return words, phrases


def match(query: str, texts: Sequence[str]) -> list[tuple[int, float]]:
    """Positions and scores of the texts that have every word, best first."""
    words, phrases = parse(query)
    rows = [words_of(text) for text in texts]
    whole, beginning = words[:-1], words[-1]
    average = sum(map(len, rows)) / max(1, len(rows)) or 1.0
    hits: list[tuple[int, Counter[str]]] = []
    seen: Counter[str] = Counter()
    for i, row in enumerate(rows):
        counts: Counter[str] = Counter(word for word in row if word in whole)
        counts[beginning] += sum(1 for word in row if word.startswith(beginning) and word not in counts)
        if beginning in whole:
            counts[beginning] = row.count(beginning)
        counts = +counts
        seen.update(counts.keys())
        if all(counts[word] for word in words) and all(_has(row, phrase) for phrase in phrases):
            hits.append((i, counts))
    ranked = []
    for i, counts in hits:
        length = _K1 * (1 - _B + _B * len(rows[i]) / average)
        score = sum(
            math.log1p((len(rows) - seen[word] + 0.5) / (seen[word] + 0.5))
            * counts[word]
            * (_K1 + 1)
            / (counts[word] + length)
            for word in set(words)
        )
        ranked.append((i, score))
    return sorted(ranked, key=lambda hit: (-hit[1], hit[0]))


def _has(row: list[str], phrase: list[str]) -> bool:
    n = len(phrase)
    return any(row[i : i + n] == phrase for i in range(len(row) - n + 1))
