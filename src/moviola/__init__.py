"""Moviola: find moments in your own videos with words, and do the work around CLIP-like models.

>>> import moviola
>>> results = moviola.search("holiday.index", "a dog on a beach")      # doctest: +SKIP

Importing this package is cheap: torch and the other heavy packages load with the first call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moviola.types import Clip, Hit, Moment, MoviolaError, TimeSpan

__version__ = "0.1.0"

# Name -> module that holds it; each is imported when first asked for.
_LAZY = {
    "adapt": "moviola.verbs.adapt",
    "adapt_tasks": "moviola.verbs.adapt_tasks",
    "audit": "moviola.verbs.audit",
    "load": "moviola.verbs.load",
    "info": "moviola.verbs.load",
    "export": "moviola.verbs.load",
    "embed": "moviola.verbs.embed",
    "classify": "moviola.verbs.classify",
    "classify_through_sentences": "moviola.verbs.through_sentences",
    "evaluate_through_sentences": "moviola.verbs.through_sentences_measure",
    "evaluate_zero_shot": "moviola.verbs.evaluate",
    "clean_clips": "moviola.verbs.clean_clips",
    "compare": "moviola.verbs.compare",
    "evaluate_retrieval": "moviola.verbs.evaluate",
    "curate": "moviola.verbs.curate",
    "count_pool": "moviola.verbs.curate",
    "index": "moviola.verbs.index",
    "search": "moviola.verbs.search",
    "match": "moviola.verbs.match",
    "evaluate_pairs": "moviola.verbs.match_pairs",
    "recognise": "moviola.verbs.recognise",
    "reinforce": "moviola.verbs.reinforce",
    "reproduce": "moviola.verbs.reproduce",
    "train": "moviola.verbs.train",
    "TrainRun": "moviola.verbs.train_run",
    "Video": "moviola.media",
}

__all__ = [
    "Clip",
    "Hit",
    "Moment",
    "MoviolaError",
    "TimeSpan",
    "TrainRun",
    "Video",
    "__version__",
    "adapt",
    "adapt_tasks",
    "audit",
    "classify",
    "classify_through_sentences",
    "clean_clips",
    "compare",
    "count_pool",
    "curate",
    "embed",
    "evaluate_pairs",
    "evaluate_retrieval",
    "evaluate_through_sentences",
    "evaluate_zero_shot",
    "export",
    "index",
    "info",
    "load",
    "match",
    "recognise",
    "reinforce",
    "reproduce",
    "search",
    "train",
]

if TYPE_CHECKING:
    from moviola.media import Video
    from moviola.verbs.adapt import adapt
    from moviola.verbs.adapt_tasks import adapt_tasks
    from moviola.verbs.audit import audit
    from moviola.verbs.classify import classify
    from moviola.verbs.clean_clips import clean_clips
    from moviola.verbs.compare import compare
    from moviola.verbs.curate import count_pool, curate
    from moviola.verbs.embed import embed
    from moviola.verbs.evaluate import evaluate_retrieval, evaluate_zero_shot
    from moviola.verbs.index import index
    from moviola.verbs.load import export, info, load
    from moviola.verbs.match import match
    from moviola.verbs.match_pairs import evaluate_pairs
    from moviola.verbs.recognise import recognise
    from moviola.verbs.reinforce import reinforce
    from moviola.verbs.reproduce import reproduce
    from moviola.verbs.search import search
    from moviola.verbs.through_sentences import classify_through_sentences
    from moviola.verbs.through_sentences_measure import evaluate_through_sentences
    from moviola.verbs.train import train
    from moviola.verbs.train_run import TrainRun


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moviola' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
