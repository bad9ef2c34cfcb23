from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.metrics.calibration import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
    softmax,
)
from moviola.metrics.classification import topk_accuracy
from moviola.types import UsageError


def drawn(count=4000, classes=5, seed=0, scale=2.0):
    """Logits whose softmax is the true chance of each label: calibrated by construction."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((count, classes))
    noise = -np.log(-np.log(rng.random(logits.shape)))
    return logits, (logits + noise).argmax(1)


def test_known_calibration_error():
    """Eight of ten right at a confidence of 0.9, five of ten at 0.6: gaps of 10 and 10 points."""
    probability = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = [0] * 8 + [1] * 2 + [1] * 5 + [0] * 5
    assert expected_calibration_error(probability, labels) == pytest.approx(10)
    found = reliability(probability, labels, bins=10)
    assert found.count.tolist() == [0] * 5 + [10, 0, 0, 10, 0]
    assert found.accuracy[[5, 8]] == pytest.approx([50, 80])
    assert found.confidence[[5, 8]] == pytest.approx([60, 90])
    assert np.isnan(found.accuracy[0])
    assert found.edges.tolist() == pytest.approx(range(0, 101, 10))


def test_always_sure_is_as_wrong_as_its_accuracy_is_low():
    sure = np.eye(4)[np.zeros(200, int)]
    labels = np.arange(200) % 4
    assert expected_calibration_error(sure, labels) == pytest.approx(75)
    assert expected_calibration_error(np.full((200, 4), 0.25), labels) == pytest.approx(0)


def test_edges_belong_to_the_bin_below():
    """Halves and quarters are exact in binary, so that they lie on the edges themselves."""
    confidence = np.array([0.5, 0.5 + 1e-9, 0.75, 1.0])
    found = reliability(np.stack([confidence, 1 - confidence], 1), [0, 0, 0, 0], bins=4)
    assert found.count.tolist() == [0, 1, 2, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 6))
def test_is_the_plain_loop_over_bins(seed, bins, classes):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 8, (50, classes)).astype(float)  # few values: many equal confidences
    probability, labels = weights / weights.sum(1, keepdims=True), rng.integers(classes, size=50)
    confidence, right = probability.max(1), probability.argmax(1) == labels
    edges, error, counted = np.linspace(0, 1, bins + 1), 0.0, 0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        counted += inside.sum()
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert counted == 50
    assert expected_calibration_error(probability, labels, bins=bins) == pytest.approx(100 * error, abs=1e-9)


def test_softmax_and_likelihood():
    assert softmax([[0.0, math.log(3)]]) == pytest.approx(np.array([[0.25, 0.75]]))
    assert softmax([[0.0, 2 * math.log(3)]], temperature=2) == pytest.approx(np.array([[0.25, 0.75]]))
    assert negative_log_likelihood([[0.0, math.log(3)]], [0]) == pytest.approx(math.log(4))
    assert negative_log_likelihood(np.zeros((5, 7)), [0] * 5) == pytest.approx(math.log(7))
    assert negative_log_likelihood([[1e4, -1e4]], [1]) == pytest.approx(2e4)  # nothing overflows
    assert softmax(np.float16([[6e4, 0]])) == pytest.approx(np.array([[1, 0]]))


# --------------------------------------------------------------------------------------------------
# Temperature
# --------------------------------------------------------------------------------------------------


def test_recovers_the_inflation_whatever_its_size():
    logits, labels = drawn()
    own = fit_temperature(logits, labels)
    assert own == pytest.approx(1, abs=0.06)
    for factor in (1e-4, 0.01, 3, 100, 1e5):
        assert fit_temperature(factor * logits, labels) == pytest.approx(factor * own, rel=1e-9)
    shifted = logits + np.random.default_rng(1).standard_normal((len(logits), 1))
    assert fit_temperature(shifted, labels) == pytest.approx(own, rel=1e-9)


def test_repairs_the_calibration_of_inflated_logits_and_leaves_the_accuracy():
    logits, labels = drawn()
    inflated = 8 * logits
    temperature = fit_temperature(inflated[:2000], labels[:2000])
    rest, of_rest = inflated[2000:], labels[2000:]
    before, after = softmax(rest), softmax(rest, temperature)
    assert expected_calibration_error(before, of_rest) > 20
    assert expected_calibration_error(after, of_rest) < 4
    assert topk_accuracy(before, of_rest) == topk_accuracy(after, of_rest)
    losses = [negative_log_likelihood(rest, of_rest, temperature=t) for t in (1.0, temperature)]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("seed", range(5))
def test_no_other_temperature_is_better(seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((60, 4)) + 0.8 * np.eye(4)[np.arange(60) % 4], np.arange(60) % 4
    best = fit_temperature(logits, labels)
    least = negative_log_likelihood(logits, labels, temperature=best)
    others = [negative_log_likelihood(logits, labels, temperature=best * f) for f in np.geomspace(0.01, 100)]
    assert least <= min(others)


def test_without_an_optimum_the_end_of_the_range_is_returned_with_a_warning():
    right = np.eye(3)[np.arange(30) % 3]
    with pytest.warns(UserWarning, match="every item is right"):
        assert fit_temperature(right, np.arange(30) % 3) < 1e-3
    with pytest.warns(UserWarning, match="no more than chance"):
        assert fit_temperature(-right, np.arange(30) % 3) > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_temperature(np.full((4, 3), 2.5), [0, 1, 2, 0]) == 1


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [negative_log_likelihood, fit_temperature, expected_calibration_error])
def test_bad_scores_and_labels(measure):
    good = np.array([[0.75, 0.25], [0.5, 0.5]])
    with pytest.raises(UsageError, match="NaN or infinite"):
        measure([[np.nan, 0], [0.5, 0.5]], [0, 1])
    with pytest.raises(UsageError, match="items, classes"):
        measure([0.5, 0.5], [0, 1])
    with pytest.raises(UsageError, match="items, classes"):
        measure(np.zeros((0, 2)), [])
    with pytest.raises(UsageError, match="one label for each"):
        measure(good, [0])
    with pytest.raises(UsageError, match=r"in 0\.\.1"):
        measure(good, [0, 2])  # the scores of fewer classes than the labels count
    with pytest.raises(UsageError, match="class numbers"):
        measure(good, [0.0, 1.0])


def test_bad_probabilities_bins_and_temperatures():
    with pytest.raises(UsageError, match="add up to 1"):
        expected_calibration_error([[3.0, -1.0]], [0])
    with pytest.raises(UsageError, match="add up to 1"):
        expected_calibration_error([[0.5, 0.1]], [0])
    with pytest.raises(UsageError, match="one bin"):
        expected_calibration_error([[0.5, 0.5]], [0], bins=0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="temperature is positive"):
            softmax([[0.0, 1.0]], temperature)
