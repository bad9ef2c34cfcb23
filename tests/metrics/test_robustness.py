from __future__ import annotations

import math

import numpy as np
import pytest

from moviola.metrics.robustness import (
    EffectiveRobustness,
    corruption_table,
    effective_robustness,
    group_probability,
    probit,
    relative_drop,
    shape_bias,
)
from moviola.types import UsageError

# --------------------------------------------------------------------------------------------------
# Effective robustness
# --------------------------------------------------------------------------------------------------


def test_probit():
    assert probit(50, 100) == 0
    assert probit(97.5, 1000) == pytest.approx(1.959963984540054)
    assert probit(2.5, 1000) == pytest.approx(-1.959963984540054)
    assert probit(0, 50) == probit(1, 50)  # half of one in fifty
    assert probit(100, 50) == -probit(0, 50)
    assert probit(0, 5000) < probit(0, 50) < probit(2, 50)


def baselines(seed=0, count=20):
    rng = np.random.default_rng(seed)
    x = rng.uniform(40, 80, count)
    return x, np.clip(0.9 * x - 12 + rng.normal(0, 3, count), 1, 99)


def test_baselines_are_on_average_as_robust_as_expected():
    x, y = baselines()
    line = EffectiveRobustness.fit(x, y, 1000)
    assert sum(line.residual(a, b, 1000) for a, b in zip(x, y, strict=True)) == pytest.approx(0, abs=1e-12)
    assert np.mean([line(a, b, 1000) for a, b in zip(x, y, strict=True)]) == pytest.approx(0, abs=0.2)


def test_a_raised_accuracy_is_read_as_it_was_raised():
    x, y = baselines()
    line = EffectiveRobustness.fit(x, y, 1000)
    assert effective_robustness(x, y, 60, line.expected(60, 1000) + 7, 1000) == pytest.approx(7)
    assert line.residual(60, line.expected(60, 1000), 1000) == pytest.approx(0, abs=1e-12)
    assert effective_robustness(x, y, 60, line.expected(60, 1000) - 7, 1000) == pytest.approx(-7)


def test_the_line_is_found_in_probits():
    x = np.array([20.0, 40, 60, 80, 90])
    phi = EffectiveRobustness(0.7, -0.4)
    line = EffectiveRobustness.fit(x, [phi.expected(value, 10_000) for value in x], 10_000)
    assert (line.slope, line.intercept) == pytest.approx((0.7, -0.4))


def test_accuracies_of_nothing_and_all_are_moved_in_by_half_an_item():
    line = EffectiveRobustness.fit([0, 50, 100], [0, 50, 100], n=200, n_y=20)
    assert math.isfinite(line.slope)
    assert line.slope == pytest.approx(probit(0, 20) / probit(0, 200))
    assert EffectiveRobustness.fit([1, 50, 99], [2, 50, 98]).expected(0, 50) > 0


def test_too_few_or_equal_baselines():
    with pytest.raises(UsageError, match="3 baselines or more"):
        effective_robustness([50, 60], [40, 50], 55, 45, 100)
    with pytest.raises(UsageError, match="3 baselines or more"):
        EffectiveRobustness.fit([50, 60, 70], [40, 50])
    with pytest.raises(UsageError, match="same accuracy"):
        EffectiveRobustness.fit([50, 50, 50], [40, 45, 50])
    for percent, n in ((-1, 10), (101, 10), (50, 0), (math.nan, 10)):
        with pytest.raises(UsageError, match="accuracy from 0 to 100"):
            probit(percent, n)


# --------------------------------------------------------------------------------------------------
# Shape bias
# --------------------------------------------------------------------------------------------------


def cues(seed=0, count=4000, classes=16):
    rng = np.random.default_rng(seed)
    shape = rng.integers(classes, size=count)
    return shape, (shape + rng.integers(1, classes, count)) % classes


def test_made_classifiers():
    shape, texture = cues()
    assert shape_bias(shape, shape, texture).bias == 100
    assert shape_bias(texture, shape, texture).bias == 0
    coin = np.where(np.random.default_rng(1).random(len(shape)) < 0.5, shape, texture)
    assert shape_bias(coin, shape, texture).bias == pytest.approx(50, abs=3)


def test_neither_and_agreeing_pictures_do_not_count():
    shape, texture = cues(count=300)
    said = np.where(np.arange(300) % 3 > 0, shape, texture)
    plain = shape_bias(said, shape, texture)
    assert (plain.shape, plain.texture, plain.neither, plain.used) == (200, 100, 0, 300)
    assert plain.bias == pytest.approx(200 / 3)
    more = [np.append(a, b) for a, b in ((said, [-1] * 50 + [3] * 9), (shape, [0] * 50 + [3] * 9))]
    wider = shape_bias(*more, np.append(texture, [1] * 50 + [3] * 9))
    assert wider.bias == plain.bias
    assert (wider.neither, wider.used) == (50, 350)
    assert math.isnan(shape_bias([9, 9], [0, 1], [1, 0]).bias)
    assert shape_bias(["cat", "dog"], ["cat", "cat"], ["dog", "dog"]).bias == 50


def test_bad_cues():
    with pytest.raises(UsageError, match="In none of 2"):
        shape_bias([0, 1], [0, 1], [0, 1])
    with pytest.raises(UsageError, match="for each picture"):
        shape_bias([0, 1], [0, 1], [0])


def test_groups_of_classes():
    probability = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert group_probability(probability, [1, 0, 1, -1]) == pytest.approx(np.array([[0.2, 0.2]]))
    with pytest.raises(UsageError, match="in group 1"):
        group_probability(probability, [0, 0, 2, 2])
    with pytest.raises(UsageError, match="group for each class"):
        group_probability(probability, [0, 1])


# --------------------------------------------------------------------------------------------------
# Corruptions
# --------------------------------------------------------------------------------------------------


def test_relative_drop():
    assert relative_drop(80, 60) == pytest.approx(25)
    assert relative_drop(50, 0) == 100
    assert relative_drop(50, 55) == pytest.approx(-10)
    for clean, corrupted in ((0, 0), (101, 5), (50, -1), (50, math.nan)):
        with pytest.raises(UsageError, match="relative drop"):
            relative_drop(clean, corrupted)


def test_table_is_sorted_and_averaged():
    found = corruption_table(
        80,
        {("fog", 3): 40.0, ("jpeg", 1): 80.0, ("fog", 1): 60.0, ("jpeg", 3): 60.0},
        {"all": ["jpeg", "fog"]},
    )
    assert list(found["rows"]) == ["fog", "jpeg"]
    assert list(found["rows"]["fog"]["severity"].items()) == [(1, 60.0), (3, 40.0)]
    assert found["rows"]["fog"]["mean"] == 50
    assert found["rows"]["fog"]["relative_drop"] == pytest.approx(37.5)
    assert found["groups"] == {"all": {"mean": 60.0, "relative_drop": pytest.approx(25)}}
    assert corruption_table(0, {("fog", 1): 0.0}, {})["rows"]["fog"]["relative_drop"] is None


def test_bad_tables():
    with pytest.raises(UsageError, match="no corrupted pictures"):
        corruption_table(80, {}, {})
    with pytest.raises(UsageError, match=r"jpeg has the severities \[1\], others have \[1, 2\]"):
        corruption_table(80, {("fog", 1): 1.0, ("fog", 2): 1.0, ("jpeg", 1): 1.0}, {})
    for severity in (0, -1, 1.5):
        with pytest.raises(UsageError, match="whole number from 1"):
            corruption_table(80, {("fog", severity): 1.0}, {})
