"""Who does what to whom: how often a score tells sentences and pictures apart that share their words.

Comparisons are strict, so a constant score is never right. Rows that could not be scored (NaN) count as
wrong and are reported beside the figures.

Axis letters: R rows, N texts, M pictures, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError


@dataclass(frozen=True)
class PairwiseAccuracy:
    """Percent of all `rows` whose true picture scored higher; `scored` leaves the `failed` ones out."""

    accuracy: float
    scored: float
    rows: int
    failed: int


def pairwise_accuracy(positive_R: npt.ArrayLike, negative_R: npt.ArrayLike) -> PairwiseAccuracy:
    """Scores of true and of false pairs, row by row.

    >>> pairwise_accuracy([0.5, 0.2, float("nan"), 0.9], [0.1, 0.2, 0.3, 0.4])
    PairwiseAccuracy(accuracy=50.0, scored=66.66666666666667, rows=4, failed=1)
    """
    positive_R, negative_R = np.asarray(positive_R, np.float64), np.asarray(negative_R, np.float64)
    if positive_R.ndim != 1 or positive_R.shape != negative_R.shape or not len(positive_R):
        raise UsageError(f"Expected two lists of as many scores, got {positive_R.shape}, {negative_R.shape}.")
    failed = int((np.isnan(positive_R) | np.isnan(negative_R)).sum())
    rows, right = len(positive_R), int((positive_R > negative_R).sum())
    return PairwiseAccuracy(100 * right / rows, 100 * right / max(1, rows - failed), rows, failed)


@dataclass(frozen=True)
class WinogroundScores:
    """Percent of all `rows`; `right_R3` says of each row whether text, image and group are right."""

    text: float
    image: float
    group: float
    rows: int
    failed: int
    right_R3: np.ndarray


def winoground_scores(scores_R22: npt.ArrayLike) -> WinogroundScores:
    """scores_R22[r, c, i] of caption c with picture i, where c and i = c belong together.

    Text: each picture prefers its own caption. Image: each caption prefers its own picture. Group: both.
    """
    scores_R22 = np.asarray(scores_R22, np.float64)
    if scores_R22.shape[1:] != (2, 2) or not len(scores_R22):
        raise UsageError(f"Expected scores of shape (rows, 2, 2), got {scores_R22.shape}.")
    (c0_i0, c0_i1), (c1_i0, c1_i1) = scores_R22.transpose(1, 2, 0)
    text_R = (c0_i0 > c1_i0) & (c1_i1 > c0_i1)
    image_R = (c0_i0 > c0_i1) & (c1_i1 > c1_i0)
    right_R3 = np.stack([text_R, image_R, text_R & image_R], axis=1)
    failed = int(np.isnan(scores_R22).any(axis=(1, 2)).sum())
    text, image, group = (100 * right_R3.mean(0)).tolist()
    return WinogroundScores(text, image, group, len(scores_R22), failed, right_R3)


def top_rescored(sims_NM: npt.ArrayLike, top_NK: npt.ArrayLike, scores_NK: npt.ArrayLike) -> np.ndarray:
    """Similarities in which each text's K candidates lie above all others, in the order of new scores.

    A candidate that could not be scored (NaN) comes last of the K.

    >>> top_rescored([[3.0, 2.0, 1.0]], [[0, 1]], [[0.1, 0.7]]).argsort().tolist()
    [[2, 0, 1]]
    """
    made_NM = np.array(sims_NM, np.float64)
    top_NK, scores_NK = np.asarray(top_NK), np.asarray(scores_NK, np.float64)
    if top_NK.shape != scores_NK.shape or len(top_NK) != len(made_NM):
        raise UsageError(f"Expected as many scores as candidates, got {scores_NK.shape} and {top_NK.shape}.")
    finite_NK = np.where(np.isnan(scores_NK), -np.inf, scores_NK)
    # ties of the new score stay ties, which metrics.retrieval counts against the model
    place_NK = (finite_NK[:, :, None] > finite_NK[:, None, :]).sum(-1)
    np.put_along_axis(made_NM, top_NK, made_NM.max(1, keepdims=True) + 1 + place_NK, axis=1)
    return made_NM
