"""Classification metrics from a score matrix. Axis letters: N items, C classes.

A class as high as the right one counts as ranked before it, so constant scores are never right.
Figures are percent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moviola.types import UsageError


def topk_accuracy(
    scores_NC: npt.ArrayLike, labels_N: npt.ArrayLike, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of items whose class is among the k highest scores, as `{"top1": ..., "top5": ...}`.

    >>> topk_accuracy([[0.9, 0.1], [0.8, 0.2]], [0, 1], ks=(1, 2))
    {'top1': 50.0, 'top2': 100.0}
    """
    if any(k < 1 for k in ks):
        raise UsageError(f"Top-k accuracy needs k of 1 or more, got {tuple(ks)}.")
    ranks_N = class_ranks(scores_NC, labels_N)
    return {f"top{k}": float((ranks_N <= k).mean() * 100) for k in ks}


def class_ranks(scores_NC: npt.ArrayLike, labels_N: npt.ArrayLike) -> np.ndarray:
    """The 1-based rank of each item's own class: (N,) int."""
    scores, labels = _checked(scores_NC, labels_N)
    own_N1 = np.take_along_axis(scores, labels[:, None], axis=1)
    return (scores >= own_N1).sum(1)


def per_class_accuracy(scores_NC: npt.ArrayLike, labels_N: npt.ArrayLike) -> np.ndarray:
    """Top-1 accuracy of each class: (C,); NaN for a class that no item has."""
    scores, labels = _checked(scores_NC, labels_N)
    right_N = class_ranks(scores, labels) == 1
    count_C = np.bincount(labels, minlength=scores.shape[1])
    with np.errstate(invalid="ignore"):
        return np.bincount(labels, weights=right_N, minlength=scores.shape[1]) / count_C * 100


def mean_class_accuracy(scores_NC: npt.ArrayLike, labels_N: npt.ArrayLike) -> float:
    """The mean of `per_class_accuracy` over the classes that occur: rare classes weigh the same."""
    return float(np.nanmean(per_class_accuracy(scores_NC, labels_N)))


def confusion(scores_NC: npt.ArrayLike, labels_N: npt.ArrayLike) -> np.ndarray:
    """How often class r (row) was given the highest score of class c (column): (C, C) int.

    Among equal highest scores the first class is taken.
    """
    scores, labels = _checked(scores_NC, labels_N)
    classes = scores.shape[1]
    return np.bincount(labels * classes + scores.argmax(1), minlength=classes**2).reshape(classes, classes)


def _checked(scores_NC: npt.ArrayLike, labels_N: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores_NC), np.asarray(labels_N)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not scores.size:
        raise UsageError(
            f"Expected scores (items, classes) and one label per item, got {scores.shape} and {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise UsageError(
            f"Labels must be class numbers in 0..{scores.shape[1] - 1}, got {labels.dtype} in "
            f"{labels.min()}..{labels.max()}."
        )
    if np.isnan(scores).any():
        raise UsageError(f"{int(np.isnan(scores).any(1).sum())} of {len(scores)} items have NaN scores.")
    return scores, labels
