from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.metrics.detection import auroc, fpr_at_tpr
from moviola.types import UsageError

scores = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(inside, outside):
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(100 * np.mean(pairs))
    assert auroc(outside, inside) == pytest.approx(100 - auroc(inside, outside))


@settings(max_examples=60, deadline=None)
@given(scores, scores, st.sampled_from([5.0, 50.0, 80.0, 95.0, 100.0]))
def test_fpr_is_the_least_over_all_thresholds(inside, outside, tpr):
    inside_N, outside_M = np.array(inside), np.array(outside)
    passing = [t for t in inside if (inside_N >= t).mean() * 100 >= tpr]
    wanted = min((outside_M >= t).mean() for t in passing)
    assert fpr_at_tpr(inside, outside, tpr) == pytest.approx(100 * wanted)


def test_known_values():
    """Of twenty inside nineteen must pass: the threshold is the second lowest, 1.0."""
    inside = np.arange(20.0)
    assert fpr_at_tpr(inside, [0.0, 0.5, 1.0, 7.5]) == 50
    assert fpr_at_tpr(inside, [0.0, 0.5, 1.0, 7.5], tpr=100) == 100
    assert auroc([1, 1], [1, 1, 1]) == 50
    assert fpr_at_tpr([1, 1], [1, 1, 1]) == 100
    assert auroc([3, 4], [1, 2]) == 100
    assert fpr_at_tpr([3, 4], [1, 2]) == 0
    assert auroc([np.inf, 0], [-np.inf]) == 100


def test_only_the_order_counts():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 500), rng.normal(0, 1, 300)
    for change in (np.exp, lambda x: 3 * x - 7):
        assert auroc(change(inside), change(outside)) == auroc(inside, outside)
        assert fpr_at_tpr(change(inside), change(outside)) == fpr_at_tpr(inside, outside)


def test_a_million_scores_take_no_matrix():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 500_000), rng.normal(0, 1, 500_000)
    assert auroc(inside, outside) == pytest.approx(76.02, abs=0.2)  # the normal law at 1 / sqrt(2)


@pytest.mark.parametrize("measure", [auroc, fpr_at_tpr])
def test_bad_input(measure):
    with pytest.raises(UsageError, match="no items outside"):
        measure([1.0], [])
    with pytest.raises(UsageError, match="no items inside"):
        measure([], [1.0])
    with pytest.raises(UsageError, match="1 of 2 scores outside are NaN"):
        measure([1.0], [np.nan, 0])
    with pytest.raises(UsageError, match="one score an item"):
        measure([[1.0, 0.0]], [1.0])


@pytest.mark.parametrize("tpr", [0, -1, 101])
def test_bad_tpr(tpr):
    with pytest.raises(UsageError, match="tpr"):
        fpr_at_tpr([1.0], [0.0], tpr)
