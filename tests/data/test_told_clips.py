"""The told clips: observers, documents and paraphrases say what they must, and nothing more."""

from __future__ import annotations

import re

import numpy as np

from moviola.data import told_clips
from moviola.systems.video.zsarcap import document_sentences


def test_observers_and_documents():
    said, label_N = told_clips.observations(0, 240, 3)
    assert np.bincount(label_N).tolist() == [20] * 12
    clear, _ = told_clips.observations(0, 240, 1, wrong=0, half=0)
    bounce = re.compile("bounc|jump")
    for (sentence,), label in zip(clear, label_N):
        assert bool(bounce.search(sentence)) == (0 in told_clips.PAIRS[label])
    assert [len(some) for some in said] == [3] * 240
    documents = told_clips.documents(0)
    assert list(documents) == list(told_clips.CLASSES)
    assert all(len(document_sentences(text)) >= 10 for text in documents.values())


def test_no_paraphrase_tells_a_class():
    """None has the two actions of a class, in either order; every word has a number."""
    left, right = told_clips.paraphrases(0, 60)
    stems = ["bounc|jump", "blink|flash|comes and goes", "shak|side to side", "grow|bigger|larger"]
    assert len(left) == len(right) == 240
    for text in (*left, *right):
        for a, b in told_clips.PAIRS:
            if max(a, b) < len(stems):
                assert not (re.search(stems[a], text) and re.search(stems[b], text)), text
    assert told_clips.tokens([*left, *right]).shape == (480, told_clips.LENGTH)


def test_the_same_seed_tells_the_same():
    assert told_clips.documents(3) == told_clips.documents(3) != told_clips.documents(4)
    first, again = (told_clips.observations(3, 12, 2) for _ in range(2))
    assert first[0] == again[0]
    assert told_clips.paraphrases(3, 2) == told_clips.paraphrases(3, 2)
