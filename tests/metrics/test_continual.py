from __future__ import annotations

import numpy as np
import pytest

from moviola.metrics.continual import (
    average_accuracy,
    backward_transfer,
    phase_matrix,
    task_accuracies,
    with_phase,
)
from moviola.types import UsageError

MATRIX = [[80.0, 10.0, 20.0], [60.0, 90.0, 30.0], [50.0, 70.0, 85.0]]


def test_backward_transfer_of_a_matrix_made_by_hand():
    """The sum over earlier tasks, divided by phase + 1: the current one contributes 0."""
    assert backward_transfer(MATRIX, 0) == 0
    assert backward_transfer(MATRIX, 1) == pytest.approx((60 - 80) / 2)
    assert backward_transfer(MATRIX, 2) == pytest.approx(((50 - 80) + (70 - 90)) / 3)


def test_average_accuracy_is_over_the_tasks_learned():
    assert average_accuracy(MATRIX, 0) == 80
    assert average_accuracy(MATRIX, 1) == pytest.approx((60 + 90) / 2)
    assert average_accuracy(MATRIX, 2) == pytest.approx((50 + 70 + 85) / 3)


def test_rows_are_filled_one_after_the_other():
    made = phase_matrix(3)
    assert np.isnan(made).all()
    for phase, row in enumerate(MATRIX):
        before = made
        made = with_phase(made, phase, row)
        assert np.isnan(before[phase]).all()  # the caller's stays as it is
        assert average_accuracy(made, phase) == average_accuracy(MATRIX, phase)
    np.testing.assert_array_equal(made, MATRIX)


def test_a_class_without_pictures_is_left_out_of_its_task():
    assert task_accuracies([100.0, np.nan, 40.0, 60.0], [(0, 1), (2, 3)]).tolist() == [100.0, 50.0]


BAD = {
    "no phase": (lambda: phase_matrix(0), "at least one phase"),
    "no square": (lambda: backward_transfer([[1.0, 2.0]], 0), "square"),
    "phase too large": (lambda: average_accuracy(MATRIX, 3), "phases 0 to 2"),
    "not filled": (lambda: backward_transfer(with_phase(phase_matrix(2), 0, [1, 2]), 1), "no figures"),
    "row out of turn": (lambda: with_phase(phase_matrix(3), 1, [1, 2, 3]), "no figures"),
    "row too short": (lambda: with_phase(phase_matrix(3), 0, [1, 2]), "each of 3 tasks"),
    "empty task": (lambda: task_accuracies([1.0, 2.0], [(0,), ()]), "classes from 0 to 1"),
    "no such class": (lambda: task_accuracies([1.0, 2.0], [(0, 2)]), "classes from 0 to 1"),
    "nothing measured": (lambda: task_accuracies([1.0, np.nan], [(0,), (1,)]), "has an accuracy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, said = BAD[name]
    with pytest.raises(UsageError, match=said):
        call()
