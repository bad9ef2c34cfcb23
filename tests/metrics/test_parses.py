from __future__ import annotations

from dataclasses import dataclass

import pytest

from moviola.metrics.parses import score_parses
from moviola.parts.sentence_parser import Entity, Parse, Relation
from moviola.types import UsageError

FIRST = Parse(
    "a tall man rides a horse",
    (Entity("man", ("tall",)), Entity("horse")),
    (Relation("man", "rides", "horse"),),
)
SECOND = Parse("a dog", (Entity("dog"),))


@dataclass
class Fixed:
    parses: tuple[Parse, ...]

    def parse(self, sentence):
        return next(p for p in self.parses if p.sentence == sentence)


def test_the_truth_scores_100():
    assert set(score_parses(Fixed((FIRST, SECOND)), [FIRST, SECOND]).values()) == {100.0}


def test_figures_by_hand():
    wrong = Parse(FIRST.sentence, (Entity("Man", ("tall", "old")),), (Relation("Man", "rides"),))
    figures = score_parses(Fixed((wrong, SECOND)), [FIRST, SECOND])
    assert figures["entities_precision"] == 100
    assert figures["entities_recall"] == pytest.approx(200 / 3)
    assert figures["entities_f1"] == pytest.approx(80)
    assert figures["attributes_precision"] == 50
    assert figures["attributes_recall"] == 100
    assert figures["relations_f1"] == 0
    assert figures["exact"] == 50


def test_nothing_found_is_zero():
    empty = Parse(FIRST.sentence)
    figures = score_parses(Fixed((empty,)), [FIRST])
    assert set(figures.values()) == {0.0}


def test_no_sentences():
    with pytest.raises(UsageError, match="at least one"):
        score_parses(Fixed(()), [])
