from __future__ import annotations

import numpy as np
import pytest

from moviola.metrics.association import attribute_study, pearson, slope, spearman
from moviola.types import UsageError


def test_known_values():
    assert pearson([1, 2, 3, 4], [8, 6, 4, 2]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 8, 27, 1000]) == pytest.approx(1)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
    assert slope([0, 1, 2], [1, 3, 5]) == pytest.approx(2)
    assert pearson([1, 2], [1, 2]) is spearman([1, 2], [1, 2]) is slope([1, 2], [1, 2]) is None
    assert (
        pearson([1, 1, 1], [1, 2, 3]) is pearson([1, 2, 3], [1, 1, 1]) is slope([1, 1, 1], [1, 2, 3]) is None
    )


def models():
    """Two sources with a trend each, one up and one down: the hidden reversal."""
    rows = []
    for source, sign in (("web", 1), ("curated", -1)):
        for top1 in (40.0, 50.0, 60.0, 70.0):
            rows.append({"source": source, "top1": top1, "auroc": 80 + sign * (top1 - 55) / 5, "size": None})
    return [*rows, {"source": "web", "top1": 50.0}]


def test_numbers_are_correlated_and_words_are_grouped():
    figures = attribute_study(models(), "top1", "auroc")
    assert (figures["n"], figures["left_out"]) == (8, 1)
    assert figures["pearson"] == pytest.approx(0, abs=1e-12)
    groups = attribute_study(models(), "source", "auroc")["groups"]
    assert set(groups) == {"web", "curated"}
    assert groups["web"] == {"n": 4, "mean": pytest.approx(80), "std": pytest.approx(np.std([-3, -1, 1, 3]))}


def test_another_attribute_is_held_fixed():
    within = attribute_study(models(), "top1", "auroc", within="source")["within"]
    assert within["web"]["pearson"] == pytest.approx(1)
    assert within["web"]["slope"] == pytest.approx(0.2)
    assert within["curated"]["spearman"] == pytest.approx(-1)


def test_bad_input():
    with pytest.raises(UsageError, match="No model has all of size, auroc"):
        attribute_study(models(), "size", "auroc")
    with pytest.raises(UsageError, match="two figures"):
        pearson([1, 2, 3], [1, 2])
    with pytest.raises(UsageError, match="NaN"):
        spearman([1, 2, np.nan], [1, 2, 3])
