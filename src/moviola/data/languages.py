"""Captions in several languages as the columns of a table of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moviola.types import UsageError

LANGUAGES = ("en", "pt", "es", "fr", "de", "nl", "it", "zh", "ko", "ru")
"""The ten of RS-M-CLIP: English and what its captions were translated into."""


def language_columns(
    captions: Mapping[str, Sequence[str]], languages: Sequence[str] = LANGUAGES
) -> dict[str, list[str]]:
    """Captions by language code as columns of a table, one text a picture.

    The first of `languages` becomes `caption`, the column that every objective reads; the others
    `caption_pt` and so on. Raises `UsageError` for an unknown code, lists of unequal length, and
    empty captions.
    """
    unknown = sorted(set(captions) - set(languages))
    if unknown or not captions:
        raise UsageError(
            f"Captions come by language code, one of {', '.join(languages)}; got {unknown or 'none'}.",
            hint="Pass languages=(...) to add others.",
        )
    lengths = {code: len(texts) for code, texts in captions.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"Every language needs one caption a picture, got these numbers of them: {lengths}.")
    for code, texts in captions.items():
        empty = [row for row, text in enumerate(texts) if not text.strip()]
        if empty:
            raise UsageError(f"{len(empty)} captions in '{code}' are empty, the first in row {empty[0]}.")
    names = {code: f"caption_{code}" for code in languages} | {languages[0]: "caption"}
    return {names[code]: list(texts) for code, texts in captions.items()}
