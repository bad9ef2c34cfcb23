from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moviola.metrics.classification import (
    class_ranks,
    confusion,
    mean_class_accuracy,
    per_class_accuracy,
    topk_accuracy,
)
from moviola.types import UsageError


@given(seed=st.integers(0, 10**6), classes=st.integers(2, 9))
def test_perfect_scores_give_100(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 30)
    scores = rng.uniform(0, 1, (30, classes)) + 2 * np.eye(classes)[labels]
    assert topk_accuracy(scores, labels, ks=(1, 2)) == {"top1": 100.0, "top2": 100.0}
    assert mean_class_accuracy(scores, labels) == 100.0
    assert confusion(scores, labels).tolist() == np.diag(np.bincount(labels, minlength=classes)).tolist()


@given(seed=st.integers(0, 10**6), k=st.integers(1, 5))
def test_topk_equals_the_definition_without_ties(seed, k):
    rng = np.random.default_rng(seed)
    scores, labels = rng.permuted(np.tile(np.arange(5.0), (20, 1)), axis=1), rng.integers(0, 5, 20)
    right = [label in np.argsort(-row)[:k] for row, label in zip(scores, labels, strict=True)]
    assert topk_accuracy(scores, labels, ks=(k,))[f"top{k}"] == pytest.approx(100 * np.mean(right))


def test_rare_classes_weigh_the_same_and_absent_ones_do_not_count():
    labels = np.array([0] * 9 + [1])
    scores = np.tile([1.0, 0.0, -1.0], (10, 1))
    assert topk_accuracy(scores, labels, ks=(1,)) == {"top1": 90.0}
    assert mean_class_accuracy(scores, labels) == 50.0
    np.testing.assert_equal(per_class_accuracy(scores, labels), [100.0, 0.0, np.nan])
    assert confusion(scores, labels).tolist() == [[9, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_constant_scores_are_never_right():
    assert topk_accuracy(np.zeros((6, 6)), np.arange(6), ks=(1, 5)) == {"top1": 0.0, "top5": 0.0}
    assert class_ranks(np.zeros((1, 6)), [3]).tolist() == [6]


@pytest.mark.parametrize(
    ("scores", "labels", "said"),
    [
        (np.eye(3), [0, 1], "one label per item"),
        (np.eye(3), [0, 1, 3], r"0\.\.2"),
        (np.eye(3), [0.0, 1.0, 2.0], "class numbers"),
        (np.full((2, 3), np.nan), [0, 1], "NaN"),
    ],
)
def test_bad_input(scores, labels, said):
    with pytest.raises(UsageError, match=said):
        topk_accuracy(scores, labels)
    with pytest.raises(UsageError, match="k of 1"):
        topk_accuracy(np.eye(2), [0, 1], ks=(0,))
