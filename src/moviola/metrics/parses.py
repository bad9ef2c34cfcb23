"""How well sentences are parsed: precision, recall and F1 of entities, attributes and relations, in percent.

A parse is anything with `sentence`, `entities` (each with `name` and `attributes`) and `relations` (each with
`subject`, `verb` and `object`), as `moviola.parts.sentence_parser.Parse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moviola.types import UsageError

__all__ = ["score_parses"]


class _Parser(Protocol):
    def parse(self, sentence: str) -> Any: ...


def _items(parse: Any) -> dict[str, set[tuple[str, ...]]]:
    return {
        "entities": {(e.name.lower(),) for e in parse.entities},
        "attributes": {(e.name.lower(), a.lower()) for e in parse.entities for a in e.attributes},
        "relations": {(r.subject.lower(), r.verb.lower(), (r.object or "").lower()) for r in parse.relations},
    }


def score_parses(parser: _Parser, gold: Sequence[Any]) -> dict[str, float]:
    """`{"entities_f1": ..., "entities_precision": ..., ..., "exact": ...}` over the sentences of `gold`.

    Counts are summed over all sentences before dividing (micro average). An entity is right by its name, an
    attribute by its entity's name and its word, a relation by subject, verb and object, all but for case.
    `exact` is the share of sentences with nothing wrong or missing.
    """
    if not gold:
        raise UsageError("Scoring a parser needs at least one sentence with its true parse.")
    right, found, true = (dict.fromkeys(("entities", "attributes", "relations"), 0) for _ in range(3))
    exact = 0
    for parse in gold:
        ours, theirs = _items(parser.parse(parse.sentence)), _items(parse)
        exact += ours == theirs
        for kind in right:
            right[kind] += len(ours[kind] & theirs[kind])
            found[kind] += len(ours[kind])
            true[kind] += len(theirs[kind])
    figures: dict[str, float] = {}
    for kind in right:
        figures[f"{kind}_precision"] = 100 * right[kind] / max(found[kind], 1)
        figures[f"{kind}_recall"] = 100 * right[kind] / max(true[kind], 1)
        figures[f"{kind}_f1"] = 200 * right[kind] / max(found[kind] + true[kind], 1)
    return figures | {"exact": 100 * exact / len(gold)}
