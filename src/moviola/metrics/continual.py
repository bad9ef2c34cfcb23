"""What a model that learns one task after the other still knows of the earlier ones.

Row p of the phase matrix holds, after phase p, the accuracy on each task's classes among the names of all
classes; rows to come are NaN. Figures keep the unit of the matrix (percent in this house).

Axis letters: P phases (as many as tasks), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError


def phase_matrix(phases: int) -> np.ndarray:
    """A matrix_PP that no phase has filled yet."""
    if phases < 1:
        raise UsageError(f"There must be at least one phase, got {phases}.")
    return np.full((phases, phases), np.nan)


def task_accuracies(accuracy_C: npt.ArrayLike, tasks: Sequence[Sequence[int]]) -> np.ndarray:
    """The mean over each task's classes of their accuracy: (P,). Classes without a figure (NaN) are left out.

    >>> task_accuracies([100.0, 50.0, 0.0, 20.0], [(0, 1), (2, 3)]).tolist()
    [75.0, 10.0]
    """
    known_C = np.asarray(accuracy_C, np.float64)
    for task in tasks:
        numbers = np.asarray(task, np.int64)
        if not numbers.size or numbers.min() < 0 or numbers.max() >= len(known_C):
            raise UsageError(f"A task needs classes from 0 to {len(known_C) - 1}, got {list(task)}.")
        if np.isnan(known_C[numbers]).all():
            raise UsageError(f"None of the classes {list(task)} of a task has an accuracy.")
    return np.array([np.nanmean(known_C[list(task)]) for task in tasks])


def with_phase(matrix_PP: npt.ArrayLike, phase: int, accuracy_P: npt.ArrayLike) -> np.ndarray:
    """The matrix with row `phase` filled: `accuracy_P` on every task, also those not learned yet."""
    made, row = np.array(matrix_PP, np.float64), np.asarray(accuracy_P, np.float64)
    _check(made, phase, filled=phase - 1)
    if row.shape != made.shape[:1]:
        raise UsageError(f"Expected an accuracy for each of {len(made)} tasks, got {row.shape}.")
    made[phase] = row
    return made


def average_accuracy(matrix_PP: npt.ArrayLike, phase: int) -> float:
    """The mean after `phase` over the tasks learned by then."""
    matrix = np.asarray(matrix_PP, np.float64)
    _check(matrix, phase, filled=phase)
    return float(matrix[phase, : phase + 1].mean())


def backward_transfer(matrix_PP: npt.ArrayLike, phase: int) -> float:
    """The mean over the tasks learned by `phase` of accuracy now less accuracy when learned.

    Below 0 means forgotten. The task just learned counts with 0, so the sum is divided by phase + 1, as the
    authors of VR-LwF do; Lopez-Paz and Ranzato (2017) divide by phase.

    >>> backward_transfer([[80.0, 10.0], [60.0, 90.0]], 1)
    -10.0
    """
    matrix = np.asarray(matrix_PP, np.float64)
    _check(matrix, phase, filled=phase)
    learned = range(phase + 1)
    return float(np.mean([matrix[phase, task] - matrix[task, task] for task in learned]))


def _check(matrix: np.ndarray, phase: int, *, filled: int) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise UsageError(f"A phase matrix is square, phases by tasks, got {matrix.shape}.")
    if not 0 <= phase < len(matrix):
        raise UsageError(f"There are phases 0 to {len(matrix) - 1}, got {phase}.")
    if filled >= 0 and np.isnan(matrix[: filled + 1]).any():
        raise UsageError(f"The phase matrix has no figures for all phases up to {filled}.")
